"""Time of a run: how much went by in steps, in waiting, in the first step; and what was done in it."""

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from align_train.engine.device_speed import Peak


@dataclass
class Spent:
    """Sums over some steps, all devices together.

    Attributes:
        pairs: how many were seen.
        flops: of the model.
        seconds: by the clock.
        waited: those of them in which the first rank waited for data.
        device_seconds: seconds times devices, of which a resume may bring others.
        possible: FLOPs that these devices would have done at their peak; 0 where that is unknown.
    """

    pairs: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0
    device_seconds: float = 0.0
    possible: float = 0.0

    def add(self, other: "Spent") -> None:
        """Make it the sum of both."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)

    def rates(self) -> dict[str, float]:
        """Speed, a device's part of it, share of waiting, and utilisation where it is known; empty without time.

        Utilisation is the share of the FLOPs that were possible (model FLOP utilisation, arXiv 2204.02311).
        """
        if not self.seconds:
            return {}
        rates = {
            "images_per_second": self.pairs / self.seconds,
            "images_per_second_per_device": self.pairs / self.device_seconds,
            "data_wait_share": self.waited / self.seconds,
        }
        return rates | ({"model_flop_utilisation": self.flops / self.possible} if self.flops and self.possible else {})


@dataclass
class Throughput:
    """Adds up a run's steps. The first step of a process, with start-up and compilation, is kept apart.

    Attributes:
        total: all steps of the run, also those before a resume.
        steady: those of them that were not the first of a process; the run's rates are theirs.
        window: steps since the last measurement, without the first.
        first: this process's first step, from the start of training on; None before it is done.
        clock: seconds.
    """

    total: Spent = field(default_factory=Spent)
    steady: Spent = field(default_factory=Spent)
    window: Spent = field(default_factory=Spent)
    first: Spent | None = None
    clock: Callable[[], float] = time.perf_counter

    def go_on(self) -> None:
        """A step may begin: what went by until now, such as a validation, is no step's."""
        self._since, self._waited, self._saving = self.clock(), 0.0, False

    def saving(self) -> None:
        """A checkpoint is saved before the next step: of the time up to that, only waiting for data counts.

        All the rest goes, also what a GPU still had to do for the step before: a part of one step for each save.
        """
        self._saving = True

    def batch_is_here(self, waited: float) -> None:
        """So many seconds since the step before were waiting for data."""
        self._waited = waited
        if self._saving:
            self._since, self._saving = self.clock() - waited, False

    def step_is_done(self, pairs: int, flops: float, devices: int, peak: Peak | None) -> None:
        """Count a step of so many pairs and FLOPs on all devices together, each with this peak."""
        now = self.clock()
        device_seconds = (now - self._since) * devices
        possible = device_seconds * peak.flops if peak else 0.0
        step = Spent(pairs, flops, now - self._since, self._waited, device_seconds, possible)
        self._since = now
        self.total.add(step)
        if self.first is None:
            self.first = step
        else:
            self.steady.add(step)
            self.window.add(step)

    def of_run(self) -> dict[str, float]:
        """Rates of the whole run; with its first steps only where there are no others."""
        return (self.steady if self.steady.seconds else self.total).rates()

    def of_window(self) -> dict[str, float]:
        """Rates since this was asked last; those of the first step only where it is all there was."""
        spent = self.window if self.window.seconds else self.first or Spent()
        self.window = Spent()
        return spent.rates()

    def state(self) -> dict[str, dict[str, Any]]:
        """For a checkpoint."""
        return {"total": asdict(self.total), "steady": asdict(self.steady)}

    def restore(self, state: dict[str, dict[str, Any]]) -> None:
        """Go on from `state`."""
        self.total, self.steady = Spent(**state["total"]), Spent(**state["steady"])


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process held so far: of tensors on its GPU, else of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # macOS counts bytes, Linux kilobytes
