"""Fine-tuning from a file of pairs to a verified export: what it starts from, does by itself, and chooses."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conftest import drawn_image, drawn_pair
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from safetensors.torch import load_file
from test_agreement import at_step
from test_auto import Killed, killed
from test_parts import bert, efficientnet
from transformers import AlignModel

from align_train.cli.evaluate import evaluate
from align_train.cli.finetune import finetune
from align_train.cli.models import load_model
from align_train.cli.train import train
from align_train.corpus.shards import write_shards
from align_train.data import (
    Augmentation,
    Cache,
    Loader,
    Opener,
    Order,
    OrderSettings,
    PairReader,
    Reading,
    read_sources,
)
from align_train.data.batches import BatchPlans
from align_train.data.tokens import load_tokenizer
from align_train.engine import StopOnPlateau, read_checkpoint
from align_train.hub import export_hf, weights_digest
from align_train.models import has_lora
from align_train.records import Pair, Preprocessing
from align_train.shipped import config_folder

IMAGES = 48


def composed(verb: str, words: list[str]) -> DictConfig:
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return compose(verb, words)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A csv of 48 images with two captions each, shards of other pairs to guard, and a short run on these."""
    home = tmp_path_factory.mktemp("finetune")
    with (home / "birds.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["photo", "caption"])
        for number in range(IMAGES):
            (home / f"{number}.jpg").write_bytes(drawn_image(1000 + number))
            table.writerow([f"{number}.jpg", f"bird number {number}"])
            table.writerow([f"{number}.jpg", f"{number} is what this bird is"])
    write_shards((drawn_pair(number) for number in range(32)), home / "guard", "", 16)
    folder = home / "start"
    train(
        composed(
            "train",
            [
                "experiment=tiny",
                "data=shards",
                f"folder={folder}",
                "max_steps=6",
                "schedule.warmup_steps=1",
                f"data.train.pairs.shards={home}/guard/*.tar",
                "data.batch_size=16",
                "data.workers=0",
                "export=false",
                "report=false",
                "trainer.accelerator=cpu",
                "checkpoint_every=6",
            ],
        )
    )
    return home


def words(home: Path, folder: Path, *more: str) -> list[str]:
    """Overrides of a run of four steps on the csv, with exams on its validation images and on the guard's shards."""
    guard = (
        "exams.guard={_target_: align_train.evaluation.Retrieval, data: {_target_: "
        f"align_train.data.testsets.ShardPairs, shards: '{home}/guard/*.tar', name: guard}}}}"
    )
    given = [
        f"pairs.path={home}/birds.csv", f"start.model={home}/start", f"folder={folder}", "max_steps=4",
        "schedule.warmup_steps=1", "examine_every=2", "checkpoint_every=2", "data.batch_size=16", "data.workers=0",
        "trainer.accelerator=cpu", "trainer.log_every_n_steps=1", "forgetting.alphas=[0,0.5,1]", "optimizer.lr=0.001",
        "export=false", "report=false", "check.validation_share=0.2", "exams=[own_pairs]", f"+{guard}",
    ]  # fmt: skip
    return list({word.partition("=")[0]: word for word in [*given, *more]}.values())


def run(home: Path, folder: Path, *more: str) -> Path:
    finetune(composed("finetune", words(home, folder, *more)))
    return folder


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def done(home: Path) -> Path:
    """A run with everything that comes at its end."""
    return run(home, home / "done", "export=true", "report=true")


def test_one_command_ends_in_an_export_that_plain_transformers_loads(done: Path) -> None:
    found, model = result(done), load_model(done).model
    assert found["weights_sha256"] == weights_digest(model) == weights_digest(AlignModel.from_pretrained(done / "hf"))
    assert found["export"]["largest_difference"] < 1e-5
    assert "birds" not in (done / "hf" / "README.md").read_text()  # nobody's paths are published
    for name in ("report.html", "pairs/report.md", "start.safetensors", "checkpoints/recommended.ckpt"):
        assert (done / name).is_file()


def test_the_story_is_told(done: Path, home: Path) -> None:
    story = result(done)["finetuning"]
    start = load_model(home / "start").model
    assert story["start_weights_sha256"] == weights_digest(start)
    assert story["pairs"]["images"] == IMAGES
    assert story["pairs"]["captions"] == 2 * IMAGES
    assert [point["alpha"] for point in story["points"]] == [0, 0.5, 1]
    assert story["exported"] == story["recommended"] in (0, 0.5, 1)
    assert story["because"]


def test_before_is_the_start_and_the_recommended_scores_are_those_of_its_evaluation(
    done: Path, home: Path, tmp_path: Path
) -> None:
    found = result(done)
    exam = [word.replace("${folder}", str(done)) for word in words(home, tmp_path) if word.startswith("+exams")]
    for checkpoint, alpha in ((done, found["finetuning"]["exported"]), (home / "start", 0)):
        folder = tmp_path / Path(checkpoint).name
        evaluate(composed("evaluate", [f"checkpoint={checkpoint}", f"folder={folder}", "exams=[none]", *exam]))
        taken = result(folder)["exams"]["guard"]["scores"]
        point = next(point for point in found["finetuning"]["points"] if point["alpha"] == alpha)
        for name in ("i2t_r1", "t2i_r1"):
            assert taken[name]["value"] == pytest.approx(point["scores"][f"exam/guard/{name}"])


def test_exams_are_taken_before_during_and_after(done: Path) -> None:
    with (done / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row.get("exam/own/i2t_r1")]
    assert steps == [0, 2, 4]


def test_the_last_step_is_examined_too_and_may_be_the_best(home: Path, tmp_path: Path) -> None:
    folder = run(home, tmp_path / "run", "examine_every=3", "best.by=exam/own/t2i_median_rank", "best.mode=min")
    with (folder / "metrics.csv").open() as file:
        found = {
            int(row["step"]): float(value) for row in csv.DictReader(file) if (value := row["exam/own/t2i_median_rank"])
        }
    assert list(found) == [0, 3, 4]
    best = read_checkpoint(folder / "checkpoints" / "best.ckpt")["global_step"]
    assert best == (4 if found[4] < found[3] else 3)


@pytest.mark.parametrize("alpha", [0, 1])
def test_an_alpha_that_is_asked_for_is_exported(home: Path, tmp_path: Path, alpha: int) -> None:
    folder = run(home, tmp_path / "run", f"alpha={alpha}", "forgetting.alphas=[0,1]")
    assert result(folder)["finetuning"]["exported"] == alpha
    ends = {0: weights_digest(load_model(home / "start").model)}
    best = folder / "checkpoints" / "best.ckpt"
    ends[1] = weights_digest(load_model(best).model)
    assert result(folder)["weights_sha256"] == ends[alpha]


def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    home: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied, folder = (
        Path(shutil.copytree(home, tmp_path / "home", ignore=shutil.ignore_patterns("done"))),
        tmp_path / "run",
    )
    end = StopOnPlateau.on_train_batch_end

    def stop(self: object, trainer: L.Trainer, *rest: object) -> None:
        if trainer.global_step == 3:
            raise KeyboardInterrupt
        end(self, trainer, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(StopOnPlateau, "on_train_batch_end", stop)
        with pytest.raises(KeyboardInterrupt):
            run(copied, folder, "best.patience=9")
    assert read_checkpoint(folder)["global_step"] == 2
    with pytest.raises(ValueError, match="holds a run already: go on with resume="):
        run(copied, folder)
    with pytest.raises(ValueError, match="leave out what changes pairs, or begin another run"):
        run(copied, folder, f"resume={folder}", f"pairs.path={copied}/other.csv")
    shutil.rmtree(copied / "start")  # neither is needed any more
    (copied / "birds.csv").unlink()
    run(copied, folder, "best.patience=9", f"resume={folder}")
    whole, resumed = (read_checkpoint(each / "checkpoints" / "last.ckpt")["state_dict"] for each in (done, folder))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert result(folder)["finetuning"]["points"] == result(done)["finetuning"]["points"]


def test_one_command_begins_and_goes_on(
    home: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    for step in (1, 3):  # before the first checkpoint, and after it
        with monkeypatch.context() as patch:
            at_step(step, killed, patch)
            with pytest.raises(Killed):
                run(home, folder, "resume=auto")
        if step == 1:
            with pytest.raises(ValueError, match=r"with the same settings .*resume=auto goes on"):
                run(home, folder, "resume=auto", "check.validation_share=0.3")
    run(home, folder, "resume=auto")
    whole, parted = (read_checkpoint(each / "checkpoints" / "last.ckpt")["state_dict"] for each in (done, folder))
    assert all(torch.equal(whole[name], parted[name]) for name in whole)
    assert result(folder)["finetuning"]["points"] == result(done)["finetuning"]["points"]


def test_a_run_that_ended_in_the_sweep_is_finished_by_a_resume(
    home: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*given: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("align_train.cli.mixing.sweep", killed)
        with pytest.raises(KeyboardInterrupt):
            run(home, tmp_path / "run", "best.patience=1", "optimizer.lr=0.0", "max_steps=9", "examine_every=1")
    assert not (tmp_path / "run" / "result.json").exists()
    other = ["+exams.guard.ks=[2]", "forgetting.guard=[exam/guard/i2t_r2]"]  # the start was not examined so
    ended = [f"resume={tmp_path / 'run'}", "best.patience=1", "max_steps=9", "examine_every=1"]
    folder = run(home, tmp_path / "run", *ended, *other)
    assert result(folder)["steps"] == 2  # where it had stopped
    first = result(folder)["finetuning"]["points"][0]
    assert first["alpha"] == 0
    assert first["guard"] == first["scores"]["exam/guard/i2t_r2"]


def test_an_evaluation_of_another_checkpoint_leaves_the_result_of_the_run(
    home: Path, done: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(done, tmp_path / "run"))
    last = folder / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    checkpoint["state_dict"]["model.temperature"] *= 2  # no mixture has it
    torch.save(checkpoint, last)
    exam = [word.replace("${folder}", str(done)) for word in words(home, done) if word.startswith("+exams")]
    evaluate(composed("evaluate", [f"checkpoint={last}", "exams=[none]", *exam]))
    assert result(folder) == result(done)
    assert (folder / "evaluate" / "last" / "result.json").is_file()


def test_a_start_whose_statistics_are_of_a_few_steps_is_refused(home: Path, tmp_path: Path) -> None:
    early = torch.load(home / "start" / "checkpoints" / "last.ckpt", weights_only=True) | {"statistics": ""}
    torch.save(early, tmp_path / "early.ckpt")
    with pytest.raises(ValueError, match=r"is of step 6 of a run, too early for its batch-norm statistics"):
        run(home, tmp_path / "run", f"start.model={tmp_path / 'early.ckpt'}")


def test_pairs_of_a_run_that_was_stopped_early_are_no_other_run_s(home: Path, done: Path, tmp_path: Path) -> None:
    shutil.copytree(done / "pairs", tmp_path / "run" / "pairs")
    with pytest.raises(ValueError, match="is there already, of a run that was stopped before its first checkpoint"):
        run(home, tmp_path / "run")


def test_a_folder_of_transformers_is_a_start_and_is_needed_no_more_afterwards(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = tmp_path / "hf"
    export_hf(load_model(home / "start").model, exported)
    monkeypatch.setattr("align_train.cli.exporting.export_onnx", lambda folder: 2e-7)
    folder = run(home, tmp_path / "run", f"start.model={exported}", "export=true", "onnx=true")
    assert result(folder)["export"]["largest_onnx_difference"] == 2e-7
    (exported / "config.json").unlink()
    loaded = load_model(folder)
    assert loaded.steps == 4
    assert load_file(folder / "start.safetensors").keys() == loaded.model.state_dict().keys()


def test_small_batches_freeze_the_statistics_and_large_ones_are_embedded_in_parts(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(home, tmp_path / "run", "step.micro_batch=8", "batch_norm.frozen_below=16")
    told = capsys.readouterr().out
    assert "statistics frozen, for a device takes 8 images at once" in told
    assert "a batch of 16 pairs is embedded in parts of 8" in told
    start, end = load_file(folder / "start.safetensors"), read_checkpoint(folder / "checkpoints" / "last.ckpt")
    held = [name for name in start if name.endswith("running_mean")]
    assert all(torch.equal(start[name], end["state_dict"][f"model.{name}"]) for name in held)
    run(
        home,
        tmp_path / "other",
        "batch_norm.frozen_below=16",
        "max_steps=1",
        "schedule.warmup_steps=0",
        "examine_every=1",
    )
    assert "batch norm: virtual statistics, as the start was trained" in capsys.readouterr().out


def test_adapters_are_trained_and_merged(home: Path, tmp_path: Path) -> None:
    folder = run(home, tmp_path / "run", "tuning=lora", "export=true")
    kept = read_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"]
    assert any("lora_" in name for name in kept)
    model = load_model(folder).model
    assert not has_lora(model)
    assert result(folder)["weights_sha256"] == weights_digest(AlignModel.from_pretrained(folder / "hf"))


def test_a_locked_tower_stays_as_it_was(home: Path, tmp_path: Path) -> None:
    folder = run(home, tmp_path / "run", "tuning=locked_image")
    start, end = load_file(folder / "start.safetensors"), read_checkpoint(folder / "checkpoints" / "last.ckpt")
    same = {name: torch.equal(start[name], end["state_dict"][f"model.{name}"]) for name in start}
    assert all(equal for name, equal in same.items() if name.startswith("vision_model."))
    assert not all(equal for name, equal in same.items() if name.startswith("text_model."))


def test_scores_that_grow_no_better_end_the_run(home: Path, tmp_path: Path) -> None:
    folder = run(home, tmp_path / "run", "max_steps=40", "examine_every=1", "best.patience=2", "optimizer.lr=0.0")
    assert result(folder)["steps"] == 3


def test_what_is_new_is_learned_and_what_is_guarded_is_lost_within_the_bound(tmp_path: Path) -> None:
    """In little what recipe=sample_concepts does: pictures and names never seen, tested on other files of them."""
    write_shards((drawn_pair(number) for number in range(32)), tmp_path / "guard", "", 16)
    for name, format in (("new", "JPEG"), ("other", "PNG")):
        pairs = (Pair(str(n), drawn_image(n, format=format), drawn_pair(n).caption, {}) for n in range(500, 540))
        write_shards(pairs, tmp_path / name, "", 16)
    same = ["data.workers=0", "export=false", "report=false", "trainer.accelerator=cpu", "data.augmentation.flip=0"]
    start = [
        "experiment=tiny", "data=shards", f"folder={tmp_path}/start", f"data.train.pairs.shards={tmp_path}/guard/*.tar",
        "max_steps=150", "data.batch_size=32", "optimizer.lr=0.003", "model.preprocessing.resize=32",
        "model.temperature.start=0.07", "model.text.dropout=0", "model.vision.stochastic_depth=0",
    ]  # fmt: skip
    train(composed("train", [*start, *same]))
    more = [
        f"pairs.path={tmp_path}/new", f"pairs.validation={tmp_path}/other", "max_steps=60", "examine_every=60",
        "optimizer.lr=0.002", "data.batch_size=32", "forgetting.most_loss=0.1", "forgetting.alphas=[0,0.2,0.4,0.6,1]",
    ]  # fmt: skip
    story = result(run(tmp_path, tmp_path / "run", *more, *same))["finetuning"]
    points = {point["alpha"]: point for point in story["points"]}
    before, chosen, end = points[0], points[story["recommended"]], points[1]
    assert end["new"] > before["new"] + 0.4
    assert end["guard"] < before["guard"] - 0.1  # or nothing would have to be kept
    assert chosen["new"] > before["new"] + 0.1
    assert chosen["guard"] >= before["guard"] - 0.1


def test_two_towers_that_never_met_are_a_start(home: Path, tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path / "bert")
    load_tokenizer().save_pretrained(tmp_path / "bert")
    efficientnet().save_pretrained(tmp_path / "eff")
    parts = [f"start.image={tmp_path}/eff", f"start.text={tmp_path}/bert"]
    rare = [
        "batch_norm.statistics=batch",
        "tuning.image=2",
        "optimizer.layer_decay=0.8",
        "gradient_checkpointing=true",
        "trainer.precision=bf16-mixed",
    ]
    folder = run(home, tmp_path / "run", "start.model=null", *parts, *rare, "export=true")
    assert "a local model, `eff` and a local model, `bert`" in (folder / "hf" / "README.md").read_text()
    assert str(tmp_path) not in (folder / "hf" / "README.md").read_text()
    start, end = load_file(folder / "start.safetensors"), read_checkpoint(folder / "checkpoints" / "last.ckpt")
    same = [name for name in start if torch.equal(start[name], end["state_dict"][f"model.{name}"])]
    assert "vision_model.embeddings.convolution.weight" in same
    assert "text_projection.weight" not in same


def test_no_image_comes_twice_in_a_batch_and_each_of_its_captions_comes(tmp_path: Path) -> None:
    captions = {n: [f"caption {n} {k}" for k in range(3)] for n in range(20)}
    pairs = (drawn_pair(n) for n in captions)
    lines = (type(pair)(pair.key, pair.image, "\n".join(captions[n]), {}) for n, pair in enumerate(pairs))
    write_shards(lines, tmp_path / "shards", "", 8)
    sources = read_sources(
        {"own": {"shards": f"{tmp_path}/shards/*.tar", "by_line": True, "clean_captions": False}}, Cache()
    )
    small = Preprocessing(resize=16, crop=16, max_tokens=16)
    reader = PairReader(sources, small, Augmentation())
    order = Order(sources, OrderSettings(epoch_end="drop"), Opener(sources))
    batches = list(Loader(reader, BatchPlans(order, 8, 0, 30), 0, Reading()))
    assert all(len(set(batch.keys)) == 8 for batch in batches)
    rows = [(batch.input_ids[n], batch.lengths[n]) for batch in batches for n in range(len(batch))]
    seen = {tuple(ids[:length].tolist()) for ids, length in rows}
    assert len(seen) == 60


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["data.batch_size=64"],
            r"batch_size is 64, but there are \d+ images to train on.*set data\.batch_size=",
        ),
        (["alpha=2"], "alpha is 2: give a share"),
        (["start.model=null"], r"start\.model is None, start\.image None and start\.text None: name a whole model"),
        (["start.image=a"], "name a whole model, or with start.model=null both an image and a text tower"),
        (["start.model=nowhere"], "nowhere is neither a folder with a model nor a repository"),
        (["forgetting.guard=[exam/other/i2t_r1]"], r"forgetting\.guard=exam/other/i2t_r1, but no exam has that name"),
        (["pairs.path=gone.csv"], "gone.csv"),
        (["check.validation_share=0"], r"no image is held out, but the exam own is taken on such"),
        (["best.patience=0"], r"best\.patience is 0"),
        (["forgetting.new=[exam/own/i2t_r2]"], r"exam/own/i2t_r2, which something is to be chosen by"),
    ],
)
def test_what_cannot_work_is_told_before_training(home: Path, tmp_path: Path, more: list[str], message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        run(home, tmp_path / "run", *more)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_one_pair_is_too_few(home: Path, tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text(f"image,caption\n{home}/0.jpg,one bird\n")
    with pytest.raises(ValueError, match="at least two"):
        run(home, tmp_path / "run", f"pairs.path={tmp_path}/one.csv")
