"""What a run does about signals, stalls, and losses that are no number."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recovery:
    """Settings of how a run survives.

    Attributes:
        checkpoint_minutes: between two saves of last.ckpt, beside those by steps; None for steps alone.
        stall_minutes: that a rank may spend in one part of a step before it names itself and ends; None for ever.
        rollbacks: times that a run goes back to a checkpoint because of a loss that is no number.
        skipped_steps: steps whose pairs are then left out: the one with that loss, and those right before it.
        failures: attempts in a row that get no further than one before them, after which a job is not queued again.

    Raises:
        ValueError: a value out of range.
    """

    checkpoint_minutes: float | None = 10.0
    stall_minutes: float | None = 15.0
    rollbacks: int = 3
    skipped_steps: int = 2
    failures: int = 3

    def __post_init__(self) -> None:
        for name in ("checkpoint_minutes", "stall_minutes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"recovery.{name} is {value}: give minutes over 0, or null")
        for name, least in (("rollbacks", 0), ("skipped_steps", 1), ("failures", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"recovery.{name} is {value!r}: give a whole number of at least {least}")
