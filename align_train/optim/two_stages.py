"""The learning rate of a fine-tuning in two stages: first what is new, then all of it."""

from collections.abc import Callable
from functools import partial

from align_train.optim.schedules import cosine


def two_cosines(warmup_steps: int, total_steps: int, first_steps: int, first_factor: float) -> Callable[[int], float]:
    """Two times half a cosine, each from its own peak to 0; the second peak is the optimizer's learning rate.

    As ALIGN was fine-tuned for fine-grained classification (arXiv 2102.05918, section 5).

    Args:
        warmup_steps: from 0 to the peak, in each stage.
        total_steps: of both stages; the factor is 0 from here on.
        first_steps: of the first stage.
        first_factor: peak of the first stage, as a multiple of the second's.

    Raises:
        ValueError: a stage is no longer than its warm-up.
    """
    if not 0 <= warmup_steps < min(first_steps, total_steps - first_steps):
        raise ValueError(
            f"max_steps={total_steps} are {first_steps} for the head and {total_steps - first_steps} for all layers: "
            f"each stage needs more than the {warmup_steps} of schedule.warmup_steps; change training.head_steps, "
            "max_steps or schedule.warmup_steps"
        )
    stages = cosine(warmup_steps, first_steps), cosine(warmup_steps, total_steps - first_steps)
    return partial(_factor, *stages, first_steps, first_factor)


def _factor(
    first: Callable[[int], float], second: Callable[[int], float], first_steps: int, first_factor: float, step: int
) -> float:
    return first_factor * first(step) if step < first_steps else second(step - first_steps)
