"""A rank that stands still says who and where it is, and ends; one that fails says so too."""

import logging
import math
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from enum import Enum
from typing import Any

import lightning as L
from torch import Tensor
from torch.optim import Optimizer

from align_train.batch import StepBatch
from align_train.data import Steps
from align_train.distributed import rank, world_size
from align_train.engine.agreement import NonFinite

log = logging.getLogger(__name__)

STATUS = 1  # of a process that was ended here
LOOKS = 10  # in the time that one part may take
FRAMES = 6  # shown of where the process is
GONE = re.compile(r"by peer|remote process|[Tt]imed out waiting|ncclRemoteError")  # what gloo and NCCL say of others


class Part(Enum):
    """Where in a step a process is: in words, what ranks wait for each other with there, and its times the limit."""

    START = "getting ready to train", "", 5.0
    DATA = "waiting for data", "", 1.0
    FORWARD = "in the forward pass", "embeddings are exchanged", 1.0
    BACKWARD = "in the backward pass", "gradients are exchanged", 1.0
    UPDATE = "in the optimizer's step", "gradients are exchanged", 1.0
    END = "at the end of the step", "the ranks agree on how to go on", 1.0
    SAVE = "saving a checkpoint", "all wait for the first", 5.0
    VALIDATION = "in validation", "scores are exchanged", 1.0
    EXAMS = "taking exams", "all wait for the first", math.inf

    def __init__(self, words: str, together: str, patience: float) -> None:
        self.words, self.together, self.patience = words, together, patience


class Watchdog(L.Callback):
    """Ends a process that has been in one part of a step for too long, with a line that names rank, host and step.

    Training notes which part it is in, for the cost of two attributes; a thread looks every so often. When one part
    lasts longer than it may, the thread logs what is waited for (the shard, or the other ranks) and where in the
    program that is, leaves all ranks time to do the same, and ends the process with status 1. A rank whose peer has
    gone would else hang until the process group's time-out.

    What may take longer: the first step of a training (compilation, cold shards) and a save, 5 times as long. A
    validation may last, each batch of it may not. Exams are not watched: the first rank may work on them for hours
    while others wait; there the process group's own time-out holds, and that of the data. Time for which the process
    was stopped (SIGSTOP) does not count. On a GPU, which works behind the program, the part is the one in which the
    program came to wait for it.

    It must be the first of the callbacks, so that a part begins with its note.

    Args:
        stall_seconds: that one part may take; None for ever.
    """

    def __init__(self, stall_seconds: float | None) -> None:
        self._limit = stall_seconds or math.inf
        self._part, self._notes, self._first = Part.START, 0, True
        self._seen: tuple[Any, ...] = ()
        self._stood = 0.0
        self._over, self._watched, self._who = threading.Event(), threading.get_ident(), ""
        self._thread: threading.Thread | None = None

    def note(self, part: Part) -> None:
        """The process is in this part now, or goes on in it."""
        self._part = part
        self._notes += 1

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to watch."""
        self._who, self._watched = _who(), threading.get_ident()
        self._first, self._over = True, threading.Event()
        self.note(Part.START)
        if self._limit < math.inf:
            self._thread = threading.Thread(target=_quietly, args=(self._watch, trainer), name="watchdog", daemon=True)
            self._thread.start()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: StepBatch, batch_idx: int
    ) -> None:
        """Note."""
        self.note(Part.FORWARD)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Note."""
        self.note(Part.BACKWARD)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Note."""
        self.note(Part.UPDATE)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: StepBatch, batch_idx: int
    ) -> None:
        """Note."""
        self._first = False
        self.note(Part.END)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note."""
        self.note(Part.VALIDATION)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Note."""
        self.note(Part.VALIDATION)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note."""
        self.note(Part.VALIDATION)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note."""
        self.note(Part.END)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note."""
        self.note(Part.SAVE)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Watch no more."""
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Watch no more; log which rank has failed where, unless the run was asked to end."""
        self._stop()
        if isinstance(exception, Exception) and not isinstance(exception, NonFinite):  # that one is all ranks' alike
            gone = " (another rank is gone: see what it said)" if GONE.search(str(exception)) else ""
            part = self._where(trainer)[0].words
            log.error("%s failed %s at step %d: %s%s", _who(), part, trainer.global_step, _said(exception), gone)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Watch no more."""
        self._stop()

    def overdue(self, trainer: L.Trainer, seconds: float) -> bool:
        """Whether one part lasts longer than it may, so many seconds after this was asked last."""
        seen = self._where(trainer)
        self._stood = self._stood + seconds if seen == self._seen else 0.0
        self._seen = seen
        return self._stood > self._limit * max(seen[0].patience, Part.START.patience if self._first else 0.0)

    def _where(self, trainer: L.Trainer) -> tuple[Part, int, float | None]:
        """The part, and two numbers that change when it is entered anew."""
        steps = trainer.train_dataloader
        asked = steps.asked if isinstance(steps, Steps) else None
        return (self._part if asked is None else Part.DATA), self._notes, asked

    def _watch(self, trainer: L.Trainer) -> None:
        every, looked = min(self._limit / LOOKS, 5.0), time.monotonic()
        while not self._over.wait(every):
            before, looked = looked, time.monotonic()
            if not self.overdue(trainer, min(looked - before, 2 * every)):  # more is time that the process was stopped
                continue
            # in a thread of its own: where the log's disk is what does not answer, that one never ends
            threading.Thread(target=_quietly, args=(self._tell, trainer), daemon=True).start()
            if self._over.wait(self._grace):
                return
            if not self.overdue(trainer, self._grace):
                log.warning("%s goes on after all", self._who)
                continue
            os._exit(STATUS)

    @property
    def _grace(self) -> float:
        """Seconds for other ranks to tell too; one that ends takes them along."""
        return min(self._limit, 10.0)

    def _tell(self, trainer: L.Trainer) -> None:
        part, steps = self._seen[0], trainer.train_dataloader
        why = ": " + steps.awaited() if part is Part.DATA and isinstance(steps, Steps) else ""
        if part.together and world_size() > 1:
            why = f", where {part.together}: this rank stands still, or waits for one that does, or that is gone"
        log.error(
            "%s has been %s at step %d for %.0f s%s. It ends in %g s unless it goes on; allow more with "
            "recovery.stall_minutes. Innermost first, it is at\n%s",
            self._who, part.words, trainer.global_step, self._stood, why, self._grace, self._frames(),
        )  # fmt: skip
        for stream in (sys.stdout, sys.stderr):
            stream.flush()

    def _frames(self) -> str:
        frame = sys._current_frames().get(self._watched)
        shown = traceback.StackSummary.extract(traceback.walk_stack(frame), limit=FRAMES) if frame else []
        return "\n".join(f"  {each.filename}:{each.lineno} in {each.name}" for each in shown)

    def _stop(self) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join(5.0)
            self._thread = None


def note(trainer: L.Trainer, part: Part) -> None:
    """Tell a run's watchdog, if it has one, what is done now."""
    for callback in trainer.callbacks:
        if isinstance(callback, Watchdog):
            callback.note(part)


def _who() -> str:
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    return f"rank {rank()} of {world_size()} on {host}" if world_size() > 1 else f"the process on {host}"


def _said(error: Exception) -> str:
    """Type and first line; of an error from a worker process of the DataLoader, the last, which was raised there."""
    lines = str(error).rstrip().splitlines()
    says = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return lines[-1] if "Original Traceback" in str(error) else says


def _quietly(work: Callable[[L.Trainer], None], trainer: L.Trainer) -> None:
    """Whatever happens to the watchdog, training goes on."""
    try:
        work(trainer)
    except Exception:
        log.exception("the watchdog has failed; training goes on without it")
