"""The image tower as a classifier: two stages, a head that starts from names, its exam, export and resumption."""

import io
import json
import re
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AlignModel, AlignProcessor

from align_train import signals
from align_train.cli.export import export
from align_train.cli.finetune import finetune
from align_train.cli.models import build_model, load_model, save_model
from align_train.data import AlignInputs
from align_train.data.testsets import LabelledShards
from align_train.engine import Agreement, read_checkpoint
from align_train.engine.recalibration import RUNNING
from align_train.evaluation import Encoder, HeadAccuracy
from align_train.models import recalibrate
from align_train.models.class_head import ClassHead
from align_train.optim import two_cosines
from align_train.shipped import config_folder
from align_train.signals import Wish

COLOURS = {"blue_sky": (40, 60, 220), "green_grass": (40, 200, 60), "red": (220, 50, 40)}
HEAD_STEPS, STEPS = 4, 8
LITTLE = (
    "model=align_tiny", "model.vision.width=0.1", "model.vision.depth=0.1", "model.projection_dim=32",
    "model.text.layers=1", "model.text.width=32", "model.text.heads=2", "model.preprocessing.resize=34",
    "model.preprocessing.crop=33", "model.preprocessing.max_tokens=16", "folder=x",
)  # fmt: skip


def drawn(colour: tuple[int, int, int], seed: int, noise: float = 10.0) -> Image.Image:
    pixels = np.random.default_rng(seed).normal(colour, noise, (34, 34, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy model whose batch norm knows the colours, and a folder of them beside it."""
    folder = tmp_path_factory.mktemp("start")
    for number, (name, colour) in enumerate(COLOURS.items()):
        (folder / "pets" / name).mkdir(parents=True)
        for seed in range(16):
            (folder / "pets" / name / f"{seed}.png").write_bytes(encoded(drawn(colour, 100 * number + seed)))
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        recipe = compose("train", list(LITTLE))
    torch.manual_seed(0)
    model = build_model(recipe.model)
    pixels = [torch.tensor(np.array(drawn(c, s, 60.0))[:33, :33]) for c in COLOURS.values() for s in range(8)]
    recalibrate(model, [torch.stack(pixels).permute(0, 3, 1, 2)])
    save_model(model, recipe, 0, RUNNING, folder / "start.ckpt")
    return folder


def run(start: Path, folder: Path, *more: str) -> Path:
    words = [
        "recipe=classification", f"start.model={start / 'start.ckpt'}", f"pairs.path={start / 'pets'}",
        f"folder={folder}", f"hydra.run.dir={folder}", "exams=[own_classes,own_classifier]",
        "exams.own.templates=plain",
        "check.validation_share=0.3", f"max_steps={STEPS}", f"training.head_steps={HEAD_STEPS}", "examine_every=4",
        "checkpoint_every=4", "data.batch_size=24", "data.workers=0", "optimizer=adamw", "optimizer.lr=0.01",
        "loss.label_smoothing=0.0", "report=false", "trainer.accelerator=cpu", "trainer.log_every_n_steps=1",
        "forgetting.alphas=[0,0.5,1]", *more,
    ]  # fmt: skip
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        finetune(compose("finetune", words))
    return folder


@dataclass(frozen=True)
class Whole:
    """A run without a stop, what it wrote into result.json, and its weights after each step."""

    folder: Path
    result: dict[str, Any]
    after: dict[int, dict[str, Tensor]]

    @property
    def start(self) -> dict[str, float]:
        scores: dict[str, float] = self.result["finetuning"]["points"][0]["scores"]
        return scores


@pytest.fixture(scope="module")
def whole(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    after, plain = dict[int, dict[str, Tensor]](), Agreement.on_train_batch_end

    def noted(self: Agreement, trainer: Any, module: Any, *given: Any) -> None:
        after[trainer.global_step] = {name: value.clone() for name, value in module.state_dict().items()}
        plain(self, trainer, module, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Agreement, "on_train_batch_end", noted)
        folder = run(start, tmp_path_factory.mktemp("runs") / "whole")
    return Whole(folder, json.loads((folder / "result.json").read_text()), after)


def test_the_classifier_names_more_images_right_than_the_names_of_the_classes_did(whole: Whole) -> None:
    exam = whole.result["exams"]["classifier"]
    assert exam["scores"]["top1"]["value"] >= 0.9 > whole.start["exam/classifier/top1"]
    assert (exam["kind"], exam["counts"]["classes"], set(exam["scores"])) == (
        "classifier",
        3,
        {"top1", "mean_per_class"},
    )
    assert whole.result["export"]["classes"] == 3


def test_before_the_first_step_the_head_is_zero_shot_classification(whole: Whole) -> None:
    assert whole.start["exam/own/top1"] == whole.start["exam/classifier/top1"]
    assert "own" in whole.result["exams"]


def test_the_first_stage_moves_the_head_alone(start: Path, whole: Whole) -> None:
    begin, after = read_checkpoint(start / "start.ckpt")["state_dict"], whole.after
    assert all(torch.equal(after[HEAD_STEPS][name], value) for name, value in begin.items())
    for step in range(2, STEPS + 1):
        assert not torch.equal(after[step]["head.weight"], after[step - 1]["head.weight"])
    moved = {name for name, value in begin.items() if not torch.equal(after[HEAD_STEPS + 1][name], value)}
    assert any("vision_model" in name for name in moved)
    assert not any("text" in name or "temperature" in name or "running" in name for name in moved)


def test_a_resumed_run_is_the_run_that_was_not_stopped(
    start: Path, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Agreement.on_train_batch_start

    def stop(self: Agreement, trainer: Any, *given: Any) -> None:
        if trainer.global_step == HEAD_STEPS:
            signals.ask(Wish.INTERRUPT)
        plain(self, trainer, *given)

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Agreement, "on_train_batch_start", stop)
        with pytest.raises(SystemExit):
            run(start, folder)
    run(start, folder, f"resume={folder}")
    end = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert end.keys() == whole.after[STEPS].keys()
    assert all(torch.equal(value, whole.after[STEPS][name]) for name, value in end.items())
    heads = [ClassHead.read(each / "hf").state_dict() for each in (folder, whole.folder)]
    assert all(torch.equal(value, heads[1][name]) for name, value in heads[0].items())


def test_the_export_alone_gives_the_same_logits_and_the_same_accuracy(whole: Whole) -> None:
    folder, images = whole.folder / "hf", [drawn(colour, 7) for colour in COLOURS.values()]
    model, processor = AlignModel.from_pretrained(folder), AlignProcessor.from_pretrained(folder)
    head, classes = load_file(folder / "classifier.safetensors"), json.loads((folder / "classes.json").read_text())
    features = model.get_image_features(**processor(images=images, return_tensors="pt")).pooler_output
    logits = torch.nn.functional.normalize(features) @ head["weight"].T + head["bias"]
    ours = load_model(whole.folder / "checkpoints" / "recommended.ckpt").model.eval()
    pixels = torch.stack([torch.tensor(np.array(image))[:33, :33] for image in images]).permute(0, 3, 1, 2)
    expected = ClassHead.read(folder)(ours.encode_image(pixels))
    assert (classes, logits.argmax(1).tolist()) == (sorted(COLOURS), [0, 1, 2])
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    data = LabelledShards(f"{whole.folder}/pairs/validation/*.tar", label="json.label")
    encoder = Encoder(ours, AlignInputs(ours.preprocessing), torch.device("cpu"))
    again = HeadAccuracy(data, head=str(folder)).take(encoder).score.values
    assert again["top1"].value == whole.result["exams"]["classifier"]["scores"]["top1"]["value"]


def test_the_lines_of_the_card_run_as_they_stand(
    whole: Whole, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = (whole.folder / "hf" / "README.md").read_text()
    (tmp_path / "image.png").write_bytes(encoded(drawn(COLOURS["red"], 9)))
    code = re.findall(r"```python\n(.*?)```", card.partition("## Classifier")[2], re.DOTALL)[0]
    with chdir(tmp_path):
        exec(code.replace("path/to/this/folder", str(whole.folder / "hf")), {})
    assert capsys.readouterr().out.startswith("red ")


def test_a_second_export_of_the_run_has_the_classifier_and_the_card_of_the_first(whole: Whole, tmp_path: Path) -> None:
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        export(compose("export", [f"checkpoint={whole.folder}", f"folder={tmp_path / 'again'}"]))
    first, again = whole.folder / "hf", tmp_path / "again"
    assert {each.name for each in first.iterdir()} == {each.name for each in again.iterdir()}
    for name in ("README.md", "classes.json", "classifier.safetensors", "model.safetensors"):
        assert (again / name).read_bytes() == (first / name).read_bytes()
    last = load_model(whole.folder / "checkpoints" / "last.ckpt").head
    assert last is not None
    assert torch.equal(last.weight, whole.after[STEPS]["head.weight"])


def test_the_first_stage_is_not_judged(start: Path, tmp_path: Path) -> None:
    still = ["best.patience=1", "optimizer.lr=0.0", "examine_every=1", "max_steps=12", "export=false"]
    folder = run(start, tmp_path / "run", *still)
    assert json.loads((folder / "result.json").read_text())["steps"] == HEAD_STEPS + 1


def test_each_stage_has_its_own_cosine() -> None:
    factor = two_cosines(2, 30, 10, 10.0)
    assert [factor(step) for step in (0, 2, 6, 10, 12, 30)] == pytest.approx([0, 10, 5, 0, 1, 0])
    with pytest.raises(ValueError, match=r"change training\.head_steps"):
        two_cosines(0, 10, 10, 10.0)


@pytest.mark.parametrize(
    ("labels", "told"),
    [(["red", ""], "12 of 24 images have a class, and there are 1 classes"), (["red", "red"], "there are 1 classes")],
)
def test_pairs_without_classes_are_refused_before_training(
    start: Path, tmp_path: Path, labels: list[str], told: str
) -> None:
    lines = ["path,caption,label"]
    for number in range(24):
        name = list(COLOURS)[number % 2]
        lines.append(f"{start}/pets/{name}/{number // 2}.png,drawing {number},{labels[number % 2]}")
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=told):
        run(start, tmp_path / "run", f"pairs.path={tmp_path / 'pairs.csv'}", "data.batch_size=8")


def test_a_head_of_other_classes_is_refused(tmp_path: Path) -> None:
    ClassHead(["a", "b"], 3).write(tmp_path)
    assert ClassHead.read(tmp_path).classes == ("a", "b")
    (tmp_path / "classes.json").write_text('["a"]')
    with pytest.raises(ValueError, match=r"of 2 classes, classes\.json beside it names 1"):
        ClassHead.read(tmp_path)
    with pytest.raises(FileNotFoundError, match="recipe=classification"):
        ClassHead.read(tmp_path / "none")
