"""Ways for a run to end before its last step: a signal, or a loss that is no number."""

import logging
import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from torch import Tensor

from align_train.batch import Batch
from align_train.distributed import any_rank

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
