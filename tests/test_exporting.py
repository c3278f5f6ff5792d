"""`align-train export`: what the card is told, what is done where it is asked, and what is left alone."""

import json

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from test_card import STORY

from align_train.cli import export as verb
from align_train.cli import exporting
from align_train.cli.models import build_model, save_model
from align_train.hub import weights_digest
from align_train.shipped import config_folder


@pytest.fixture(scope="module")
def trained():
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        recipe = compose("train", ["experiment=tiny", "folder=x", "model.text.layers=1"])
    return build_model(recipe.model), recipe


@pytest.fixture
def run(trained, tmp_path):
    """A run that settled its statistics and was fine-tuned, as its result.json says."""
    model, recipe = trained
    save_model(model, recipe, 3, "running statistics", tmp_path / "checkpoints" / "last.ckpt")
    result = {"weights_sha256": weights_digest(model), "exams": {}, "finetuning": STORY}
    (tmp_path / "result.json").write_text(json.dumps(result))
    return tmp_path


def export(run, **settings):
    """With settings as in configs/export.yaml; returns the card."""
    plain = {"checkpoint": str(run), "folder": None, "onnx": False, "push_to": None, "private": True}
    verb.export(DictConfig({**plain, **settings}))
    return (run / "hf" / "README.md").read_text()


def refuse(*given, **named):
    raise AssertionError("this was not asked for")


@pytest.fixture(autouse=True)
def nothing_unasked(monkeypatch):
    for name in ("recalibrate_on", "push", "export_onnx"):
        monkeypatch.setattr(exporting, name, refuse)


def test_settled_statistics_stay_and_the_card_tells_of_the_fine_tuning(run):
    card = export(run)
    assert "base_model: [kakaobrain/align-base]" in card
    assert "| recommended, this model | 0.6 | 31.2 | 23.6 |" in card
    assert "onnx" not in card


def test_statistics_that_were_not_settled_are_recalibrated(trained, run, monkeypatch):
    save_model(*trained, 3, "", run / "checkpoints" / "last.ckpt")
    asked = []
    monkeypatch.setattr(exporting, "recalibrate_on", lambda *_: asked.append("once") or 5)
    monkeypatch.setattr(verb, "open_data", lambda *_: None)
    export(run)
    assert asked == ["once"]


def test_a_card_tells_nothing_of_other_weights(run):
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps({**result, "weights_sha256": "of others"}))
    assert "Fine-tun" not in export(run)


def test_of_a_fine_tuning_run_the_recommended_mixture_is_exported(trained, run):
    model, recipe = trained
    save_model(model, recipe, 7, "running statistics", run / "checkpoints" / "recommended.ckpt")
    assert "- steps: 7" in export(run)
    assert "- steps: 3" in export(run, checkpoint=str(run / "checkpoints" / "last.ckpt"))


def test_onnx_and_push_are_done_where_asked_and_told(run, monkeypatch, capsys):
    pushed = []
    monkeypatch.setattr(exporting, "export_onnx", lambda folder: 2.5e-7)
    monkeypatch.setattr(exporting, "push", lambda *given: pushed.append(given) or "https://hub.test/me/birds")
    monkeypatch.setenv("HF_TOKEN", "of nobody")
    card = export(run, onnx=True, push_to="me/birds")
    assert "onnx/image.onnx" in card
    assert "base_model" in card
    assert pushed == [(run / "hf", "me/birds", True)]
    out = capsys.readouterr().out
    assert "embeddings differ from transformers' by at most 2.5e-07" in out
    assert "pushed to https://hub.test/me/birds" in out


def test_the_card_is_silent_on_onnx_files_that_failed(run, monkeypatch):
    def fails(folder):
        raise ValueError("they differ")

    monkeypatch.setattr(exporting, "export_onnx", fails)
    with pytest.raises(ValueError, match="they differ"):
        export(run, onnx=True)
    assert "onnx" not in (run / "hf" / "README.md").read_text()


def test_missing_packages_are_told_before_anything_is_written(run, monkeypatch):
    def missing():
        raise ValueError("install them")

    monkeypatch.setattr(exporting, "require_onnx", missing)
    with pytest.raises(ValueError, match="install them"):
        export(run, onnx=True)
    assert not (run / "hf").exists()


def test_the_recipe_says_which_parts_were_tuned(trained):
    model, recipe = trained
    tuned = DictConfig({**recipe, "tuning": {"image": 2, "text": "lora"}})
    settings = exporting.settings_of(model, tuned, 3)
    assert settings["image tower"] == "the last 2 stages trained"
    assert settings["text tower"] == "trained by adapters (LoRA), merged"
    assert "image tower" not in exporting.settings_of(model, recipe, 3)
