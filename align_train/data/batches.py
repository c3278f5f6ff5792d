"""Which pairs each batch holds, for one rank: the global order cut into batches, and these into shares."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import Sampler

from align_train.data.order import Order
from align_train.data.storage.shards import Place
from align_train.data.windows import Drawn, Window
from align_train.records import Tally

SPARES = 16  # pairs that may stand in for unusable ones, beside half as many as the batch has
KEPT = 100  # steps gone by whose places are known still, so that what they took can be left out


@dataclass(frozen=True)
class BatchPlan:
    """One rank's part of a global batch, or one of its micro-batches, to be read by whoever is free.

    Attributes:
        first: number of the first pair, counted from the start of training over all ranks.
        stride: what the number rises by from pair to pair.
        places: the pairs.
        spares: pairs that stand in, in turn, for those that turn out unusable; of the same windows, and soon to have
            their own turn, or, where that is to be skipped, just after it.
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

    Pairs that are to be skipped are drawn, counted by the reason `skipped`, and given to no step, as if the order did
    not have them: a batch that meets them goes on behind them. The place after a step is before them, so that going on
    there meets them again. The pairs of a batch are numbered without a gap: behind skipped ones they have the numbers
    of these, which no other pair has.

    Args:
        order: where the pairs come from, at step `start`.
        batch_size: pairs a step, over all ranks together.
        start: first step.
        stop: step after the last.
        rank: this rank's number.
        world_size: how many ranks there are.
        parts: micro-batches that each rank's share is cut into.
        skipped: half-open ranges of numbers that pairs have by `Order.drawn`, which no step takes; in any order, and
            they may overlap. With `epoch_end=drop`, the numbers depend on the batch size too.

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
        skipped: Sequence[tuple[int, int]] = (),
    ) -> None:
        if batch_size < 1 or batch_size % (world_size * parts):
            raise ValueError(
                f"data.batch_size is {batch_size} over all ranks, but there are {world_size} ranks"
                f"{f' with {parts} micro-batches each' if parts > 1 else ''}: make it a positive multiple of "
                f"{world_size * parts}"
            )
        self.order, self.batch_size, self.parts = order, batch_size, parts
        self.start, self.stop, self.rank, self.world_size = start, stop, rank, world_size
        self._skipped = _merged(skipped)
        self._after: dict[int, dict[str, Any]] = {start: order.state}
        self._used = start  # the last step of which is known that training has come to it

    def __iter__(self) -> Iterator[BatchPlan]:
        if self._used > self.start:
            raise RuntimeError("a round that begins again after its first steps would repeat their pairs")
        order = self.order.at(self._after[self.start])
        stride = self.world_size * self.parts
        for step in range(self.start, self.stop):
            first, drawn, dropped = self._batch(order)
            self._after[step + 1] = order.state
            back = self._next_skipped(order.drawn)[0] < order.drawn + self.batch_size
            for begin in range(self.rank, stride, self.world_size):
                own = slice(begin, None, stride)
                yield BatchPlan(
                    first + begin,
                    stride,
                    [window[pair] for window, pair in drawn[own]],
                    _spares(drawn, own, back),
                    dropped if begin == 0 else Tally(),
                )

    def state_at(self, step: int) -> dict[str, Any]:
        """Where the order stood after that many steps; what was long before is forgotten."""
        self._used = max(self._used, step)
        for known in [known for known in self._after if known < step - KEPT]:
            del self._after[known]
        return self._after[step]

    def numbers(self, first_step: int, last_step: int) -> tuple[int, int]:
        """The half-open range of numbers of the pairs that these steps took, the last included.

        From the first step whose place is known still, if that is later. What was skipped between is in the range.

        Raises:
            ValueError: the last step is not among those that are known, or has not been planned yet.
        """
        first_step = max(first_step, min(self._after))
        if last_step < first_step or last_step + 1 not in self._after:
            raise ValueError(
                f"step {last_step} is none whose pairs are known: these are steps {min(self._after)} to "
                f"{max(self._after) - 1}"
            )
        begin, end = (self._after[step]["drawn"] for step in (first_step, last_step + 1))
        skipped_from, skipped_to = self._next_skipped(begin)
        return skipped_to if skipped_from <= begin else begin, end

    def _batch(self, order: Order) -> tuple[int, list[Drawn], Tally]:
        """Number of the first pair, the pairs of the next batch, and what was left out on the way to them."""
        first, drawn, dropped = order.drawn, list[Drawn](), Tally()
        while len(drawn) < self.batch_size:
            begin, end = self._next_skipped(order.drawn)
            if order.drawn < begin:
                first = first if drawn else order.drawn
                taken, lost = order.take(min(self.batch_size - len(drawn), begin - order.drawn))
                drawn += taken
            else:  # at most a batch at a time, as the steps had drawn it
                taken, lost = order.take(min(self.batch_size, end - order.drawn))
                dropped["skipped"] += len(taken)
            dropped.update(lost)
        return first, drawn, dropped

    def _next_skipped(self, number: int) -> tuple[int, int]:
        """The range of skipped pairs that holds this number, else the next one; beyond all numbers if there is none."""
        return next((skipped for skipped in self._skipped if number < skipped[1]), (sys.maxsize, sys.maxsize))


def _merged(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same numbers as ranges in order that do not touch."""
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((begin, end))
    return merged


def _spares(drawn: Sequence[Drawn], own: slice, back: bool) -> list[Place]:
    """For the pairs of a rank, those that lie as much further on in their windows as the whole batch is long.

    So they are not of this batch, and no two ranks have one in common; unless a window has nothing else. With `back`,
    those that lie as much before.
    """
    parts: dict[Window, tuple[int, int]] = {}  # first pair of the batch in a window, and the length up to the last
    for window, pair in drawn:
        first, _ = parts.get(window, (pair, 0))
        parts[window] = first, pair + 1 - first
    wanted = drawn[own]
    wanted = wanted[: len(wanted) // 2 + SPARES]
    spares = []
    for window, pair in wanted:
        first, length = parts[window]
        further = (pair - length if back else pair + length) % len(window)
        if not first <= further < first + length:
            spares.append(window[further])
    return spares or [window[pair] for window, pair in wanted]
