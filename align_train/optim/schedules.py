"""Learning-rate schedules: functions of the step that give a factor of the peak, for `LambdaLR`.

Every one takes (warmup_steps, total_steps) and means the same by it, so that a config can swap one for another:
rising as step / warmup_steps below warmup_steps, then its own shape, 0 from total_steps on. Steps count the updates
already done: the first update sees factor(0), which is 0 with a warm-up, the last one factor(total_steps - 1).

They are partials, so they pickle; and `LambdaLR` stores nothing of them in a checkpoint, so a resumed run that was
given another total_steps follows it.
"""

from collections.abc import Callable
from functools import partial
from math import cos, pi


def linear(warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """ALIGN's schedule: 1 - x, x = (step - warmup_steps) / (total_steps - warmup_steps).

    arXiv 2102.05918, section 5: 10k steps up, then down to 0 at 1.2M. Raises ValueError as `_schedule` does.
    """
    return _schedule(_falling, warmup_steps, total_steps)


def cosine(warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """Half a cosine, (1 + cos(pi x)) / 2 with the x of `linear`: SGDR without restarts (arXiv 1608.03983)."""
    return _schedule(_half_cosine, warmup_steps, total_steps)


def constant(warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """1 from the end of the warm-up to total_steps."""
    return _schedule(_flat, warmup_steps, total_steps)


def _schedule(shape: Callable[[float], float], warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """The factor as a function of the step alone; ValueError unless 0 <= warmup_steps < total_steps."""
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"a schedule needs 0 <= warmup_steps < total_steps, got warmup_steps={warmup_steps} and "
            f"total_steps={total_steps}: shorten the warm-up or train for more steps"
        )
    return partial(_factor, shape, warmup_steps, total_steps)


def _factor(shape: Callable[[float], float], warmup_steps: int, total_steps: int, step: int) -> float:
    if step < warmup_steps:
        return step / warmup_steps
    if step >= total_steps:
        return 0.0
    return shape((step - warmup_steps) / (total_steps - warmup_steps))


def _falling(x: float) -> float:
    return 1 - x


def _half_cosine(x: float) -> float:
    return (1 + cos(pi * x)) / 2


def _flat(_: float) -> float:
    return 1.0
