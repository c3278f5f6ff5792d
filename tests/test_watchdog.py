"""A rank that stands still names itself, host, step and what it waits for, and ends; one that works is left alone."""

import logging
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from conftest import on_ranks
from lightning.pytorch.callbacks import ModelCheckpoint
from reading import NONE, SMALL, order_of, sources
from torch.multiprocessing import ProcessExitedException

from align_train.batch import Batch, StepBatch
from align_train.data import BatchPlans, Loader, PairReader, Reading, Steps
from align_train.data.storage.cache import Cache
from align_train.engine import watchdog as place
from align_train.engine.watchdog import Part, Watchdog, note

HOST = os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def batches(count: int = 4) -> Iterator[Batch]:
    one = torch.zeros(1, 2, dtype=torch.int64)
    for name in range(count):
        yield Batch(torch.zeros(1, 3, 4, 4), one, one, (str(name),), torch.tensor([2]), one)


class Trained(L.LightningModule):
    """A weight; at step 2 the first rank does what it is given."""

    def __init__(self, at_step_two: Any = None) -> None:
        super().__init__()
        self.weight, self.at_step_two = torch.nn.Parameter(torch.ones(())), at_step_two

    def training_step(self, batch: StepBatch, index: int) -> torch.Tensor:
        if self.at_step_two and self.global_step == 2 and self.global_rank == 0:
            self.at_step_two()
        return self.weight * 1.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Validated(Trained):
    """On two batches, after every second step."""

    def val_dataloader(self) -> Steps:
        return Steps(list(batches(2)))

    def validation_step(self, batch: StepBatch, index: int) -> None:
        pass


def fit(watchdog: Watchdog, module: L.LightningModule, steps: Any = None, **given: Any) -> None:
    callbacks = [watchdog, *given.pop("callbacks", [])]
    trainer = L.Trainer(
        max_steps=4, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=len(callbacks) > 1, num_sanity_val_steps=0, callbacks=callbacks, **given,
    )  # fmt: skip
    trainer.fit(module, steps or Steps(list(batches())))


def standing(loader: Any = None) -> Any:
    """A trainer at step 57."""
    return SimpleNamespace(train_dataloader=loader, global_step=57, callbacks=[])


def running(stall_seconds: float | None) -> Watchdog:
    """One whose first step is over."""
    watchdog = Watchdog(stall_seconds)
    watchdog.on_train_batch_end(standing(), None, None, None, 0)  # type: ignore[arg-type]
    return watchdog


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]


@pytest.mark.parametrize(
    ("part", "times"), [(Part.FORWARD, 1), (Part.BACKWARD, 1), (Part.END, 1), (Part.VALIDATION, 1), (Part.SAVE, 5)]
)
def test_a_part_is_overdue_after_its_time(part: Part, times: int) -> None:
    watchdog, trainer = running(10.0), standing()
    watchdog.note(part)
    assert not watchdog.overdue(trainer, 1000.0)  # which were of the part before
    assert not watchdog.overdue(trainer, 10.0 * times)
    assert watchdog.overdue(trainer, 0.1)
    watchdog.note(part)  # the next batch of a validation
    assert not watchdog.overdue(trainer, 1000.0)


def test_the_first_step_may_take_five_times_as_long() -> None:
    watchdog, trainer = Watchdog(10.0), standing()
    watchdog.note(Part.FORWARD)
    watchdog.overdue(trainer, 0.0)
    assert not watchdog.overdue(trainer, 50.0)
    assert watchdog.overdue(trainer, 0.1)


def test_exams_may_last_for_ever() -> None:
    watchdog, trainer = running(10.0), standing()
    trainer.callbacks.append(watchdog)
    note(trainer, Part.EXAMS)
    watchdog.overdue(trainer, 0.0)
    assert not watchdog.overdue(trainer, 1e9)


def test_waiting_for_data_is_a_part_of_its_own() -> None:
    watchdog, steps = running(10.0), Steps([])
    trainer = standing(steps)
    watchdog.overdue(trainer, 0.0)
    watchdog.overdue(trainer, 9.0)
    steps.asked = 1.0
    assert not watchdog.overdue(trainer, 9.0)
    assert not watchdog.overdue(trainer, 9.0)
    assert watchdog.overdue(trainer, 9.0)
    steps.asked = 2.0
    assert not watchdog.overdue(trainer, 9.0)


def test_a_run_notes_each_part_and_leaves_no_thread_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, threads = [], set()

    def noted(watchdog: Watchdog, part: Part) -> None:
        parts.append(part)
        threads.update(thread for thread in threading.enumerate() if thread.name == "watchdog")

    monkeypatch.setattr(Watchdog, "note", noted)
    save = ModelCheckpoint(tmp_path, every_n_train_steps=3)
    fit(Watchdog(60.0), Validated(), callbacks=[save], val_check_interval=2, check_val_every_n_epoch=None)
    step = [Part.FORWARD, Part.BACKWARD, Part.UPDATE, Part.END]
    validation = [*4 * [Part.VALIDATION], Part.END]
    assert parts == [Part.START, *step, *step, *validation, *step, Part.SAVE, *step, *validation]
    assert len(threads) == 1
    assert not threads.pop().is_alive()


def test_without_a_limit_there_is_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading.Thread, "start", lambda thread: pytest.fail("a thread"))
    fit(Watchdog(None), Trained())


def test_what_fails_is_told_with_host_step_and_part(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise ValueError("no\nand more")

    with pytest.raises(ValueError, match="no"):
        fit(Watchdog(60.0), Trained(fail))
    assert errors(caplog) == [f"the process on {HOST} failed in the forward pass at step 2: ValueError: no"]
    assert all(thread.name != "watchdog" for thread in threading.enumerate())


def test_data_that_fail_are_told_as_such(caplog: pytest.LogCaptureFixture) -> None:
    def failing() -> Iterator[Batch]:
        yield from batches(2)
        raise TimeoutError("no batch for 1 seconds")

    with pytest.raises(TimeoutError):
        fit(Watchdog(60.0), Trained(), Steps(failing()))  # type: ignore[arg-type]
    (told,) = errors(caplog)
    assert "failed waiting for data at step 1: TimeoutError: no batch for 1 seconds" in told  # one is fetched ahead


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[a] Connection closed by peer [::1]:7\nat"), "peer [::1]:7 (another rank is gone: see what it"),
        (RuntimeError("CUDA error: out of luck"), "RuntimeError: CUDA error: out of luck"),
        (OSError("Caught OSError in worker.\nOriginal Traceback (most\n  x\nOSError: gone"), "step 57: OSError: gone"),
        (KeyError(), "step 57: KeyError"),
    ],
)
def test_a_rank_that_fails_names_itself(
    error: Exception, expected: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, "rank", lambda: 1)
    monkeypatch.setattr(place, "world_size", lambda: 4)
    monkeypatch.setenv("SLURMD_NODENAME", "node2")
    watchdog = running(None)
    watchdog.note(Part.BACKWARD)
    watchdog.on_exception(standing(), None, error)  # type: ignore[arg-type]
    (told,) = caplog.messages
    assert told.startswith("rank 1 of 4 on node2 failed in the backward pass at step 57")
    assert expected in told


@pytest.mark.parametrize("asked", [KeyboardInterrupt(), SystemExit(75)])
def test_a_run_that_was_asked_to_end_has_not_failed(asked: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    running(None).on_exception(standing(), None, asked)  # type: ignore[arg-type]
    assert caplog.messages == []


def test_a_part_that_goes_on_after_all_is_not_ended(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "_exit", lambda status: pytest.fail("ended"))
    told, noted, over = threading.Event(), threading.Event(), threading.Event()
    emit, look, found = caplog.handler.emit, Watchdog.overdue, [False]

    def overdue(watchdog: Watchdog, trainer: L.Trainer, seconds: float) -> bool:
        """The grace lasts until the part is noted, and no time goes by after that, however busy the machine is."""
        if found[-1]:
            noted.wait(30)
        found.append(look(watchdog, trainer, 0.0 if noted.is_set() else seconds))
        return found[-1]

    def heard(record: logging.LogRecord) -> None:
        emit(record)
        (told if record.levelno == logging.ERROR else over).set()

    monkeypatch.setattr(caplog.handler, "emit", heard)
    monkeypatch.setattr(Watchdog, "overdue", overdue)
    watchdog = Watchdog(0.2)
    watchdog.on_fit_start(standing(), None)  # type: ignore[arg-type]
    assert told.wait(30)
    watchdog.note(Part.FORWARD)
    noted.set()
    assert over.wait(30)
    watchdog.teardown(standing(), None, "fit")  # type: ignore[arg-type]
    first, second = caplog.messages
    assert first.startswith(f"the process on {HOST} has been getting ready to train at step 57 for 1 s")
    assert "recovery.stall_minutes" in first
    assert " in wait\n" in first  # where the main thread is
    assert second == f"the process on {HOST} goes on after all"


def ended(ranks: int, work: Any, *given: Any) -> int:
    """Status of the first rank that ended."""
    with pytest.raises(ProcessExitedException) as end:
        on_ranks(ranks, work, *given)
    return end.value.exit_code


def to_file(folder: Path) -> None:
    logging.basicConfig(filename=folder / "log", force=True, level=logging.WARNING)


def read_a_pipe(number: int, folder: Path) -> None:
    """Train on a shard that becomes a pipe without a writer, before its first pair is read."""
    to_file(folder)
    read, tar = sources(pairs=folder / "shards"), folder / "shards" / "00000.tar"
    plans = BatchPlans(order_of(read), 4, 0, 4)
    planned = list(plans)
    BatchPlans.__iter__ = lambda plans: iter(planned)  # type: ignore[method-assign]
    tar.unlink()
    os.mkfifo(tar)
    loader = Loader(PairReader(read, SMALL, NONE), plans, 0, Reading(stall_seconds=60.0, cache=Cache("unused")))
    fit(Watchdog(0.2), Trained(), Steps(loader))


def test_a_shard_that_does_not_answer_is_named(make_shards: Any, tmp_path: Path) -> None:
    make_shards(16)
    assert ended(1, read_a_pipe, tmp_path) == 1
    (told,) = [line for line in (tmp_path / "log").read_text().splitlines() if "has been" in line]
    assert f"the process on {HOST} has been waiting for data at step 0 for 1 s" in told
    assert ": no answer from " in told
    assert "00000.tar. It ends in 0.2 s" in told
    assert "in _fetched" in (tmp_path / "log").read_text()


def stand_still(number: int, folder: Path) -> None:
    to_file(folder)
    fit(Watchdog(1.0), Trained(threading.Event().wait), devices=2, strategy="ddp")


def test_ranks_name_themselves_when_one_stands_still(tmp_path: Path) -> None:
    assert ended(2, stand_still, tmp_path) == 1
    told = (tmp_path / "log").read_text()
    assert f"rank 0 of 2 on {HOST} has been in the forward pass at step 2 for 1 s" in told
    assert f"rank 1 of 2 on {HOST} has been in the backward pass at step 2 for 1 s" in told
    assert "where gradients are exchanged: this rank stands still, or waits for one that does" in told


class Stuck(logging.Handler):
    """A log on a disk that has gone."""

    def emit(self, record: logging.LogRecord) -> None:
        threading.Event().wait()


def log_nowhere(number: int) -> None:
    logging.getLogger().addHandler(Stuck())
    Watchdog(0.1).on_fit_start(standing(), None)  # type: ignore[arg-type]
    threading.Event().wait()


def test_a_log_that_does_not_answer_holds_up_nothing() -> None:
    assert ended(1, log_nowhere) == 1
