"""The validation of a step at which a run was ended before it could be taken; after the last step, too."""

from typing import Any

import lightning as L
from lightning.pytorch.loops.fit_loop import _FitLoop


class OwedValidation(L.Callback):
    """Validates after a resume from a checkpoint of a step whose validation it does not know.

    A stop does not wait for a validation that is due, since the time for it may not be there; and a checkpoint is saved
    before its step's validation, so that after a crash the run would not know what best.ckpt is.
    """

    def __init__(self) -> None:
        self._last = 0  # step of the last validation

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take it, as Lightning takes those in between."""
        step = trainer.global_step
        if not step or not trainer.limit_val_batches or step % int(trainer.val_check_batch) or self._last == step:
            return
        loop = trainer.fit_loop.epoch_loop.val_loop
        trainer.validating = True
        loop.run()
        trainer.training = True

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """It is taken."""
        self._last = trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        """The step of the last one."""
        return {"last": self._last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._last = state_dict["last"]


def begin_even_without_steps(trainer: L.Trainer) -> None:
    """Let a training of which no step is left begin and end all the same, so that callbacks can do what they owe."""
    loop = _EvenWithoutSteps(trainer, max_epochs=-1)
    loop.epoch_loop, trainer.fit_loop = trainer.fit_loop.epoch_loop, loop


class _EvenWithoutSteps(_FitLoop):
    """In the place of Lightning's (2.6), which would return before any callback is asked."""

    @property
    def skip(self) -> bool:
        return False
