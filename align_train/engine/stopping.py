"""The end of a run whose scores grow no better."""

import logging
import math
from typing import Any

import lightning as L

from align_train.batch import StepBatch
from align_train.distributed import rank

log = logging.getLogger(__name__)


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
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: StepBatch, batch_idx: int
    ) -> None:
        """Judge, if an exam was taken after this step: a run that was told to stop leaves it to the next start.

        `Examination` comes before this among the callbacks.
        """
        if self._every and trainer.global_step % self._every == 0 and not trainer.should_stop:
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
        value = self._sign * trainer.callback_metrics[self._metric].item()
        self._best, self._without = (value, 0) if value > self._best else (self._best, self._without + 1)
        if self._without >= self._patience and trainer.global_step < trainer.max_steps:
            trainer.should_stop = True
            if rank() == 0:
                log.info(
                    "stopping at step %d: %s was no better than %.4g in the last %d of its values",
                    trainer.global_step, self._metric, self._sign * self._best, self._without,
                )  # fmt: skip
