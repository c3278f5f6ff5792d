"""Which pairs each batch holds, for one rank: the global order cut into batches, and these into shares."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import Sampler

from align_train.data.order import Order
from align_train.data.storage.shards import Place
from align_train.data.windows import Drawn, Window
from align_train.records import Tally

SPARES = 16  # pairs that may stand in for unusable ones, beside half as many as the batch has


@dataclass(frozen=True)
class BatchPlan:
    """One rank's part of a global batch, or one of its micro-batches, to be read by whoever is free.

    Attributes:
        first: number of the first pair, counted from the start of training over all ranks.
        stride: what the number rises by from pair to pair.
        places: the pairs.
        spares: pairs that stand in, in turn, for those that turn out unusable; of the same windows, and soon to have
            their own turn.
        dropped: pairs that were left out before this batch; in its first plan alone, since all leave out the same.
    """

    first: int
    stride: int
    places: Sequence[Place]
    spares: Sequence[Place]
    dropped: Tally = field(default_factory=Tally)

    def __len__(self) -> int:
        return len(self.places)


class BatchPlans(Sampler[BatchPlan]):
    """This rank's plans from step `start` to step `stop`, for each step as many as there are micro-batches.

    Pairs are dealt out in turn: of R ranks with k micro-batches each, micro-batch j of rank r has the pairs r + R j,
    r + R j + R k, ... of the global batch. So a virtual batch of images is the same however a batch is split
    (`GhostBatchNorm2d`), and R ranks with one micro-batch do just what one rank does with R.

    Each round begins at `start` again: Lightning begins one or two before the first step. While a round goes ahead of
    training, it notes where the order stood after each step.

    Args:
        order: where the pairs come from, at step `start`.
        batch_size: pairs a step, over all ranks together.
        start: first step.
        stop: step after the last.
        rank: this rank's number.
        world_size: how many ranks there are.
        parts: micro-batches that each rank's share is cut into.

    Raises:
        ValueError: the global batch cannot be shared out evenly.
    """

    def __init__(
        self,
        order: Order,
        batch_size: int,
        start: int,
        stop: int,
        rank: int = 0,
        world_size: int = 1,
        parts: int = 1,
    ) -> None:
        if batch_size < 1 or batch_size % (world_size * parts):
            raise ValueError(
                f"data.batch_size is {batch_size} over all ranks, but there are {world_size} ranks"
                f"{f' with {parts} micro-batches each' if parts > 1 else ''}: make it a positive multiple of "
                f"{world_size * parts}"
            )
        self.order, self.batch_size, self.parts = order, batch_size, parts
        self.start, self.stop, self.rank, self.world_size = start, stop, rank, world_size
        self._after: dict[int, dict[str, Any]] = {start: order.state}

    def __iter__(self) -> Iterator[BatchPlan]:
        if self.start not in self._after:
            raise RuntimeError("a round that begins again after its first steps would repeat their pairs")
        order = self.order.at(self._after[self.start])
        stride = self.world_size * self.parts
        for step in range(self.start, self.stop):
            first = order.drawn
            drawn, dropped = order.take(self.batch_size)
            self._after[step + 1] = order.state
            for begin in range(self.rank, stride, self.world_size):
                own = slice(begin, None, stride)
                yield BatchPlan(
                    first + begin,
                    stride,
                    [window[pair] for window, pair in drawn[own]],
                    _spares(drawn, own),
                    dropped if begin == 0 else Tally(),
                )

    def state_at(self, step: int) -> dict[str, Any]:
        """Where the order stood after that many steps; what was before is forgotten."""
        for known in [known for known in self._after if known < step]:
            del self._after[known]
        return self._after[step]


def _spares(drawn: Sequence[Drawn], own: slice) -> list[Place]:
    """For the pairs of a rank, those that lie as much further on in their windows as the whole batch is long.

    So they are not of this batch, and no two ranks have one in common; unless a window has nothing else.
    """
    parts: dict[Window, tuple[int, int]] = {}  # first pair of the batch in a window, and how many
    for window, pair in drawn:
        first, count = parts.get(window, (pair, 0))
        parts[window] = first, count + 1
    wanted = drawn[own]
    wanted = wanted[: len(wanted) // 2 + SPARES]
    spares = []
    for window, pair in wanted:
        first, count = parts[window]
        further = (pair + count) % len(window)
        if not first <= further < first + count:
            spares.append(window[further])
    return spares or [window[pair] for window, pair in wanted]
