"""How a global batch is split over ranks and micro-batches."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Split:
    """B pairs = ranks x accumulation x micro.

    Attributes:
        batch_size: pairs a step, over all ranks together.
        ranks: how many there are.
        micro_batch: largest number of pairs that a device takes at once; None for a rank's whole share.
        group_size: images of a virtual batch, where batch norm has these.

    Raises:
        ValueError: the numbers do not divide; the message names the nearest that do.
    """

    batch_size: int
    ranks: int
    micro_batch: int | None = None
    group_size: int | None = None

    def __post_init__(self) -> None:
        unit = self.ranks * (self.group_size or 1)
        if self.batch_size < 1 or self.batch_size % self.ranks:
            raise ValueError(
                f"data.batch_size is {self.batch_size:,} over all ranks, but there are {self._ranks} (trainer."
                f"devices x trainer.num_nodes): make it a positive multiple of their number, {self._nearest(unit)}"
            )
        if self.local % (self.group_size or 1):
            raise ValueError(
                f"data.batch_size={self.batch_size:,} over {self._ranks} (trainer.devices) is {self.local:,} "
                f"pairs each, not a multiple of the virtual batch of model.batch_norm.group_size={self.group_size} "
                f"images: set {self._nearest(unit)}, or group_size to a divisor of {self.local:,}"
            )
        if self.local % self.micro or self.micro % (self.group_size or 1):
            raise ValueError(self._does_not_divide())

    @property
    def local(self) -> int:
        """Pairs of one rank."""
        return self.batch_size // self.ranks

    @property
    def micro(self) -> int:
        """Pairs that a device takes at once."""
        return self.local if self.micro_batch is None else min(self.micro_batch, self.local)

    @property
    def accumulation(self) -> int:
        """Micro-batches of one rank."""
        return self.local // self.micro

    def __str__(self) -> str:
        parts = f"{self.accumulation} micro-batch{'es' if self.accumulation > 1 else ''}"
        return f"{self.batch_size:,} = {self._ranks} x {parts} x {self.micro:,} pairs"

    @property
    def _ranks(self) -> str:
        return f"{self.ranks} rank{'s' if self.ranks > 1 else ''}"

    def _nearest(self, unit: int) -> str:
        """The multiples of `unit` around the batch size, as settings."""
        below = self.batch_size // unit * unit
        return " or ".join(f"data.batch_size={size}" for size in (below, below + unit) if size > 0)

    def _does_not_divide(self) -> str:
        unit = self.group_size or 1
        works = [size for size in range(unit, self.local + 1, unit) if self.local % size == 0]
        around = [*(size for size in works if size < self.micro)][-1:] + [size for size in works if size > self.micro][
            :1
        ]
        groups = f" and be a multiple of model.batch_norm.group_size={self.group_size}" if self.group_size else ""
        return (
            f"step.micro_batch is {self.micro_batch:,}; it must divide the {self.local:,} pairs of a rank (data.batch_"
            f"size={self.batch_size:,} over {self._ranks}, trainer.devices){groups}: set "
            f"{' or '.join(f'step.micro_batch={size}' for size in around)}"
        )
