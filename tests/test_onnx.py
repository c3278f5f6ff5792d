"""Towers as ONNX files: equal to plain transformers in every batch, whole or not there, used as the card says."""

import json
import logging
import re
import shutil
from importlib.util import find_spec

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import drawn_image
from safetensors.torch import load_file, save_file
from transformers import AlignConfig, AlignModel

from align_train.hub import export_onnx, model_card, onnx_export
from align_train.hub.exporting import build_processor, is_export
from align_train.records import Preprocessing


def toy():
    """The smallest model of both towers; plain, as it lies in folders of users."""
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    blocks = {"kernel_sizes": [3], "in_channels": [32], "out_channels": [16], "strides": [2], "expand_ratios": [1]}
    image = {**blocks, "width_coefficient": 0.1, "depth_coefficient": 1.0, "depthwise_padding": []}
    image = {**image, "num_block_repeats": [1], "hidden_dim": 16, "image_size": 32}
    torch.manual_seed(0)
    return AlignModel(AlignConfig(text_config=text, vision_config=image, projection_dim=8)).eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with both towers, of which the text tower's weights are taken for too large for one file."""
    folder = tmp_path_factory.mktemp("onnx") / "hf"
    toy().save_pretrained(folder)
    build_processor(Preprocessing(resize=40, crop=32, antialias=True, max_tokens=16)).save_pretrained(folder)
    told, root = set(), logging.getLogger()
    level = root.level
    with pytest.MonkeyPatch.context() as patch:
        root.setLevel(logging.INFO)  # as the command line has it
        patch.setattr(logging.Logger, "handle", lambda _, record: told.add(record.name.partition(".")[0]))
        patch.setattr(onnx_export, "LARGEST_FILE", 1_000_000)
        assert 0 < export_onnx(folder) <= 1e-5
    root.setLevel(level)
    assert not told & {"onnx_ir", "onnxscript"}
    return folder


@pytest.fixture
def copied(exported, tmp_path, monkeypatch):
    """Another copy, in which exporting again writes the files that the first one has."""
    monkeypatch.setattr(
        onnx_export,
        "write_towers",
        lambda model, batch, folder: shutil.copytree(exported / "onnx", folder, dirs_exist_ok=True),
    )
    return shutil.copytree(exported, tmp_path / "copied")


def session(folder, tower):
    return onnxruntime.InferenceSession(folder / "onnx" / f"{tower}.onnx", providers=["CPUExecutionProvider"])


def told(nodes):
    return {node.name: (node.type, node.shape) for node in nodes}


def test_inputs_and_outputs_are_named_as_in_transformers_with_free_axes(exported):
    image, text = session(exported, "image"), session(exported, "text")
    assert told(image.get_inputs()) == {"pixel_values": ("tensor(float)", ["batch", 3, 32, 32])}
    assert told(image.get_outputs()) == {"image_embeds": ("tensor(float)", ["batch", 8])}
    assert told(text.get_inputs()) == {
        name: ("tensor(int64)", ["batch", "length"]) for name in ("input_ids", "attention_mask")
    }
    assert told(text.get_outputs()) == {"text_embeds": ("tensor(float)", ["batch", 8])}


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize(("length", "padded"), [(1, False), (9, False), (9, True), (64, True)])
def test_embeddings_are_those_of_plain_transformers(exported, count, length, padded):
    random = torch.Generator().manual_seed(count)
    ids = torch.randint(1, 30_000, (count, length), generator=random)
    mask = torch.ones_like(ids)
    if padded:
        ids[-1, length // 2 :] = mask[-1, length // 2 :] = 0
    pixels = torch.rand((count, 3, 32, 32), generator=random) * 2 - 1
    with torch.inference_mode():
        expected = AlignModel.from_pretrained(exported).eval()(ids, pixels, mask)
    image = session(exported, "image").run(None, {"pixel_values": pixels.numpy()})[0]
    text = session(exported, "text").run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]
    assert np.abs(image - expected.image_embeds.numpy()).max() < 2e-6
    assert np.abs(text - expected.text_embeds.numpy()).max() < 2e-6


def test_weights_that_are_too_large_for_one_file_lie_beside_it(exported):
    assert {path.name for path in (exported / "onnx").iterdir()} == {"image.onnx", "text.onnx", "text.onnx.data"}
    assert (exported / "onnx" / "text.onnx").stat().st_size < 200_000
    assert [path.name for path in exported.parent.iterdir()] == ["hf"]  # nothing half written beside it


def test_the_lines_of_the_card_run(exported, tmp_path, monkeypatch):
    card = model_card("a", "1", "b", {}, "c", onnx=True)
    code = re.search(r"```python\n(import onnxruntime.*?)```", card, re.DOTALL)[1]
    (tmp_path / "image.png").write_bytes(drawn_image(5, (60, 90), "PNG"))
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(code.replace("path/to/this/folder", str(exported)), found)
    assert found["cosines"].shape == (1, 2)
    assert np.abs(found["cosines"]).max() <= 1
    assert "onnx" not in model_card("a", "1", "b", {}, "c")


def test_files_of_other_weights_are_refused_and_the_old_ones_stay(copied):
    before = {path.name: path.read_bytes() for path in (copied / "onnx").iterdir()}
    for name in ("text_projection.bias", "vision_model.embeddings.batchnorm.bias"):
        weights = load_file(copied / "model.safetensors")
        save_file({**weights, name: weights[name] + torch.arange(len(weights[name]))}, copied / "model.safetensors")
        with pytest.raises(ValueError, match=r"the ONNX files differ from .*copied by \S+, more than 1e-05"):
            export_onnx(copied)
        save_file(weights, copied / "model.safetensors")
    assert before == {path.name: path.read_bytes() for path in (copied / "onnx").iterdir()}
    assert export_onnx(copied) <= 1e-5
    assert not list(copied.parent.glob(".*"))


@pytest.mark.parametrize("bad", [float("nan"), 2e-5])
def test_a_difference_that_is_no_number_is_refused_too(copied, monkeypatch, bad):
    shutil.rmtree(copied / "onnx")
    monkeypatch.setattr(onnx_export, "largest_difference", lambda *_: bad)
    with pytest.raises(ValueError, match="they stay in"):
        export_onnx(copied)
    assert not (copied / "onnx").exists()


def test_missing_packages_are_named(exported, monkeypatch):
    monkeypatch.setattr(onnx_export, "find_spec", lambda name: None if name == "onnxscript" else find_spec(name))
    with pytest.raises(ValueError, match=r"need onnxscript: install them with pip install 'align-train\[onnx\]'"):
        export_onnx(exported)


def test_an_export_may_replace_one_with_our_onnx_files_but_none_with_others(copied):
    assert is_export(copied)
    (copied / "onnx" / "image_int8.onnx").write_text("somebody's own")
    assert not is_export(copied)
    (copied / "onnx" / "image_int8.onnx").unlink()
    (copied / "onnx").rename(copied / "else")
    assert not is_export(copied)
    assert json.loads((copied / "config.json").read_text())["model_type"] == "align"
