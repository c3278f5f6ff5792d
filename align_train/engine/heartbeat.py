"""RUN/steps.txt: how far a process has come, known even if it is killed."""

import os
from pathlib import Path

import lightning as L

from align_train.batch import StepBatch
from align_train.distributed import rank


class Heartbeat(L.Callback):
    """Writes the step that training began from, and the furthest that it has come to, on the first rank.

    Some 20 bytes a step into one place of an open file: what a killed process has written stays.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path, self._file, self._first, self._reached = folder / "steps.txt", -1, 0, 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin; a training that goes back to a checkpoint within a process goes on with what that process wrote."""
        if rank() == 0:
            try:
                self._first, self._reached = map(int, self._path.read_text().split())
            except (FileNotFoundError, ValueError):  # none, or damaged
                self._first = self._reached = trainer.global_step
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o644)
            self._write(trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: StepBatch, batch_idx: int
    ) -> None:
        """Note the step."""
        self._write(trainer.global_step)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the file."""
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Close the file."""
        self._close()

    def _write(self, step: int) -> None:
        if self._file >= 0:
            self._reached = max(self._reached, step)
            os.pwrite(self._file, f"{self._first} {self._reached:<12}\n".encode(), 0)

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = -1
