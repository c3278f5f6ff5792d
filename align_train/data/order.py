"""The order in which training sees pairs: a function of seed, epoch and shard list, whoever reads them.

An epoch permutes the shards and cuts them into windows; the pairs of a window are permuted together. So only one
window's shards are being read at a time, no shard needs to be opened before its turn, and where the order goes on is
said by three numbers: epoch, window, and pair of the window. Nothing here knows of ranks or workers.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from align_train.data.opening import Opener
from align_train.data.sources import Source
from align_train.data.windows import Cursor, Drawn, OrderSettings, Stream
from align_train.records import Tally


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
            before = state.get("window_pairs", {}).get(name, 0) if cursor.pair else 0
            self._streams.append(
                Stream(name, number, range(first, first + len(shards)), opener, settings, cursor, before)
            )
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
            "shards": [[name, len(shards), _digest(shards)] for name, shards in self._lists.items()],
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
