"""The order in which training sees pairs: a function of seed, epoch and shard list, whoever reads them.

An epoch permutes the shards and cuts them into windows; the pairs of a window are permuted together. So only one
window's shards are being read at a time, no shard needs to be opened before its turn, and where the order goes on is
said by three numbers: epoch, window, and pair of the window. Nothing here knows of ranks or workers.
"""

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from align_train.data.crew import Crew
from align_train.data.opening import Opened, Opener
from align_train.data.sources import Source
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
        replacement: draw the shards of each window anew from all of them, instead of each once an epoch.
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
        if self.samples_per_epoch is not None and self.samples_per_epoch < 1:
            raise ValueError(f"data.order.samples_per_epoch is {self.samples_per_epoch}; an epoch has at least 1 pair")
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
    """

    def __init__(
        self, name: str, number: int, shards: Sequence[int], opener: Opener, settings: OrderSettings, cursor: Cursor
    ) -> None:
        self.name, self.cursor = name, cursor
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
        """Pairs of the window at the cursor, 0 where it is not open."""
        return len(self._window) if self._window else 0

    def take(self, count: int, usual: float) -> tuple[list[Drawn], Tally]:
        """The next pairs, and what was left out on the way to them.

        Args:
            count: how many.
            usual: how many are taken at a time in the mean.

        Raises:
            ValueError: an epoch has no pair, or fewer than are usually taken at a time.
        """
        taken: list[Drawn] = []
        dropped = Tally()
        while len(taken) < count:
            window = self._open(dropped)
            start = self.cursor.pair
            stop = min(len(window), start + count - len(taken))
            taken += [(window, pair) for pair in range(start, stop)]
            self.cursor = self.cursor._replace(pair=stop)
            ended = stop == len(window) and len(taken) < count and self._next_window(usual, dropped)
            if ended and taken and self._settings.epoch_end == "drop":
                dropped["epoch_tail"] += len(taken)
                taken = []
        return taken, dropped

    def _open(self, dropped: Tally) -> Window:
        """The window at the cursor; what it leaves out is counted when it is begun."""
        if self._window is None:
            place = self.cursor.epoch, self.cursor.window
            opening = self._opening[1] if self._opening and self._opening[0] == place else None
            self._window = opening.result() if opening else self._made(*place)
            ahead = divmod(place[0] * self.windows + place[1] + 1, self.windows)
            self._opening = ahead, self._ahead.submit(self._made, *ahead)
            if self.cursor.pair == 0:
                dropped.update(self._window.dropped)
                if self._pairs is not None:
                    self._pairs += len(self._window)
        return self._window

    def _next_window(self, usual: float, dropped: Tally) -> bool:
        """Move on; True where an epoch has ended."""
        self._window = None
        epoch, window, _ = self.cursor
        if window + 1 < self.windows:
            self.cursor = Cursor(epoch, window + 1)
            return False
        if self._pairs is not None and (self._pairs < usual or not self._pairs):
            raise ValueError(self._too_few(usual, dropped))
        self.cursor, self._pairs = Cursor(epoch + 1), 0
        return True

    def _too_few(self, usual: float, dropped: Tally) -> str:
        lost = f" (left out: {dropped.described()})" if dropped else ""
        if not self._pairs:
            return (
                f"the {len(self._shards)} shards of {self.name} hold no pair{lost}: check that they are the right files"
            )
        return (
            f"the shards of {self.name} hold {self._pairs} pairs{lost}, and a batch takes {usual:.4g} of them: make "
            "data.batch_size or the weight smaller, since a pair twice in a batch is its own negative"
        )

    def _made(self, epoch: int, window: int) -> Window:
        size, seed = self._settings.shuffle_shards, [self._settings.seed, self._number, epoch]
        if self._settings.replacement:
            chosen = np.random.default_rng([*seed, window, 1]).choice(self._shards, size)
        else:
            chosen = np.random.default_rng(seed).permutation(self._shards)[window * size : (window + 1) * size]
        return Window(self._opener.open(chosen.tolist()), chosen.tolist(), [*seed, window, 0])


class Order:
    """All pairs that training draws, from several sources, without end.

    Sources without weights are one sequence, in which every pair comes once an epoch. Sources with weights are a
    sequence each, with epochs of its own; for each pair that is drawn, seed and number say from which.

    Args:
        sources: what to read.
        settings: how it is ordered.
        opener: opens their shards.
        state: where to go on, from `state`; None begins.

    Raises:
        ValueError: the state is of other shards or settings.
    """

    def __init__(
        self, sources: Sequence[Source], settings: OrderSettings, opener: Opener, state: Mapping[str, Any] | None = None
    ) -> None:
        self._sources, self._settings, self._opener = sources, settings, opener
        self._lists = _lists(sources)
        weights = np.array([source.weight or 1.0 for source in sources])
        self._weights = weights / weights.sum() if len(self._lists) > 1 else np.ones(1)
        state = self._checked(state) if state else {"drawn": 0, "cursors": {}}
        self.drawn: int = state["drawn"]
        self._streams, first = [], 0
        for number, (name, shards) in enumerate(self._lists.items()):
            cursor = Cursor(*state["cursors"].get(name, ()))
            self._streams.append(Stream(name, number, range(first, first + len(shards)), opener, settings, cursor))
            first += len(shards)

    @property
    def state(self) -> dict[str, Any]:
        """Where the order goes on: plain values, the same whatever the number of ranks and workers."""
        return {
            "drawn": self.drawn,
            "cursors": {stream.name: list(stream.cursor) for stream in self._streams},
            "epochs": {stream.name: stream.epochs for stream in self._streams},
            "window_pairs": {stream.name: stream.window_pairs for stream in self._streams},
            "of": self._identity,
        }

    def at(self, state: Mapping[str, Any]) -> "Order":
        """The same order, at another place."""
        return Order(self._sources, self._settings, self._opener, state)

    def take(self, count: int) -> tuple[list[Drawn], Tally]:
        """The next pairs, and what was left out on the way; ValueError as `Stream.take`."""
        if len(self._streams) == 1:
            taken, dropped = self._streams[0].take(count, count)
        else:
            chosen = self._chosen(count)
            dropped, parts = Tally(), []
            for number, stream in enumerate(self._streams):
                part, lost = stream.take(int((chosen == number).sum()), count * self._weights[number])
                parts.append(iter(part))
                dropped.update(lost)
            taken = [next(parts[number]) for number in chosen]
        self.drawn += count
        return taken, dropped

    def _chosen(self, count: int) -> np.ndarray:
        """The source of each of the next pairs, int (count,): drawn in blocks, so that any number begins anywhere."""
        size = 4096
        first, last = self.drawn // size, (self.drawn + count - 1) // size
        blocks = [
            np.random.default_rng([self._settings.seed, block]).choice(len(self._weights), size, p=self._weights)
            for block in range(first, last + 1)
        ]
        start = self.drawn - first * size
        return np.concatenate(blocks)[start : start + count]

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """What the cursors mean something for."""
        return {
            "seed": self._settings.seed,
            "shuffle_shards": self._settings.shuffle_shards,
            "replacement": self._settings.replacement,
            "shards": {name: [len(shards), _digest(shards)] for name, shards in self._lists.items()},
        }

    def _checked(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        before, now = state["of"], self._identity
        changed = [name for name in now if now[name] != before.get(name)]
        if not changed:
            return state
        if self._settings.on_change == "next_epoch":
            epoch = 1 + max(cursor[0] for cursor in state["cursors"].values())
            return {"drawn": state["drawn"], "cursors": {name: [epoch, 0, 0] for name in self._lists}}
        told = "; ".join(f"{name} was {before.get(name)}, now {now[name]}" for name in changed)
        raise ValueError(
            f"the checkpoint's place in the data is of other shards or another order ({told}): give those of before, "
            "or begin the next epoch of the new ones with data.order.on_change=next_epoch"
        )


def _lists(sources: Sequence[Source]) -> dict[str, list[str]]:
    """Names of shards by stream: one for all sources without weights, else one for each."""
    if sources[0].weight is None:
        return {"+".join(source.name for source in sources): [s.address for source in sources for s in source.shards]}
    return {source.name: [shard.address for shard in source.shards] for source in sources}


def _digest(addresses: Sequence[str]) -> str:
    """Of the files' names alone, in order: a corpus may be moved."""
    names = "\n".join(address.rpartition("/")[2] for address in addresses)
    return hashlib.sha256(names.encode()).hexdigest()[:16]
