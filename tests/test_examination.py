"""Exams in the middle of training: when, on what, what is logged and saved, and that training does not notice."""

import json
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conftest import on_ranks
from test_engine import rows, run, weights

from align_train import signals
from align_train.cli import trainers
from align_train.cli.models import load_model
from align_train.engine import Agreement, Examination, read_checkpoint, recalibration, throughput
from align_train.evaluation import Encoder, Taken
from align_train.models.batch_norm import tracking_layers
from align_train.signals import Wish

Overrides = Callable[..., list[str]]
EXAM = (
    "+exams.drawn={{_target_: align_train.evaluation.Retrieval, "
    "data: {{_target_: align_train.data.testsets.ShardPairs, shards: '{}/*.tar', name: drawn}}}}"
)


@pytest.fixture
def examined(tiny_run: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Overrides:
    """Overrides of a run of 6 steps with an exam on the validation shards."""
    monkeypatch.setattr(recalibration, "BATCHES", 2)
    return lambda name="run", *more: tiny_run(name, EXAM.format(tmp_path / "validation"), *more)


def scores(folder: Path, name: str = "i2t_r5") -> dict[int, float]:
    return {int(row["step"]): float(value) for row in rows(folder) if (value := row.get(f"exam/drawn/{name}"))}


def test_exams_are_taken_every_so_many_steps_and_at_the_end(examined: Overrides) -> None:
    folder = run(examined("run", "examine_every=2", "max_steps=5", "trainer.log_every_n_steps=3"))
    assert list(scores(folder)) == [2, 4, 5]
    steps = [int(row["step"]) for row in rows(folder)]
    assert steps == sorted(set(steps))  # one row a step, in order
    last = run(examined("last", "max_steps=5"))
    assert scores(last) == {5: scores(folder)[5]}
    assert (folder / "contact_sheet_drawn.png").is_file()


def test_training_does_not_notice(examined: Overrides) -> None:
    more = ("model.text.dropout=0.1", "model.vision.stochastic_depth=0.5")
    plain, often = run(examined("plain", *more)), run(examined("often", *more, "examine_every=1"))
    assert list(scores(often)) == [1, 2, 3, 4, 5, 6]
    losses = [[row["loss"] for row in rows(folder)] for folder in (plain, often)]
    assert losses[0] == losses[1]
    first, second = weights(plain), weights(often)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert scores(often)[6] == scores(plain)[6]


@pytest.mark.parametrize(("warm", "told"), [(5.0, "recalibrated on 2 training batches"), (0.0, "running statistics")])
def test_statistics_are_measured_anew_where_they_are_cold_and_put_back(
    examined: Overrides, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, warm: float, told: str
) -> None:
    monkeypatch.setattr(recalibration, "WARM", warm)
    seen = []
    images = Encoder.images

    def noted(self: Encoder, *given: object) -> object:
        assert not torch.is_autocast_enabled("cpu")
        seen.append([layer.running_mean.clone() for layer in tracking_layers(self.model)])
        return images(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(Encoder, "images", noted)
    with caplog.at_level("INFO", "align_train.engine.examination"):
        folder = run(
            examined("run", "examine_every=2", "checkpoint_every=2", "max_steps=3", "trainer.precision=bf16-mixed")
        )
    assert f"step 2, {told}" in caplog.text.replace("statistics recalibrated", "recalibrated")
    checkpoint = read_checkpoint(folder)  # of the end
    assert len(seen) == 2
    held = [value for name, value in checkpoint["state_dict"].items() if name.endswith("running_mean")]
    assert all(torch.equal(a, b) for a, b in zip(seen[1], held, strict=True))


def test_cold_statistics_are_put_back(examined: Overrides) -> None:
    """The checkpoint in the middle has the running statistics, not those of the exam."""
    kept = {}
    for name, every in (("without", "null"), ("with", "2")):
        folder = run(examined(name, "max_steps=3", "checkpoint_every=2", f"examine_every={every}", "validate_every=2"))
        best = weights(folder, "best")  # of step 2
        kept[name] = {key: value for key, value in best.items() if "running" in key or "tracked" in key}
    assert kept["with"]
    assert all(torch.equal(kept["with"][key], value) for key, value in kept["without"].items())


def stopped_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while that step is done."""
    plain = Agreement.on_train_batch_start

    def press(self: Agreement, trainer: L.Trainer, *given: Any) -> None:
        if trainer.global_step == step - 1:
            signals.ask(Wish.INTERRUPT)
        plain(self, trainer, *given)

    monkeypatch.setattr(Agreement, "on_train_batch_start", press)


def killed_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that ends that step is done, and nothing after it."""

    def kill(self: Examination, trainer: L.Trainer, *given: Any) -> None:
        if trainer.global_step == step:
            raise OSError("killed")

    monkeypatch.setattr(Examination, "on_train_batch_start", kill)


def test_a_stop_does_not_wait_for_exams_and_a_resume_makes_up_for_them(
    examined: Overrides, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(examined("whole", "examine_every=2"))
    with monkeypatch.context() as patch:
        stopped_at(4, patch)
        with pytest.raises(SystemExit):
            run(examined("parted", "examine_every=2"))
    folder = Path(next(word for word in examined("parted") if word.startswith("folder=")).partition("=")[2])
    assert list(scores(folder)) == [2]
    run(examined("parted", "examine_every=2", f"resume={folder}"))
    assert scores(folder) == scores(whole)
    assert list(scores(folder)) == [2, 4, 6]


def test_scores_of_a_run_that_is_killed_after_its_checkpoint_are_logged(
    examined: Overrides, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run(examined("run", "examine_every=3", "max_steps=3", "schedule.total_steps=6"))
    state = read_checkpoint(folder)["callbacks"]["Examination"]
    assert state == {"last": 3, "untold": {}}
    with monkeypatch.context() as patch:
        killed_after(3, patch)
        with pytest.raises(OSError, match="killed"):
            run(examined("killed", "examine_every=3", "checkpoint_every=3", "data.validation=null"))
    folder = Path(next(word for word in examined("killed") if word.startswith("folder=")).partition("=")[2])
    assert scores(folder) == {}
    taken = []
    monkeypatch.setattr(Examination, "_take", lambda self, trainer, module: taken.append(trainer.global_step))
    run(examined("killed", "examine_every=3", "data.validation=null", "max_steps=5", f"resume={folder}"))
    assert list(scores(folder)) == [3, 5]
    assert taken == []


@pytest.mark.parametrize("mode", ["max", "min"])
def test_the_best_checkpoint_by_an_exam(examined: Overrides, mode: str) -> None:
    more = ("examine_every=1", "best.by=exam/drawn/t2i_median_rank", f"best.mode={mode}", "data.validation=null")
    folder = run(examined("run", *more, "optimizer.lr=0.02"))
    found = scores(folder, "t2i_median_rank")
    wanted = (max if mode == "max" else min)(found.values())
    best = read_checkpoint(folder / "checkpoints" / "best.ckpt")["global_step"]
    assert best == min(step for step, value in found.items() if value == wanted)
    assert len(set(found.values())) > 1


def scored(monkeypatch: pytest.MonkeyPatch, by_step: dict[int, float]) -> None:
    """Every exam says what the steps are given."""

    def taken(self: Examination, model: object, step: int) -> Taken:
        score = {"value": by_step[step], "low": None, "high": None, "chance": None}
        entry = {"kind": "health", "scores": {"fit": score}, "counts": {}, "dropped": {}, "facts": {}, "measured": {}}
        return Taken({"drawn": {**entry, "seconds": 0.0, "taken": "2026-11-22T00:00:00+00:00"}})

    monkeypatch.setattr(Examination, "taken", taken)


def test_the_last_step_may_be_the_best(examined: Overrides, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though a validation does not follow it, on which Lightning would wait."""
    scored(monkeypatch, {2: 0.1, 4: 0.3})
    folder = run(examined("run", "max_steps=4", "examine_every=2", "validate_every=3", "best.by=exam/drawn/fit"))
    assert read_checkpoint(folder / "checkpoints" / "best.ckpt")["global_step"] == 4


def test_a_resumed_run_knows_the_best_score_of_before(examined: Overrides, monkeypatch: pytest.MonkeyPatch) -> None:
    scored(monkeypatch, {2: 0.9, 4: 0.2})
    more = ("examine_every=2", "checkpoint_every=2", "best.by=exam/drawn/fit", "schedule.total_steps=6")
    with monkeypatch.context() as patch:
        killed_after(2, patch)
        with pytest.raises(OSError, match="killed"):
            run(examined("run", *more))
    folder = Path(examined("run")[2].partition("=")[2])
    before = read_checkpoint(folder)["callbacks"]
    assert [state["best_model_score"] for name, state in before.items() if "exam/drawn" in name] == [torch.tensor(0.9)]
    run(examined("run", *more, "max_steps=4", f"resume={folder}"))
    assert read_checkpoint(folder / "checkpoints" / "best.ckpt")["global_step"] == 2


@pytest.mark.parametrize("stop", [4, 6, 8])
def test_exams_that_a_resume_makes_up_for_count_for_the_best_checkpoint_and_for_the_patience(
    examined: Overrides, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    scored(monkeypatch, {2: 0.5, 4: 0.9, 6: 0.3, 8: 0.2, 10: 0.1})
    lengths = ("max_steps=12", "examine_every=2", "checkpoint_every=2", "data.validation=null")
    words = examined("run", *lengths, "best.by=exam/drawn/fit", "best.patience=2")
    folder = Path(words[2].partition("=")[2])
    with monkeypatch.context() as patch:
        stopped_at(stop, patch)
        with pytest.raises(SystemExit):
            run(words)
    assert read_checkpoint(folder)["global_step"] == stop
    run([*words, f"resume={folder}"])
    assert read_checkpoint(folder / "checkpoints" / "best.ckpt")["global_step"] == 4
    assert json.loads((folder / "result.json").read_text())["steps"] == 8
    assert list(scores(folder, "fit")) == [2, 4, 6, 8]


@pytest.mark.parametrize("step", [4, 6])
def test_a_kill_in_an_exam_loses_neither_rows_nor_the_best_checkpoint(
    examined: Overrides, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Though the checkpoint was saved before it: by time, or after the last step."""
    monkeypatch.setattr(trainers, "Agreement", partial(Agreement, clock=count(0, 600).__next__))
    scored(monkeypatch, {2: 0.1, 4: 0.5, 6: 0.9})
    lengths = ("examine_every=2", "checkpoint_every=100", "data.validation=null")
    words = examined("run", *lengths, "best.by=exam/drawn/fit")
    folder = Path(words[2].partition("=")[2])
    with monkeypatch.context() as patch:
        plain = Examination._take

        def killed(self: Examination, trainer: L.Trainer, module: L.LightningModule) -> None:
            if trainer.global_step == step:
                raise OSError("killed")
            plain(self, trainer, module)

        patch.setattr(Examination, "_take", killed)
        with pytest.raises(OSError, match="killed"):
            run(words)
    assert read_checkpoint(folder / "checkpoints" / "last.ckpt")["global_step"] == step
    run([*words, f"resume={folder}"])
    assert [int(row["step"]) for row in rows(folder)] == [0, 1, 2, 3, 4, 5, 6]
    assert all(row["loss"] for row in rows(folder)[:6])
    assert list(scores(folder, "fit")) == [2, 4, 6]
    assert read_checkpoint(folder / "checkpoints" / "best.ckpt")["global_step"] == 6


def test_data_that_are_not_there_are_told_before_training(examined: Overrides) -> None:
    typo = EXAM.format("typo").replace("+exams.drawn", "+exams.other")
    with pytest.raises(OSError, match="exam other: no shard matches 'typo/"):
        run(examined("run", typo))
    folder = Path(examined("run")[2].partition("=")[2])
    assert not (folder / "checkpoints").exists()


def test_a_run_whose_exams_fail_at_the_end_has_a_result(examined: Overrides, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*given: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(Encoder, "images", gone)
    with pytest.raises(OSError, match="exam drawn: the disk is gone"):
        run(examined("run", "export=true"))
    folder = Path(examined("run")[2].partition("=")[2])
    assert json.loads((folder / "result.json").read_text())["exams"] == {}
    assert (folder / "hf" / "model.safetensors").is_file()


def test_a_checkpoint_says_what_its_statistics_are(examined: Overrides) -> None:
    folder = run(examined("run", "checkpoint_every=3", "max_steps=4"))
    told = "statistics recalibrated on 2 training batches"
    assert read_checkpoint(folder)["statistics"] == load_model(folder).statistics == told
    assert load_model(folder / "checkpoints" / "best.ckpt").statistics is None  # of the middle


def test_recalibration_takes_fewer_large_batches(examined: Overrides, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recalibration, "BATCHES", 50)
    monkeypatch.setattr(recalibration, "IMAGES", 40)
    folder = run(examined("run", "max_steps=3"))  # of 16 pairs
    assert read_checkpoint(folder)["statistics"] == "statistics recalibrated on 3 training batches"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["best.by=null"], "best.by is None and best.mode 'max': give the name of a metric"),
        (["best.mode=most"], "best.mode 'most'"),
        (["best.by=exam/drawn/i2t_r1", "examine_every=100"], "set examine_every to a number of steps up to max_steps"),
        (["best.by=exam/drawn/i2t_r1"], "best.by is exam/drawn/i2t_r1, so set examine_every"),
        (["best.by=exam/other/i2t_r1", "examine_every=2"], "name an exam as exam/NAME/VALUE: there are drawn"),
        (
            ["best.by=exam/drawn/i2t_r3", "examine_every=2"],
            "i2t_r3, which something is to be chosen by .*, is given by no exam: choose one of .*exam/drawn/i2t_r1,",
        ),
        (["examine_every=0"], "examine_every is 0; it must be a whole number"),
        (["encoding.precision=fp4"], "choose float32 or bf16"),
    ],
)
def test_what_cannot_be_is_refused(examined: Overrides, words: list[str], message: str) -> None:
    with pytest.raises(Exception, match=message):  # Hydra wraps what a constructor raises
        run(examined("run", *words))


def test_the_time_of_exams_is_not_trainings(examined: Overrides, monkeypatch: pytest.MonkeyPatch) -> None:
    shift, images = [0.0], Encoder.images
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: time.monotonic() + shift[0])

    def slow(self: Encoder, *given: object) -> object:
        shift[0] += 1000.0
        return images(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(Encoder, "images", slow)
    folder = run(examined("run", "examine_every=2", "max_steps=5"))
    assert shift[0] == 3000.0
    assert json.loads((folder / "result.json").read_text())["training_seconds"] < 1000.0


def one_of(_: int, runs: list[list[str]]) -> None:
    """One of two ranks."""
    recalibration.BATCHES = 2
    for words in runs:
        run(words)


def test_two_ranks_take_the_exams_together(examined: Overrides, tmp_path: Path) -> None:
    more = (
        "examine_every=2", "best.by=exam/drawn/i2t_median_rank", "best.mode=min", "encoding.batch_size=5",
        "max_steps=3", "model.text.dropout=0.0", "data.validation=null",
    )  # fmt: skip
    alone = run(examined("alone", *more))
    trainers = ("default", "sharded")
    shared = [
        examined(name, *more, f"trainer={name}", "trainer.accelerator=cpu", "trainer.devices=2") for name in trainers
    ]
    on_ranks(2, one_of, shared)
    for name in trainers:
        assert list(scores(tmp_path / name)) == [2, 3]
        for score in ("i2t_r5", "t2i_r5", "i2t_median_rank"):
            assert scores(tmp_path / name, score) == scores(alone, score)
        assert (tmp_path / name / "checkpoints" / "best.ckpt").is_file()
