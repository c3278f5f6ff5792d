"""Exams in the middle of training, and at its end."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch

from align_train.batch import StepBatch
from align_train.data import AlignInputs
from align_train.distributed import rank
from align_train.engine.module import AlignTraining
from align_train.engine.recalibration import settled_statistics
from align_train.engine.watchdog import Part, note
from align_train.evaluation import Encoder, Encoding, Exam, Taken, check_exams, metrics_of, take_exams
from align_train.evaluation.taking import is_known_by
from align_train.models import Align

log = logging.getLogger(__name__)


class Examination(L.Callback):
    """Takes exams every so many steps, on all ranks, and logs them as exam/NAME/VALUE.

    The model is in evaluation mode; where its running batch-norm statistics cannot be trusted yet, they are measured
    anew for the exam and put back after it. Training goes on as if there had been none.

    Args:
        exams: by name.
        encoding: how embeddings are computed.
        folder: where contact sheets go.
        every: steps between two takings; None for the end alone.
        watched: metrics of exams that something is chosen by; each taking must give them.
        after: called after each taking, so that its time does not count as training's.
        tuned: a trained model is trained further: exams are taken before the first step too, and its batch-norm
            statistics are trusted from the start.

    Attributes:
        before: entries of the exams before the first step, where they were taken then.
    """

    def __init__(
        self,
        exams: Mapping[str, Exam],
        encoding: Encoding,
        folder: Path,
        every: int | None = None,
        watched: Sequence[str] = (),
        after: Callable[[], None] | None = None,
        tuned: bool = False,
    ) -> None:
        self._exams, self._encoding, self._folder = exams, encoding, folder
        self._every, self._watched, self._after, self._tuned = every, watched, after, tuned
        self.before: dict[str, dict[str, Any]] = {}
        self._step, self._taken = -1, Taken({}, {})
        self._untold: dict[str, float] = {}
        self._last = 0  # step of the last taking in training, also before a resume

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look whether the exams' data are there; after a stop that did not wait for the exams of its step, take them.

        What looks at exams after a step, all of which comes later among the callbacks, looks at these as well.

        Raises:
            ValueError: data are not what an exam needs, now instead of after hours.
        """
        check_exams(self._exams)
        self._offer(trainer)
        if trainer.global_step and self._due(trainer) and self._last != trainer.global_step:
            self._take(trainer, pl_module)
            for callback in trainer.callbacks[trainer.callbacks.index(self) + 1 :]:
                callback.on_train_batch_end(trainer, pl_module, None, None, -1)
        elif self._exams and self._tuned and not trainer.global_step:
            self._take(trainer, pl_module)
            self.before = self._taken.entries

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: StepBatch, batch_idx: int
    ) -> None:
        """Take the exams if it is time; checkpoints are saved after this. A run that was told to stop does not wait."""
        if not self._due(trainer) or trainer.should_stop:
            return
        self._take(trainer, pl_module)

    def _due(self, trainer: L.Trainer) -> bool:
        """At every so many steps, and at the last one of a fine-tuning, where `at_end` is not asked for."""
        last = self._tuned and trainer.global_step == trainer.max_steps
        return bool(self._exams and self._every) and (last or trainer.global_step % self._every == 0)

    def _take(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, AlignTraining)
        note(trainer, Part.EXAMS)
        steps = None if self._tuned else trainer.global_step
        with settled_statistics(pl_module.model, steps, trainer.datamodule) as statistics:
            taken = self.taken(pl_module.model, trainer.global_step)
        taken.draw(self._folder)
        self._taken = Taken(taken.entries, {})  # embeddings to draw from are not to stay in memory
        self._untold = metrics_of(taken.entries)
        self._last = trainer.global_step
        self._offer(trainer)
        if rank() == 0:
            shown = ", ".join(f"{name} {value:.4g}" for name, value in self._untold.items() if is_known_by(name))
            log.info("step %d, %s: %s", trainer.global_step, statistics, shown)
        if absent := [name for name in self._watched if name not in self._untold]:
            raise ValueError(
                f"{absent[0]}, which something is to be chosen by (best.by, forgetting), is given by no exam: choose "
                f"one of {', '.join(sorted(self._untold))}"
            )
        if self._after:
            self._after()

    def _offer(self, trainer: L.Trainer) -> None:
        """For what chooses by exams; loggers wait for the step's own row."""
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in self._untold.items()})

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: StepBatch, batch_idx: int
    ) -> None:
        """Log."""
        self.tell(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log."""
        self.tell(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The step of the last taking, what of it is to be logged yet, and the exams before the first step."""
        before = {"before": self.before, "of": repr(self._exams)} if self.before else {}
        return {"last": self._last, "untold": dict(self._untold), **before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._last, self._untold = state_dict["last"], state_dict["untold"]
        if state_dict.get("of") == repr(self._exams):  # others say nothing of these
            self.before = state_dict["before"]

    def at_end(self, trainer: L.Trainer, model: Align) -> tuple[Taken, ValueError | OSError | None]:
        """The exams of the trained model, whose statistics are settled; all ranks must call.

        An error is given back, with no exam: hours of training are not to end without a result for want of a score.
        """
        try:
            taken = self.taken(model, trainer.global_step)
        except (ValueError, OSError) as error:
            return Taken({}, {}), error
        self._untold = metrics_of(taken.entries)
        self.tell(trainer)
        return taken, None

    def taken(self, model: Align, step: int) -> Taken:
        """Of this step; taken once."""
        if step != self._step:
            encoder = Encoder(model, AlignInputs(model.preprocessing), model.temperature.device, self._encoding)
            self._step, self._taken = step, take_exams(self._exams, encoder)
        return self._taken

    def tell(self, trainer: L.Trainer) -> None:
        """Log what was not yet, once the row of the step before is complete."""
        if self._untold:
            for logger in trainer.loggers:
                logger.log_metrics(self._untold, step=trainer.global_step)
            self._untold = {}
