"""Exported folders: exact, whole, loaded by transformers alone; and what is refused on the way in and out."""

import json
import logging
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from conftest import drawn_image
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from transformers import AlignModel, AlignProcessor, BertConfig, CLIPConfig

from align_train.data.images import decode, pixels_of
from align_train.data.tokens import load_tokenizer, tokenize
from align_train.hub import align_node, export_hf, exporting, load_hf, model_card
from align_train.models import build, restore_align
from align_train.records import Preprocessing
from align_train.shipped import vocabulary

CARD = "---\nlibrary_name: transformers\n---\n# tiny, ünï\n"


def tiny(seed=0):
    torch.manual_seed(seed)
    model = build("align_tiny")
    with torch.no_grad():  # statistics and a temperature that are not the start values
        for name, value in model.named_buffers():
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
        model.temperature.fill_(0.05)
    return model


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    """A folder that tests read and copy, never change."""
    folder = tmp_path_factory.mktemp("hub") / "new" / "hf"
    assert export_hf(model, folder, CARD) <= 1e-5
    return folder


@pytest.fixture
def copied(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "copied")


@torch.inference_mode()
def embeddings(model, seed=0):
    """Of random inputs, in evaluation mode, with a padded caption."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (6, 3, 32, 32), generator=generator, dtype=torch.uint8)
    ids = torch.randint(1000, 30_000, (6, 9), generator=generator)
    mask = torch.ones_like(ids)
    ids[2, 5:] = mask[2, 5:] = 0
    model.eval()
    return model.encode_image(pixels), model.encode_text(ids, mask)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Out


def test_transformers_alone_reloads_it_equal(model, exported):
    plain, report = AlignModel.from_pretrained(exported, output_loading_info=True)
    assert type(plain) is AlignModel
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    processor = AlignProcessor.from_pretrained(exported)
    contents = [drawn_image(number, (70, 50), "PNG") for number in range(4)]
    captions = ["a red cat", "two dogs on a boat by the river", "moon", "a very long caption " * 20]
    inputs = processor(
        text=captions,
        images=[decode(content) for content in contents],
        return_tensors="pt",
        padding=True,
        truncation=True,
        max_length=16,
    )
    ids, mask = tokenize(load_tokenizer(16), captions)
    assert torch.equal(inputs["input_ids"], ids)
    assert torch.equal(inputs["attention_mask"], mask)
    ours = Preprocessing(resize=40, crop=32, antialias=True)
    pixels = torch.from_numpy(np.stack([pixels_of(content, ours) for content in contents])).permute(0, 3, 1, 2)
    assert (inputs["pixel_values"] - (pixels / 127.5 - 1)).abs().max() < 1e-6
    with torch.inference_mode():
        outputs = plain.eval()(**inputs)
        image, text = model.eval().encode_image(pixels), model.encode_text(ids, mask)
        logits = text @ image.T / model.temperature
    assert (outputs.image_embeds - image).abs().max() <= 1e-5
    assert (outputs.text_embeds - text).abs().max() <= 1e-5
    assert (outputs.logits_per_text - logits).abs().max() <= 1e-3  # over a temperature of .05
    assert image.std() > 0.01  # not the same row for every input
    assert text.std() > 0.01


def test_the_folder_holds_card_and_safe_weights(exported):
    names = {path.name for path in exported.iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    assert (exported / "README.md").read_text(encoding="utf-8") == CARD
    assert [path.name for path in exported.parent.iterdir()] == ["hf"]  # nothing half written beside it
    assert json.loads((exported / "config.json").read_text())["model_type"] == "align"


def test_the_export_is_in_float32(exported):
    assert {value.dtype for value in load_file(exported / "model.safetensors").values()} <= {torch.float32, torch.int64}


def test_export_changes_neither_weights_nor_mode(tmp_path):
    model = tiny(1).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export_hf(model, tmp_path / "hf")
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


PIPELINE = """
import json, sys
from transformers import pipeline
classify = pipeline("zero-shot-image-classification", model=sys.argv[1])
answer = classify(sys.argv[2], candidate_labels=["a cat", "a dog", "a house by the river"])
assert not any(name.partition(".")[0] == "align_train" for name in sys.modules)
print(json.dumps(answer))
"""


def test_the_zero_shot_pipeline_works_in_a_plain_interpreter(model, exported, tmp_path):
    labels = ["a cat", "a dog", "a house by the river"]
    content = drawn_image(5, (60, 90), "PNG")
    (tmp_path / "image.png").write_bytes(content)
    run = subprocess.run(
        [sys.executable, "-c", PIPELINE, str(exported), str(tmp_path / "image.png")],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    found = {answer["label"]: answer["score"] for answer in json.loads(run.stdout.splitlines()[-1])}
    pixels = pixels_of(content, Preprocessing(resize=40, crop=32, antialias=True))
    with torch.inference_mode():
        image = model.eval().encode_image(torch.from_numpy(pixels).permute(2, 0, 1)[None])
        # the pipeline puts each label into "This is a photo of {}."
        ids, mask = tokenize(load_tokenizer(16), [f"This is a photo of {label}." for label in labels])
        expected = (model.encode_text(ids, mask) @ image[0] / model.temperature).softmax(0)
    assert found == pytest.approx(dict(zip(labels, expected.tolist(), strict=True)), abs=1e-4)


def test_the_card_says_what_it_is_given():
    card = model_card("run {7}", "1.2.3", "COYO, CC-BY-4.0", {"steps": 10, "seed": "{x}"}, "exam  R@1\nclip  5.0")
    front, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(front)["pipeline_tag"] == "zero-shot-image-classification"
    assert body.startswith("\n# run {7}\n")
    for part in ("align_train 1.2.3", "COYO, CC-BY-4.0", "- steps: 10\n- seed: {x}", "```\nexam  R@1\nclip  5.0\n```"):
        assert part in body


@pytest.mark.parametrize("difference", [1.1e-5, 0.3, float("nan"), float("inf")])
def test_an_export_that_differs_is_refused_and_the_old_one_stays(model, copied, monkeypatch, difference):
    before = contents(copied)
    monkeypatch.setattr(exporting, "largest_difference", lambda *_: difference)
    with pytest.raises(ValueError, match=r"differs from the model by \S+ after a reload"):
        export_hf(model, copied, "another card")
    assert contents(copied) == before
    with pytest.raises(ValueError, match="differs"):
        export_hf(model, copied.with_name("new"))
    assert not copied.with_name("new").exists()


def test_a_weight_that_is_lost_on_the_way_is_noticed(model, tmp_path, monkeypatch):
    whole = exporting.plain_model

    def spoiled(model):
        plain = whole(model)
        with torch.no_grad():
            plain.text_projection.bias[0] += 1e-2
        return plain

    monkeypatch.setattr(exporting, "plain_model", spoiled)
    with pytest.raises(ValueError, match="differs from the model by"):
        export_hf(model, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_another_processor_is_noticed(model, tmp_path, monkeypatch):
    other = exporting.build_processor(Preprocessing(resize=36, crop=32, max_tokens=16))
    monkeypatch.setattr(exporting, "build_processor", lambda _: other)
    with pytest.raises(ValueError, match="differs from the model by"):
        export_hf(model, tmp_path / "hf")


@pytest.mark.parametrize(
    "name", ["text_projection.weight", "temperature", "vision_model.embeddings.convolution.weight"]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, name, value):
    model = tiny()
    with torch.no_grad():
        weight = model.get_parameter(name)
        weight[(0,) * weight.ndim] = value
    with pytest.raises(ValueError, match=rf"1 tensors of the model are not finite, the first is {name}"):
        export_hf(model, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_nan_in_one_tower_alone_is_a_difference(exported):
    """Python's max() would let it pass."""
    model = tiny()
    for name in ("text_projection.bias", "vision_model.embeddings.batchnorm.weight"):
        with torch.no_grad():
            model.get_parameter(name)[0] = float("nan")
        assert np.isnan(exporting.largest_difference(model, exported))
        model = tiny()


def test_a_former_export_is_replaced(copied):
    (copied / "model-00001-of-00002.safetensors").write_bytes(b"of a larger model")
    other = tiny(2)
    export_hf(other, copied, "new card")
    assert (copied / "README.md").read_text() == "new card"
    assert not (copied / "model-00001-of-00002.safetensors").exists()
    for one, two in zip(embeddings(load_hf(copied)), embeddings(other), strict=True):
        assert (one - two).abs().max() <= 1e-5


def test_an_empty_folder_is_taken(model, tmp_path):
    (tmp_path / "hf").mkdir()
    export_hf(model, tmp_path / "hf")
    assert (tmp_path / "hf" / "config.json").is_file()


def holds(folder, **files):
    folder.mkdir()
    for name, content in files.items():
        (folder / name.replace("_", ".")).write_text(content)


def test_a_folder_that_holds_something_else_is_kept(model, copied, tmp_path):
    (tmp_path / "file").write_text("a file")
    holds(tmp_path / "notes", notes_txt="mine")
    holds(tmp_path / "project", config_json='{"name": "a web page"}')
    holds(tmp_path / "bert", config_json='{"model_type": "bert"}')
    holds(tmp_path / "broken", config_json="{")
    holds(tmp_path / "list", config_json="[]")
    (copied / ".git").mkdir()  # a clone of the model's repository
    for folder in [tmp_path / name for name in ("file", "notes", "project", "bert", "broken", "list")] + [copied]:
        before = folder.read_bytes() if folder.is_file() else sorted(path.name for path in folder.iterdir())
        with pytest.raises(ValueError, match="is no exported model: choose another folder") as raised:
            export_hf(model, folder)
        assert str(folder) in str(raised.value)
        assert before == (folder.read_bytes() if folder.is_file() else sorted(p.name for p in folder.iterdir()))
    assert not list(tmp_path.glob(".*.tmp"))  # refused before anything is written


# In


def test_load_hf_gives_the_same_model(model, exported):
    loaded = load_hf(exported)
    assert list(loaded.state_dict()) == list(model.state_dict())
    for one, two in zip(embeddings(loaded), embeddings(model), strict=True):
        assert (one - two).abs().max() <= 1e-6
    assert loaded.temperature.item() == pytest.approx(0.05)
    assert load_hf(str(exported)).temperature.item() == pytest.approx(0.05)


def test_load_hf_gives_the_preprocessing_of_the_folder(model, exported):
    """All but the filter: the exported processor antialiases, so a model that is loaded from it does too."""
    assert model.preprocessing == Preprocessing(resize=40, crop=32, antialias=False, max_tokens=16)
    assert load_hf(exported).preprocessing == Preprocessing(resize=40, crop=32, antialias=True, max_tokens=16)


def test_preprocessing_without_a_crop(tmp_path):
    model = tiny()
    model.preprocessing = Preprocessing(resize=32, crop=32, antialias=True, max_tokens=9)
    export_hf(model, tmp_path / "hf")
    assert load_hf(tmp_path / "hf").preprocessing == model.preprocessing


def test_preprocessing_of_a_processor_that_does_not_crop(copied):
    processor = AlignProcessor.from_pretrained(copied)
    processor.image_processor.do_center_crop = False
    processor.save_pretrained(copied)
    assert load_hf(copied).preprocessing.crop == 40


def test_the_node_of_a_folder_rebuilds_its_model_without_it(model, exported):
    node = align_node(exported)
    assert yaml.safe_load(yaml.safe_dump(node)) == node
    assert str(exported) not in yaml.safe_dump(node)
    rebuilt, loaded = instantiate(OmegaConf.create(node), _convert_="all"), load_hf(exported)
    assert rebuilt.preprocessing == loaded.preprocessing
    assert rebuilt.temperature_bounds == loaded.temperature_bounds == (0.01, 10.0)
    rebuilt.load_state_dict(AlignModel.from_pretrained(exported).state_dict())
    for one, two in zip(embeddings(rebuilt), embeddings(loaded), strict=True):
        assert torch.equal(one, two)


def test_the_settings_of_a_node_have_effect(exported):
    node = align_node(exported)
    node["batch_norm"] = {"statistics": "frozen", "group_size": 16, "momentum": 0.01}
    node["gradient_checkpointing"] = True
    rebuilt = instantiate(OmegaConf.create(node), _convert_="all").train()
    assert rebuilt.encode_image(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 32)
    assert rebuilt.text_model.encoder.layer[0].gradient_checkpointing
    for key, value, said in [
        ("batch_norm", {"statistics": "frozen", "group_size": 16, "momentun": 1}, r"key model\.batch_norm\.momentun"),
        ("preprocessing", node["preprocessing"] | {"max_tokens": 65}, "max_tokens is 65, but the text tower has 64"),
        ("temperature_bounds", [2.0, 3.0], "outside its bounds"),
        ("config", node["config"] | {"vision_config": {"pooling_type": "max"}}, "pools by 'max'"),
    ]:
        with pytest.raises(ValueError, match=said):
            restore_align(**{name: each for name, each in (node | {key: value}).items() if name != "_target_"})


def test_images_of_another_scale_are_an_error(copied):
    processor = AlignProcessor.from_pretrained(copied)
    processor.image_processor.rescale_factor = 1 / 255
    processor.save_pretrained(copied)
    with pytest.raises(ValueError, match=r"does not scale pixels to x / 127\.5 - 1"):
        load_hf(copied)


def test_a_loaded_model_trains_repaired(exported):
    """Two images in a batch of virtual groups of 16 are an error only where batch norm is repaired."""
    loaded = load_hf(exported).train()
    with pytest.raises(ValueError, match="16"):
        loaded.encode_image(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))


def test_a_loaded_model_exports_again(exported, tmp_path):
    assert export_hf(load_hf(exported), tmp_path / "again") <= 1e-5
    first, again = (load_file(folder / "model.safetensors") for folder in (exported, tmp_path / "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("config", [BertConfig, CLIPConfig])
def test_another_architecture_is_one_clear_error(tmp_path, config, caplog):
    config().save_pretrained(tmp_path)
    kind = config.model_type
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match=rf"holds a '{kind}' model: only those"):
        load_hf(tmp_path)
    assert not caplog.records  # transformers' own guess at it would confuse


def test_a_missing_folder_is_named(tmp_path):
    for folder in (tmp_path / "none", "runs/hf"):
        with pytest.raises(OSError, match="neither a folder with a model nor a repository within reach") as raised:
            load_hf(folder)
        assert str(raised.value).startswith(f"{folder} is neither")
    with pytest.raises(ValueError, match="holds no model: only those"):
        load_hf(tmp_path)


def test_pickled_weights_are_not_loaded(model, copied):
    (copied / "model.safetensors").unlink()
    torch.save(model.state_dict(), copied / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load_hf(copied)


def test_incomplete_weights_are_an_error(copied):
    weights = load_file(copied / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1 tensors, the first is text_projection\.weight"):
        load_hf(copied)


def test_another_vocabulary_is_an_error(copied, tmp_path):
    lines = vocabulary().read_text(encoding="utf-8").splitlines()
    one, other = lines.index("cat"), lines.index("dog")
    lines[one], lines[other] = "dog", "cat"
    (tmp_path / "vocab.txt").write_text("\n".join(lines), encoding="utf-8")
    load_tokenizer(16, tmp_path / "vocab.txt").save_pretrained(copied)
    with pytest.raises(ValueError, match=r"has another vocabulary, of 30522 tokens, than bert-base-uncased"):
        load_hf(copied)
