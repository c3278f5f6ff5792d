"""The validation of a step at which a run was ended before it could be taken."""

from typing import Any

import lightning as L


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
