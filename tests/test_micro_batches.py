"""Whole runs whose batches are split over ranks and micro-batches: the same curve, resumed to the bit, or refused."""

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_resume import result, rows, run

from align_train.engine import read_checkpoint, recalibration

Overrides = Callable[..., list[str]]


def losses(folder: Path) -> list[float]:
    return [float(row["loss"]) for row in rows(folder) if row["loss"]]


def one_of(number: int, words: list[str], port: int) -> None:
    """One of two ranks."""
    os.environ |= {"LOCAL_RANK": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a machine without a network has no other
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
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = tiny_run("shared", *more, "step.micro_batch=8", "trainer.devices=2")
    torch.multiprocessing.spawn(one_of, (shared, port), nprocs=2)
    folder = Path(next(word for word in shared if word.startswith("folder=")).partition("=")[2])
    assert losses(folder) == pytest.approx(whole, rel=1e-4)
    assert result(folder)["pairs_seen"] == 128


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
        ("step.micro_batch=0", r"step\.micro_batch is 0: give 1 or more"),
        ("step.text_chunks=0", r"step\.text_chunks is 0: give 1 or more"),
        ("loss.negatives=global", r"loss\.negatives is 'global': choose gathered or local"),
        ("loss.label_smoothing=1.0", r"loss\.label_smoothing must be in \[0, 1\), got 1"),
        ("loss.chunk_size=0", r"loss\.chunk_size is 0: give 1 row or more"),
        ("+trainer.accumulate_grad_batches=2", r"only its own negatives: set step\.micro_batch"),
    ],
)
def test_what_does_not_divide_is_refused(tiny_run: Overrides, override: str, message: str) -> None:
    with pytest.raises(Exception, match=message):
        run(tiny_run("run", override))
