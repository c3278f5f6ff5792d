"""Whole runs whose batches are split over ranks and micro-batches: the same curve, resumed to the bit, or refused."""

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from conftest import on_ranks
from test_resume import result, rows, run

from align_train.engine import Contrastive, module, objective, read_checkpoint, recalibration
from align_train.engine.encoding import encode
from align_train.models import Align
from align_train.models.repairs import StochasticDepth

Overrides = Callable[..., list[str]]


def losses(folder: Path) -> list[float]:
    return [float(row["loss"]) for row in rows(folder) if row["loss"]]


def one_of(_: int, words: list[str]) -> None:
    """One of two ranks."""
    recalibration.BATCHES = 1
    run(words)


def test_ranks_and_micro_batches_have_one_curve(tiny_run: Overrides, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recalibration, "BATCHES", 1)
    more = (
        "max_steps=4", "data.batch_size=32", "data.validation=null", "model.text.dropout=0.0", "loss.chunk_size=3",
        "loss.skip_duplicates=true", "step.text_chunks=3", "trainer.gradient_clip_val=0.5", "schedule.warmup_steps=1",
        "model.vision.stochastic_depth=0.5", "optimizer.lr=0.001",
    )  # fmt: skip
    whole = losses(run(tiny_run("whole", *more)))
    assert len(whole) == 4
    assert whole[-1] < whole[0] - 0.01
    parted = tiny_run("parted", *more, "step.micro_batch=8")
    assert losses(run(parted)) == pytest.approx(whole, rel=1e-4)
    shared = tiny_run("shared", *more, "step.micro_batch=8", "trainer.devices=2")
    on_ranks(2, one_of, shared)
    folder = Path(next(word for word in shared if word.startswith("folder=")).partition("=")[2])
    assert losses(folder) == pytest.approx(whole, rel=1e-4)
    assert result(folder)["pairs_seen"] == 128


def test_what_a_step_draws_is_of_that_step_and_for_it_alone(
    tiny_run: Overrides, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, left = [], []
    monkeypatch.setattr(module, "encode", lambda model, *rest: (seen.append(rest[1]), encode(model, *rest))[1])
    before = recalibration.recalibrate

    def recalibrate(model: Align, batches: Iterable[torch.Tensor]) -> int:
        left.extend(layer.kept for layer in model.modules() if isinstance(layer, StochasticDepth))
        return before(model, batches)

    monkeypatch.setattr(recalibration, "recalibrate", recalibrate)
    run(tiny_run("run", "max_steps=3", "seed=9", "step.micro_batch=8", "model.vision.depth=0.5"))
    assert seen == [[9, 0], [9, 1], [9, 2]]
    assert left
    assert all(kept is None for kept in left)


def test_recalibration_is_on_the_same_images_however_a_batch_is_split(tiny_run: Overrides) -> None:
    more = ("max_steps=1", "model.text.dropout=0.0", "model.vision.stochastic_depth=0.0", "schedule.warmup_steps=1",
            "schedule.total_steps=9", "data.validation=null")  # fmt: skip
    folders = [run(tiny_run(f"run{size}", f"step.micro_batch={size}", *more)) for size in (4, 16)]
    first, second = (read_checkpoint(folder)["state_dict"] for folder in folders)
    statistics = [name for name in first if "running" in name]
    assert statistics
    for name in statistics:
        torch.testing.assert_close(first[name], second[name], atol=1e-4, rtol=1e-3)


def test_chunks_are_of_rows_against_all_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 64 ranks: few rows of its own, and the logits of no more than `chunk_size` of them at once."""
    seen = []
    monkeypatch.setattr(objective, "gather_rows", lambda x: x.repeat(8, 1))
    monkeypatch.setattr(objective, "rank", lambda: 0)
    monkeypatch.setattr(objective, "share_of_loss", lambda *given: seen.append(given[-1]))
    x = torch.ones(4, 2)
    for chunk_size in (3, 4, 31, 32, None):
        Contrastive(chunk_size=chunk_size)(x, x, torch.tensor(1.0), torch.zeros(4, 2))
    assert seen == [3, 4, 31, None, None]


def test_a_resumed_run_with_micro_batches_equals_one_never_stopped(tiny_run: Overrides) -> None:
    more = (
        "data.batch_size=16",
        "step.micro_batch=4",
        "model.text.dropout=0.1",
        "data.workers=1",
        "step.text_chunks=2",
    )
    whole = run(tiny_run("whole", *more))
    parted = tiny_run("parted", *more)
    folder = run([*parted, "max_steps=3", "schedule.total_steps=6"])
    run([*parted, f"resume={folder}"])
    assert losses(folder) == losses(whole)
    first, second = (read_checkpoint(each)["state_dict"] for each in (whole, folder))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_micro_batches_in_bf16(tiny_run: Overrides) -> None:
    folder = run(tiny_run("run", "step.micro_batch=8", "trainer.precision=bf16-mixed"))
    assert len(losses(folder)) == 6
    assert all(value.dtype != torch.bfloat16 for value in read_checkpoint(folder)["state_dict"].values())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("step.micro_batch=6", r"step\.micro_batch is 6; it must divide the 16 pairs.*set step\.micro_batch=4 or .*=8"),
        ("step.micro_batch=0", r"step\.micro_batch is 0: give a whole number of at least 1"),
        ("step.text_chunks=0", r"step\.text_chunks is 0: give a whole number"),
        ("loss.negatives=global", r"loss\.negatives is 'global': choose gathered or local"),
        ("loss.label_smoothing=1.0", r"loss\.label_smoothing must be in \[0, 1\), got 1"),
        ("step.micro_batch=abc", r"step\.micro_batch is 'abc': give a whole number"),
        ("loss.chunk_size=abc", r"loss\.chunk_size is 'abc': give 1 row or more"),
        ("loss.label_smoothing=null", r"loss\.label_smoothing must be in \[0, 1\), got None"),
        ("loss.skip_duplicates=maybe", r"loss\.skip_duplicates is 'maybe': give true or false"),
        ("seed=-1", r"seed is -1; it must be a whole number"),
        ("model.batch_norm.group_size=0", r"model\.batch_norm\.group_size is 0"),
        ("loss.chunk_size=0", r"loss\.chunk_size is 0: give 1 row or more"),
        ("+trainer.accumulate_grad_batches=2", r"only its own negatives: set step\.micro_batch"),
    ],
)
def test_what_does_not_divide_is_refused(tiny_run: Overrides, override: str, message: str) -> None:
    with pytest.raises(Exception, match=message):
        run(tiny_run("run", override))
