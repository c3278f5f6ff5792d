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
    """Sums over some steps: pairs and model FLOPs of all ranks together, seconds, and those spent waiting for data."""

    pairs: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0

    def add(self, other: "Spent") -> None:
        """Make it the sum of both."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)

    def rates(self, devices: int, peak: Peak | None) -> dict[str, float]:
        """Speed, a device's part of it, share of waiting, and utilisation where it is known; empty without time."""
        if not self.seconds:
            return {}
        speed = self.pairs / self.seconds
        rates = {"images_per_second": speed, "images_per_second_per_device": speed / devices}
        if peak is not None and self.flops:
            rates["model_flop_utilisation"] = peak.utilisation(self.flops, self.seconds, devices)
        return rates | {"data_wait_share": self.waited / self.seconds}


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
        self._since = self._arrived = self.clock()

    def batch_is_here(self) -> None:
        """What went by since the step before was waiting."""
        self._arrived = self.clock()

    def step_is_done(self, pairs: int, flops: float) -> None:
        """Count a step of so many pairs and FLOPs, over all ranks."""
        now = self.clock()
        step = Spent(pairs, flops, now - self._since, self._arrived - self._since)
        self._since = now
        self.total.add(step)
        if self.first is None:
            self.first = step
        else:
            self.steady.add(step)
            self.window.add(step)

    def of_run(self, devices: int, peak: Peak | None) -> dict[str, float]:
        """Rates of the whole run; with its first steps only where there are no others."""
        return (self.steady if self.steady.seconds else self.total).rates(devices, peak)

    def of_window(self, devices: int, peak: Peak | None) -> dict[str, float]:
        """Rates since this was asked last; those of the first step only where it is all there was."""
        spent = self.window if self.window.seconds else self.first or Spent()
        self.window = Spent()
        return spent.rates(devices, peak)

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
