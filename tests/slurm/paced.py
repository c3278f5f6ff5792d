"""Training that a test can hold at a step, on one rank while the others wait for it, or let fail there."""

import os
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from align_train import signals
from align_train.batch import StepBatch
from align_train.distributed import rank
from align_train.engine import AlignTraining

# before embeddings are exchanged, before gradients are, and after the ranks have agreed on how to go on
PLACES = ("forward", "backward", "end")


class Pace:
    """Files in a folder that tests and ranks share; PACE names it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def hold(self, step: int, number: int, place: str = "forward") -> None:
        """Let a rank stand still in the step that comes after so many updates."""
        (self.folder / f"hold-{step}-{number}-{place}").touch()

    def is_held(self, step: int, number: int, place: str = "forward") -> bool:
        """True once it stands there."""
        return (self.folder / f"held-{step}-{number}-{place}").exists()

    def is_signalled(self, step: int) -> bool:
        """True once the rank that stands there knows of a signal."""
        return any(self.folder.glob(f"signalled-{step}-*"))

    def release(self, step: int) -> None:
        """Let all that stand in that step go on."""
        for file in self.folder.glob(f"hold-{step}-*"):
            file.unlink()

    def forget(self) -> None:
        """Ask for nothing, and know of nothing, of what a test before may have left."""
        for file in self.folder.iterdir():
            file.unlink()

    def fail(self, step: int) -> None:
        """Let the first rank fail whenever it comes to that step."""
        (self.folder / f"fail-{step}").touch()

    def come_to(self, step: int, number: int, place: str) -> None:
        """A rank does: stand still where it is to."""
        if (self.folder / f"fail-{step}").exists() and number == 0 and place == "forward":
            raise RuntimeError(f"step {step} never works")
        hold = self.folder / f"hold-{step}-{number}-{place}"
        if hold.exists():
            (self.folder / f"held-{step}-{number}-{place}").touch()
        while hold.exists():
            if signals.wish():
                (self.folder / f"signalled-{step}-{number}").touch()
            time.sleep(0.02)


class PacedTraining(AlignTraining):
    """As AlignTraining, at the pace of a test."""

    def training_step(self, batch: StepBatch, batch_index: int) -> Tensor:
        """Perhaps wait before it."""
        self._come_to("forward")
        return super().training_step(batch, batch_index)

    def on_before_zero_grad(self, *given: Any) -> None:
        """Perhaps wait between the forward and the backward pass."""
        self._come_to("backward")

    def on_train_batch_end(self, *given: Any) -> None:
        """Perhaps wait after it."""
        super().on_train_batch_end(*given)
        self._come_to("end", 1)

    def _come_to(self, place: str, done: int = 0) -> None:
        Pace(Path(os.environ["PACE"])).come_to(self.trainer.global_step - done, rank(), place)
