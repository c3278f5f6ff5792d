"""Windows of shards, one after the other: pairs without end, and where they go on."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from align_train.data.crew import Crew
from align_train.data.opening import Opened, Opener
from align_train.data.storage.shards import Place, place_of
from align_train.records import Tally

EPOCH_ENDS = ("carry_over", "drop")
CHANGES = ("refuse", "next_epoch")


@dataclass(frozen=True)
class OrderSettings:
    """How pairs are ordered.

    Attributes:
        seed: another seed, another order.
        shuffle_shards: shards in a window; more mixes better, opens more shards before the first batch, and reads from
            more files at a time.
        replacement: draw the shards of each window anew from all of them, instead of each once an epoch; within a
            window each comes once.
        samples_per_epoch: pairs that count as an epoch; None counts each source by its own shards.
        epoch_end: what becomes of the last pairs of an epoch, fewer than a batch: `carry_over` begins a batch with them
            that the next epoch fills, `drop` leaves them out and counts them.
        on_change: what to do when a run is resumed with other shards: `refuse`, or begin the `next_epoch`.

    Raises:
        ValueError: a value out of range.
    """

    seed: int = 0
    shuffle_shards: int = 16
    replacement: bool = False
    samples_per_epoch: int | None = None
    epoch_end: str = "carry_over"
    on_change: str = "refuse"

    def __post_init__(self) -> None:
        if self.shuffle_shards < 1:
            raise ValueError(f"data.order.shuffle_shards is {self.shuffle_shards}; at least 1 shard must be open")
        pairs = self.samples_per_epoch
        if pairs is not None and (not isinstance(pairs, int) or pairs < 1):
            raise ValueError(f"data.order.samples_per_epoch is {pairs!r}; an epoch has a whole number of pairs")
        for name, choices in {"epoch_end": EPOCH_ENDS, "on_change": CHANGES}.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"data.order.{name} is {getattr(self, name)!r}: choose {' or '.join(choices)}")


class Cursor(NamedTuple):
    """Where a source goes on: the epoch, which window of its shards, which pair of the window."""

    epoch: int = 0
    window: int = 0
    pair: int = 0


class Window:
    """Some shards' pairs, permuted together.

    Args:
        opened: the shards by number.
        shards: their numbers, in order; one may come twice.
        seed: of the permutation.
    """

    def __init__(self, opened: Mapping[int, Opened], shards: Sequence[int], seed: Sequence[int]) -> None:
        self._indexes = {number: opened[number].index for number in opened}
        used = [number for number in shards if number in opened]
        shard = np.repeat(used, [len(opened[number].rows) for number in used]).astype(np.int64)
        row = np.concatenate([opened[number].rows for number in used]) if used else np.empty(0, np.int64)
        order = np.random.default_rng(seed).permutation(len(shard))
        self._shard, self._row = shard[order], row[order]
        self.dropped = Tally()
        for number in used:
            self.dropped.update(opened[number].dropped)

    def __len__(self) -> int:
        return len(self._shard)

    def __getitem__(self, number: int) -> Place:
        shard = int(self._shard[number])
        return place_of(shard, self._indexes[shard], int(self._row[number]))


Drawn = tuple[Window, int]  # a pair, by its number in a window


class Stream:
    """One sequence of pairs without end.

    Args:
        name: for messages.
        number: of the stream, a part of its seed.
        shards: numbers of the shards it reads.
        opener: opens them.
        settings: how they are ordered.
        cursor: where to begin.
        window_pairs: how many pairs the window at the cursor had before, 0 where that is not known.
    """

    def __init__(
        self,
        name: str,
        number: int,
        shards: Sequence[int],
        opener: Opener,
        settings: OrderSettings,
        cursor: Cursor,
        window_pairs: int = 0,
    ) -> None:
        self.name, self.cursor, self._expected = name, cursor, window_pairs
        self._number, self._shards, self._opener, self._settings = number, np.asarray(shards), opener, settings
        self._ahead = Crew(1)  # opens the next window while this one is used
        self._opening: tuple[tuple[int, int], Future[Window]] | None = None
        self._window: Window | None = None
        self._pairs = 0 if cursor == (cursor.epoch, 0, 0) else None  # of this epoch so far, if seen from its start

    @property
    def windows(self) -> int:
        """Windows in an epoch."""
        return -(-len(self._shards) // self._settings.shuffle_shards)

    @property
    def epochs(self) -> float:
        """Epochs gone by; within a window as if all shards of the epoch had as many pairs."""
        size = self._settings.shuffle_shards
        before = self.cursor.window * size
        inside = min(size, len(self._shards) - before)
        part = self.cursor.pair / len(self._window) if self._window else 0.0
        return self.cursor.epoch + (before + inside * part) / len(self._shards)

    @property
    def window_pairs(self) -> int:
        """Pairs of the window at the cursor, 0 where that is not known."""
        return len(self._window) if self._window else self._expected

    def take(self, count: int, usual: float) -> tuple[list[Drawn], Tally]:
        """The next pairs, and what was left out on the way to them.

        Args:
            count: how many.
            usual: how many are taken at a time in the mean.

        Raises:
            ValueError: an epoch has no pair, or fewer than are usually taken at a time; or the window at which a
                checkpoint stood holds other pairs now.
        """
        taken: list[Drawn] = []
        dropped = Tally()
        while len(taken) < count:
            window = self._open(dropped)
            start = self.cursor.pair
            stop = min(len(window), start + count - len(taken))
            taken += [(window, pair) for pair in range(start, stop)]
            self.cursor = self.cursor._replace(pair=stop)
            if stop == len(window) and len(taken) < count and self._next_window(count, usual, dropped) and self._drops:
                dropped["epoch_tail"] += len(taken)
                taken = []
        return taken, dropped

    def _open(self, dropped: Tally) -> Window:
        """The window at the cursor; what it leaves out is counted when it is begun."""
        if self._window is None:
            place = self.cursor.epoch, self.cursor.window
            opening = self._opening[1] if self._opening and self._opening[0] == place else None
            self._window = opening.result() if opening else self._made(*place)
            if self._is_other(len(self._window)):
                self._window, self.cursor = None, Cursor(place[0] + 1)
                return self._open(dropped)
            ahead = divmod(place[0] * self.windows + place[1] + 1, self.windows)
            self._opening = ahead, self._ahead.submit(self._made, *ahead)
            if self.cursor.pair == 0:
                dropped.update(self._window.dropped)
                if self._pairs is not None:
                    self._pairs += len(self._window)
        return self._window

    def _is_other(self, pairs: int) -> bool:
        """Whether the window at which a checkpoint stood has changed, and the next epoch is to begin."""
        expected, self._expected = self._expected, 0
        if not expected or expected == pairs:
            return False
        if self._settings.on_change == "next_epoch":
            return True
        raise ValueError(
            f"{self.name}: the {self._settings.shuffle_shards} shards that were being read had {expected} pairs, and "
            f"now {pairs}: shards, rules or captions have changed. Give those of before, or begin the next epoch "
            "with data.order.on_change=next_epoch"
        )

    @property
    def _drops(self) -> bool:
        return self._settings.epoch_end == "drop"

    def _next_window(self, count: int, usual: float, dropped: Tally) -> bool:
        """Move on; True where an epoch has ended."""
        self._window = None
        epoch, window, _ = self.cursor
        if window + 1 < self.windows:
            self.cursor = Cursor(epoch, window + 1)
            return False
        needed = max(count if self._drops else usual, 1)  # what is dropped leaves nothing over for a larger batch
        if self._pairs is not None and self._pairs < needed:
            raise ValueError(self._too_few(needed, dropped))
        self.cursor, self._pairs = Cursor(epoch + 1), 0
        return True

    def _too_few(self, needed: float, dropped: Tally) -> str:
        lost = f" (left out: {dropped.described()})" if dropped else ""
        if not self._pairs:
            return (
                f"the {len(self._shards)} shards of {self.name} hold no pair{lost}: check that they are the right files"
            )
        return (
            f"the shards of {self.name} hold {self._pairs} pairs{lost}, and a batch takes {needed:.4g} of them: make "
            "data.batch_size or the weight smaller, since a pair twice in a batch is its own negative"
        )

    def _made(self, epoch: int, window: int) -> Window:
        size, seed = self._settings.shuffle_shards, [self._settings.seed, self._number, epoch]
        if self._settings.replacement:
            chosen = np.random.default_rng([*seed, window]).permutation(self._shards)[:size]
        else:
            chosen = np.random.default_rng(seed).permutation(self._shards)[window * size : (window + 1) * size]
        return Window(self._opener.open(chosen.tolist()), chosen.tolist(), [*seed, window, 0])
