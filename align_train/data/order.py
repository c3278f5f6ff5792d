"""The order in which training sees pairs: a pure function of seed, epoch and shard list.

Positions count pairs from the start of training, without end: position p is pair `p % len` of epoch `p // len`.
Nothing here knows of ranks or workers, so any number of them reads the same sequence, and a run goes on at any
position at once.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np


class Place(NamedTuple):
    """A pair: which shard, by its number in the list, and which row of it."""

    shard: int
    row: int


class Order:
    """A shuffled, endless sequence of pairs.

    Each epoch the shards are permuted and cut into windows of `window` shards; the rows of a window are permuted
    together. So every pair comes exactly once an epoch, and only one window's shards are being read at a time.

    Args:
        counts: pairs in each shard. A shard listed twice is seen twice an epoch.
        seed: another seed, another order.
        window: shards whose rows are mixed; more mixes better and reads from more files at a time.

    Raises:
        ValueError: there is no pair at all.
    """

    def __init__(self, counts: Sequence[int], seed: int, window: int = 16) -> None:
        self._counts = np.asarray(counts, dtype=np.int64)
        if self._counts.sum() == 0:
            raise ValueError(f"the {len(counts)} shards hold no pair: check that they are the right files")
        if window < 1:
            raise ValueError(f"data.shuffle_shards is {window}; at least 1 shard must be open")
        self._seed, self._window = seed, window
        self._epoch = lru_cache(maxsize=2)(self._permute_shards)
        self._rows = lru_cache(maxsize=2)(self._permute_rows)

    def __len__(self) -> int:
        return int(self._counts.sum())

    def __getitem__(self, position: int) -> Place:
        epoch, offset = divmod(position, len(self))
        shards, ends = self._epoch(epoch)
        window = int(np.searchsorted(ends[self._window - 1 :: self._window], offset, side="right"))
        first = window * self._window
        start = int(ends[first - 1]) if first else 0
        row = self._rows(epoch, window)[offset - start] + start
        shard = int(np.searchsorted(ends, row, side="right"))
        return Place(int(shards[shard]), int(row - (ends[shard - 1] if shard else 0)))

    def __getstate__(self) -> dict[str, object]:
        return {"counts": self._counts, "seed": self._seed, "window": self._window}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)  # type: ignore[misc] # caches are per process

    def _permute_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in this epoch's order, and the running sum of their pairs."""
        shards = np.random.default_rng([self._seed, epoch]).permutation(len(self._counts))
        return shards, np.cumsum(self._counts[shards])

    def _permute_rows(self, epoch: int, window: int) -> np.ndarray:
        shards, _ = self._epoch(epoch)
        count = self._counts[shards[window * self._window : (window + 1) * self._window]].sum()
        return np.random.default_rng([self._seed, epoch, window + 1]).permutation(int(count))
