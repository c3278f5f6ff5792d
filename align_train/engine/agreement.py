"""What all ranks do alike at a step's end, though only one may have the reason."""

import math
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from torch import Tensor

from align_train import signals
from align_train.batch import StepBatch
from align_train.distributed import Ballot, any_rank, own_part, rank
from align_train.signals import Wish


class NonFinite(FloatingPointError):
    """The loss of a step is no number, or the weights after it are none.

    Attributes:
        step: updates that there were before it.
    """

    def __init__(self, step: int, says: str) -> None:
        super().__init__(says)
        self.step = step


class Agreement(L.Callback):
    """Ends a run after a signal, saves it by time, and ends it where a loss is no number; on all ranks at one step.

    A signal only leaves a note (`align_train.signals`): saving wherever it finds the program would catch weights in the
    middle of an update, and ranks in different places. With each step's loss the ranks share three numbers by one
    all-reduce: what they were asked for, whether the loss is no number, and whether a save is due. The answer is read
    at the step's end, when it has long been there; so a signal may take effect a step later. It must come before all
    callbacks that save.

    Args:
        folder: where checkpoints go.
        minutes: between two saves, by the first rank's clock; None for none by time.
        clock: seconds.

    Attributes:
        asked: what the run was asked for, and ended because of.
    """

    def __init__(
        self, folder: str | Path, minutes: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.asked = Wish.NOTHING
        self._file, self._seconds, self._clock = Path(folder) / "last.ckpt", 60 * (minutes or math.inf), clock
        self._saved_at = clock()
        self._ballot: Ballot | None = None
        self._keys: tuple[str, ...] = ()
        self._loss = torch.zeros(())
        self._process, self._before, self._pressed = os.getpid(), signal.getsignal(signal.SIGINT), False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Keep Lightning from two things of its own (2.6).

        Its handler of SIGTERM asks the other ranks where the signal finds it, and hangs if they are elsewhere; and each
        step waits for the first rank to say whether it had one.
        """
        trainer._signal_connector.register_signal_handlers = _nothing
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen to Ctrl-C from here on; end here if a signal came before.

        Raises:
            Asked: on all ranks where one was.
            OSError: the ranks begin at different steps, having read different checkpoints; on all of them.
        """
        self._before = signal.signal(signal.SIGINT, self._interrupted)
        self._saved_at = self._clock()
        check_beginning(trainer.global_step, pl_module.device)
        end_if_asked(pl_module.device)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: StepBatch, batch_idx: int
    ) -> None:
        """Remember which pairs are in this batch."""
        self._keys = batch.keys

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Ask all ranks."""
        self._loss = loss.detach()
        due = rank() == 0 and self._clock() - self._saved_at >= self._seconds
        known = torch.tensor([float(signals.wish()), float(due)], pin_memory=loss.is_cuda)
        broken = (~torch.isfinite(self._loss)).float().reshape(1)
        self._ballot = Ballot(torch.cat([known.to(loss.device, non_blocking=True), broken]))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: StepBatch, batch_idx: int
    ) -> None:
        """Do what was agreed on.

        Raises:
            NonFinite: with step, keys and remedy, on all ranks where it is so on one.
        """
        assert self._ballot is not None
        asked, due, broken = self._ballot.result()
        self._ballot = None
        if broken:
            raise self._non_finite(trainer.global_step - 1)
        if due or asked or trainer.global_step == trainer.max_steps:  # exams that follow the last step may take hours
            trainer.save_checkpoint(self._file, weights_only=False)
        if asked:
            self.asked = Wish(int(asked))
            trainer.should_stop = True
            trainer.limit_val_batches = 0  # or Lightning would validate before it stops

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """The time until the next save begins anew, whoever saves.

        Raises:
            NonFinite: a weight is no number, on all ranks where it is so on one; nothing is saved.
        """
        self._saved_at = self._clock()
        self._check(checkpoint["state_dict"], trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give Ctrl-C back.

        Raises:
            NonFinite: a weight is no number, as after the last step of a run that ended before max_steps.
        """
        signal.signal(signal.SIGINT, self._before)
        self._check(pl_module.state_dict(), trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give Ctrl-C back."""
        signal.signal(signal.SIGINT, self._before)

    def _check(self, weights: Mapping[str, Any], trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raise NonFinite on all ranks where a weight of one is no number."""
        tensors = {name: own_part(value) for name, value in weights.items() if isinstance(value, Tensor)}
        wrong = next((name for name, value in tensors.items() if not torch.isfinite(value).all()), "")
        if any_rank(bool(wrong), pl_module.device):
            raise NonFinite(
                trainer.global_step - 1,
                f"{wrong or 'a weight'} is not finite at step {trainer.global_step}: the gradient overflowed. No "
                "checkpoint holds it. Lower optimizer.lr or set trainer.gradient_clip_val=1.0",
            )

    def _non_finite(self, step: int) -> NonFinite:
        shown = ", ".join(self._keys[:8]) + (" ..." if len(self._keys) > 8 else "")
        return NonFinite(
            step,
            f"the loss is {self._loss.item()} at step {step}; the {len(self._keys)} pairs of this rank's batch begin "
            f"with {shown}. No checkpoint holds it. Lower optimizer.lr, lengthen schedule.warmup_steps, set "
            "trainer.gradient_clip_val=1.0, or trainer.precision=32-true if this is a 16-bit run",
        )

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a process that decodes; the training process will end it
            return
        if self._pressed:
            raise KeyboardInterrupt
        self._pressed = True
        signals.ask(Wish.INTERRUPT)
        os.write(2, b"stopping after this step; press Ctrl-C again to end at once, without saving\n")


def end_if_asked(device: torch.device) -> None:
    """Raise Asked on all ranks if one was asked to end, where nothing is lost by that; every rank must call it.

    The first rank alone ends with the status of it: the others must not take it down by one of their own.
    """
    if asked := Wish(int(Ballot(torch.tensor([float(signals.wish())], device=device)).result()[0])):
        raise signals.Asked(asked, asked.status if rank() == 0 else 0)


def check_beginning(step: int, device: torch.device) -> None:
    """Raise OSError on all ranks where they begin at different steps; every rank must call it."""
    high, low = Ballot(torch.tensor([step, -step], dtype=torch.float64, device=device)).result()
    if high != -low:
        raise OSError(
            f"the ranks go on from steps {-low:.0f} to {high:.0f}, this one from {step}: a checkpoint could not be "
            "read on all of them. Start again with the same words; if it comes again, look at the file system"
        )


def _nothing() -> None:
    """In the place of what Lightning would do."""
