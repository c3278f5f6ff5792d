"""Ways for a run to end before its last step: a signal, scores that grow no better, or a loss that is no number."""

import logging
import math
import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from torch import Tensor

from align_train.batch import Batch
from align_train.distributed import any_rank, rank

log = logging.getLogger(__name__)


class StopOnSignal(L.Callback):
    """On Ctrl-C, finish the step, save `last.ckpt` and end; a second Ctrl-C ends at once.

    The handler only sets a flag: saving wherever the signal finds the program would catch weights in the middle of
    an update. All ranks agree at the step's end.

    Args:
        folder: where checkpoints go.
    """

    def __init__(self, folder: str | Path) -> None:
        self.stopped = False
        self._file = Path(folder) / "last.ckpt"
        self._asked, self._process = False, os.getpid()
        self._before: Any = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen from here on."""
        self._before = signal.signal(signal.SIGINT, self._ask)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Save and end if any rank was asked to."""
        if trainer.global_step < trainer.max_steps and any_rank(self._asked, pl_module.device):
            trainer.save_checkpoint(self._file, weights_only=False)
            trainer.should_stop = self.stopped = True
            trainer.limit_val_batches = 0  # or Lightning would validate before it stops

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the signal back."""
        signal.signal(signal.SIGINT, self._before)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the signal back."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a process that decodes; the training process will end it
            return
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        log.warning("stopping after this step; press Ctrl-C again to end at once, without saving")


class StopOnPlateau(L.Callback):
    """End a run whose scores grow no better; it is a run like any other, with exams and export.

    Args:
        metric: that the best checkpoint is chosen by: of validation, or exam/NAME/VALUE.
        mode: max where more is better, else min.
        patience: so many values in a row that are not better than the best before them end the run.
        every: steps between two takings, for a metric of an exam; None for one of validation.
        first: step from which on it is judged: the last one of a first stage that is to be followed by another.
    """

    def __init__(self, metric: str, mode: str, patience: int, every: int | None = None, first: int = 0) -> None:
        self._metric, self._sign, self._patience, self._every = metric, 1 if mode == "max" else -1, patience, every
        self._first = first
        self._best, self._without = -math.inf, 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Judge, if an exam was taken after this step. `Examination` comes before this among the callbacks."""
        if self._every and trainer.global_step % self._every == 0:
            self._judge(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Judge."""
        if not self._every:
            self._judge(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The best value, and how many came since."""
        return {"best": self._best, "without": self._without}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._best, self._without = state_dict["best"], state_dict["without"]

    def _judge(self, trainer: L.Trainer) -> None:
        if trainer.global_step < self._first:
            return
        if self._metric not in trainer.callback_metrics:  # a run that was told to stop did not take it
            return
        value = self._sign * trainer.callback_metrics[self._metric].item()
        self._best, self._without = (value, 0) if value > self._best else (self._best, self._without + 1)
        if self._without >= self._patience and trainer.global_step < trainer.max_steps:
            trainer.should_stop = True
            if rank() == 0:
                log.info(
                    "stopping at step %d: %s was no better than %.4g in the last %d of its values",
                    trainer.global_step, self._metric, self._sign * self._best, self._without,
                )  # fmt: skip


class StopOnNonFinite(L.Callback):
    """End the run before a non-finite loss reaches the weights, so that no checkpoint is made of it."""

    def __init__(self) -> None:
        self._keys: tuple[str, ...] = ()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Remember which pairs are in this batch."""
        self._keys = batch.keys

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Raise FloatingPointError with step, keys and remedy, on all ranks where it is so on one."""
        if not any_rank(not torch.isfinite(loss), loss.device):
            return
        shown = ", ".join(self._keys[:8]) + (" ..." if len(self._keys) > 8 else "")
        raise FloatingPointError(
            f"the loss is {loss.item()} at step {trainer.global_step}; the {len(self._keys)} pairs of this rank's "
            f"batch begin with {shown}. No checkpoint holds it. Lower optimizer.lr, lengthen schedule.warmup_steps, "
            "set trainer.gradient_clip_val=1.0, or trainer.precision=32-true if this is a 16-bit run, and go on with "
            "resume=RUN"
        )
