"""Models of two towers trained apart: they compute what they did, the node rebuilds them, wrong folders are named."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    CLIPConfig,
    EfficientNetConfig,
    EfficientNetForImageClassification,
    EfficientNetModel,
)
from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil

from align_train.data.tokens import load_tokenizer
from align_train.hub import export_hf, load_hf, load_parts, parts_node
from align_train.hub.exporting import plain_model
from align_train.records import Preprocessing
from align_train.shipped import vocabulary

# as google/efficientnet-b0 has them: their squares are ImageNet's deviations
KERAS = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229**0.5, 0.224**0.5, 0.225**0.5]}
SQUARE = {"height": 33, "width": 33}


def efficientnet(kind=EfficientNetModel, **settings):
    """Of some thousand weights, with features of order 1 and statistics that are not the start values."""
    sizes = {"width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128, "image_size": 33}
    model = kind(EfficientNetConfig(**sizes | {"depthwise_padding": [2], "batch_norm_eps": 2e-3} | settings)).eval()
    torch.manual_seed(0)  # now, since a head has drawn numbers too
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.ones_(layer.weight)
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 1.5)
    return model


def bert(kind=BertModel, **settings):
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return kind(BertConfig(**sizes | {"layer_norm_eps": 1e-6} | settings)).eval()


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """A folder that tests read and copy, never change, and likewise `text`."""
    folder = tmp_path_factory.mktemp("image")
    efficientnet(EfficientNetForImageClassification).save_pretrained(folder)
    EfficientNetImageProcessorPil(size=SQUARE, resample=0, **KERAS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    bert(BertForPreTraining).save_pretrained(folder)
    load_tokenizer(512).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(image, text):
    """Model, node and lines; tests change none of them."""
    torch.manual_seed(3)
    return load_parts(image, text)


@pytest.fixture
def copied_image(image, tmp_path):
    return shutil.copytree(image, tmp_path / "image")


@pytest.fixture
def copied_text(text, tmp_path):
    return shutil.copytree(text, tmp_path / "text")


def drawn(size, count=3):
    colours = np.random.default_rng(0).integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    return [Image.fromarray(each).resize((size, size)) for each in colours]


def ours(images):
    return torch.from_numpy(np.stack([np.asarray(each) for each in images])).permute(0, 3, 1, 2)


def words():
    ids = torch.randint(1000, 30_000, (4, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[2, 5:] = mask[2, 5:] = 0
    return ids, mask


@torch.inference_mode()
def features(model, pixels):
    """What comes into the top convolution: EfficientNet's last block."""
    seen = []
    hook = model.encoder.top_conv.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model(pixels)
    hook.remove()
    return seen[0]


@torch.inference_mode()
def align_features(model, images):
    return model.eval().vision_model(ours(images) / 127.5 - 1).last_hidden_state


@torch.inference_mode()
def embeddings(model, size=33):
    model.eval()
    return model.encode_image(ours(drawn(size))), model.encode_text(*words())


def rebuilt(node):
    return instantiate(OmegaConf.create(node), _convert_="all")


# The towers


@torch.inference_mode()
def test_the_text_tower_is_berts(loaded, text):
    model, ids, mask = loaded[0].eval(), *words()
    expected = BertModel.from_pretrained(text).eval()(ids, mask).last_hidden_state
    found = plain_model(model).text_model(ids, mask).last_hidden_state  # ours gives [CLS] alone
    assert (found - expected)[mask.bool()].abs().max() <= 1e-6
    assert (model.text_model(ids, mask).last_hidden_state - expected[:, :1]).abs().max() <= 1e-6
    assert expected.std() > 0.1


def test_the_image_tower_is_efficientnets(loaded, image):
    images = drawn(33)
    inputs = EfficientNetImageProcessorPil.from_pretrained(image)(images=images, return_tensors="pt")["pixel_values"]
    expected = features(EfficientNetModel.from_pretrained(image).eval(), inputs)
    assert (align_features(loaded[0], images) - expected).abs().max() <= 1e-4 * expected.std()
    assert expected.std() > 0.1


@pytest.mark.parametrize(
    ("settings", "as_ours"),
    [
        (KERAS | {"include_top": False}, False),
        ({"rescale_offset": True, "rescale_factor": 1 / 127.5, "do_normalize": False}, False),  # then divided by 0.5
        ({"rescale_offset": True, "rescale_factor": 1 / 127.5, "do_normalize": False, "include_top": False}, True),
    ],
)
def test_the_image_tower_is_efficientnets_whatever_its_processor_scales_to(copied_image, text, settings, as_ours):
    processor = EfficientNetImageProcessorPil(size=SQUARE, **settings)
    processor.save_pretrained(copied_image)
    model, _, told = load_parts(copied_image, text)
    images = drawn(33)
    inputs = processor(images=images, return_tensors="pt")["pixel_values"]
    expected = features(efficientnet(), inputs)
    assert (align_features(model, images) - expected).abs().max() <= 1e-4 * expected.std()
    assert (told[-1] == "pixels: x / 127.5 - 1, as the image tower was trained") == as_ours


def test_at_an_even_size_the_first_layer_is_exact_inside_and_near_at_its_border(loaded):
    model, plain, images = loaded[0].eval(), efficientnet(), drawn(64)
    processor = EfficientNetImageProcessorPil(size={"height": 64, "width": 64}, **KERAS)
    inputs = processor(images=images, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        expected = plain.embeddings(inputs)
        difference = (model.vision_model.embeddings(ours(images) / 127.5 - 1) - expected).abs()
    assert difference[..., :-1, :-1].max() <= 1e-5
    assert difference[..., -1, :].max() > 1e-2  # there is a difference to be small
    whole = features(plain, inputs)
    assert (align_features(model, images) - whole).abs().mean() <= 0.01 * whole.std()


def test_without_an_image_processor_scale_and_size_are_efficientnets_own(copied_image, loaded, text):
    (copied_image / "preprocessor_config.json").unlink()
    model, node, told = load_parts(copied_image, text)
    assert model.preprocessing == Preprocessing(resize=33, crop=33, antialias=True, max_tokens=64)
    for one, two in zip(loaded[0].vision_model.parameters(), model.vision_model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    assert any("image_size, as it has no image processor" in line for line in told)
    assert any("taken for ImageNet's mean and deviation" in line for line in told)
    assert node["preprocessing"]["resize"] == 33


def test_sizes_come_from_the_image_processor(copied_image, text):
    crop = {"height": 32, "width": 32}
    size = {"height": 40, "width": 40}
    EfficientNetImageProcessorPil(size=size, crop_size=crop, do_center_crop=True).save_pretrained(copied_image)
    assert parts_node(copied_image, text)["preprocessing"] == {
        "resize": 40, "crop": 32, "antialias": True, "max_tokens": 64
    }  # fmt: skip


# What is said


def test_it_says_what_was_taken_what_was_left_and_what_is_new(loaded, image, text):
    told = loaded[2]
    vision = len([name for name in efficientnet().state_dict() if not name.startswith("encoder.top_")])
    assert told[0] == (
        f"image tower: {vision} tensors of {image}, EfficientNet; "
        "left out: 8 (classifier, encoder.top_bn, encoder.top_conv)"
    )
    assert told[1].startswith(f"text tower: {len(bert().state_dict())} tensors of {text}, BERT; left out: ")
    assert "(cls.predictions, cls.seq_relationship)" in told[1]
    assert told[2] == "fresh: text_projection (32 to 32), temperature 0.07"
    assert told[3] == (
        "images: resized to 33, cropped to 33 (its image processor), with a bilinear filter where the processor has "
        "nearest"
    )
    assert "in its first layer: exact" in told[4]


def test_a_bert_without_a_pooler_is_taken_since_align_has_no_use_for_it(image, copied_text):
    bert(BertForMaskedLM).save_pretrained(copied_text)
    _, _, told = load_parts(image, copied_text)
    assert told[2].endswith("and the text tower's pooler, which ALIGN does not use")


def test_the_poolers_weights_are_taken_as_they_are(loaded, text):
    assert torch.equal(loaded[0].text_model.pooler.dense.weight, BertModel.from_pretrained(text).pooler.dense.weight)


def test_the_projection_follows_the_seed_and_the_temperature_is_set(loaded, image, text):
    torch.manual_seed(3)
    again, node, told = load_parts(image, text, temperature=0.05)
    assert torch.equal(again.text_projection.weight, loaded[0].text_projection.weight)
    assert again.text_projection.weight.std() > 0.01
    assert (again.temperature.item(), loaded[0].temperature.item()) == pytest.approx((0.05, 0.07))
    assert node["config"]["temperature_init_value"] == 0.05
    assert told[2].endswith("temperature 0.05")


# The node


def test_the_node_rebuilds_the_model_without_the_folders(loaded):
    model, node, _ = loaded
    again = rebuilt(yaml.safe_load(yaml.safe_dump(node)))
    assert again.preprocessing == model.preprocessing
    assert again.temperature_bounds == model.temperature_bounds
    again.load_state_dict(model.state_dict())
    for one, two in zip(embeddings(again), embeddings(model), strict=True):
        assert torch.equal(one, two)


def test_the_node_is_plain_and_knows_no_folder(loaded, image, text):
    node = loaded[1]
    assert parts_node(image, text) == node
    assert json.loads(json.dumps(node)) == node
    assert str(image.parent) not in json.dumps(node)


def test_settings_of_both_towers_are_carried_over(copied_image, copied_text):
    efficientnet(drop_connect_rate=0.3, batch_norm_momentum=0.9).save_pretrained(copied_image)
    bert(hidden_dropout_prob=0.25, type_vocab_size=3).save_pretrained(copied_text)
    model, _, _ = load_parts(copied_image, copied_text)
    vision, words = model.config.vision_config, model.config.text_config
    assert (vision.drop_connect_rate, vision.batch_norm_momentum, vision.batch_norm_eps) == (0.3, 0.9, 2e-3)
    assert (vision.depthwise_padding, vision.hidden_dim, vision.image_size) == ([2], 128, 33)
    assert (words.hidden_dropout_prob, words.type_vocab_size, words.layer_norm_eps) == (0.25, 3, 1e-6)
    assert model.vision_model.embeddings.batchnorm.eps == 2e-3


def test_a_model_of_parts_exports_and_loads_as_any_other(loaded, tmp_path):
    assert export_hf(loaded[0], tmp_path / "hf") <= 1e-5
    for one, two in zip(embeddings(load_hf(tmp_path / "hf")), embeddings(loaded[0]), strict=True):
        assert (one - two).abs().max() <= 1e-5


# What is refused


def test_towers_in_each_others_place_are_named(image, text):
    with pytest.raises(ValueError, match=r"holds a 'bert' model: as image tower only those of type efficientnet"):
        load_parts(text, text)
    with pytest.raises(ValueError, match=r"holds a 'efficientnet' model: as text tower only those of type bert"):
        parts_node(image, image)


def test_another_architecture_is_named(image, text, tmp_path):
    CLIPConfig().save_pretrained(tmp_path)
    for folders in ((tmp_path, text), (image, tmp_path)):
        with pytest.raises(ValueError, match="holds a 'clip' model: as") as raised:
            load_parts(*folders)
        assert str(tmp_path) in str(raised.value)
    with pytest.raises(OSError, match="neither a folder with a model nor a repository within reach"):
        load_parts(image, tmp_path / "none")


def test_another_vocabulary_is_refused(image, copied_text, tmp_path):
    lines = vocabulary().read_text(encoding="utf-8").splitlines()
    (tmp_path / "vocab.txt").write_text("\n".join(reversed(lines)), encoding="utf-8")
    load_tokenizer(16, tmp_path / "vocab.txt").save_pretrained(copied_text)
    with pytest.raises(ValueError, match="has another vocabulary, of 30522 tokens, than bert-base-uncased"):
        load_parts(image, copied_text)


def test_a_bert_without_its_tokenizer_is_refused(image, copied_text):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copied_text / name).unlink()
    with pytest.raises(ValueError, match=r"another vocabulary, of 5 tokens, .*\(without the tokenizer's files"):
        load_parts(image, copied_text)


def test_a_tower_of_fewer_tokens_than_the_vocabulary_is_refused(image, copied_text):
    bert(vocab_size=100).save_pretrained(copied_text)
    with pytest.raises(ValueError, match=r"knows 100 tokens \(vocab_size\), but its tokenizer has 30522"):
        load_parts(image, copied_text)


@pytest.mark.parametrize(
    ("part", "name", "said"),
    [
        ("image", "efficientnet.encoder.blocks.0.projection.project_conv.weight", r"encoder\.blocks\.0\.projection"),
        ("text", "bert.encoder.layer.1.output.dense.bias", r"encoder\.layer\.1\.output"),
    ],
)
def test_missing_weights_are_refused(copied_image, copied_text, part, name, said):
    file = {"image": copied_image, "text": copied_text}[part] / "model.safetensors"
    weights = load_file(file)
    del weights[name]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"/{part} lack 1 tensors, the first is {said}"):
        load_parts(copied_image, copied_text)


def test_sizes_that_cannot_be_trained_are_refused(copied_image, copied_text, image, text):
    bert(max_position_embeddings=32).save_pretrained(copied_text)
    with pytest.raises(ValueError, match=r"takes 32 tokens \(max_position_embeddings\)"):
        parts_node(image, copied_text)
    EfficientNetImageProcessorPil(size={"height": 40, "width": 32}).save_pretrained(copied_image)
    with pytest.raises(ValueError, match=r"size of the image processor of .* but images are squares"):
        parts_node(copied_image, text)
    efficientnet(image_size=[40, 32]).save_pretrained(copied_image)
    (copied_image / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"image_size of .* is \[40, 32\], but images are squares"):
        parts_node(copied_image, text)
    efficientnet(out_channels=[16, 24, 40, 80, 112, 192, 300]).save_pretrained(copied_image)
    with pytest.raises(ValueError, match="no EfficientNet of the paper"):
        parts_node(copied_image, text)
