"""How many pairs an epoch has, without opening every shard."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from align_train.data.opening import Opener, counted_not_told
from align_train.data.sources import Source
from align_train.data.storage.addresses import is_remote
from align_train.data.windows import OrderSettings

MOST = 16  # shards of a source that are opened: some 0.2 s each for 10,000 pairs, eight at a time


@dataclass(frozen=True)
class Epoch:
    """Pairs that training draws, from all sources together, until it has been through; counted, or extrapolated."""

    pairs: int
    exact: bool


def count_epochs(sources: Sequence[Source], order: OrderSettings, most: int = MOST) -> dict[str, Epoch]:
    """The epoch of every sequence of pairs that training draws from, by the names that `effective_epochs` has.

    Sources without weights are one sequence; of those with weights, each is one, whose epoch is the longer the smaller
    its share of a batch is. Usable pairs after rules are counted. Of more than `most` shards a source, evenly spread
    ones are opened and stand for the others. Remote shards would have to be downloaded: nothing is said of those.
    """
    if order.samples_per_epoch:
        return {"all": Epoch(order.samples_per_epoch, True)}
    counted = {source.name: _count(source, most) for source in sources}
    known = {name: epoch for name, epoch in counted.items() if epoch is not None and epoch.pairs}
    if sources[0].weight is None:
        pairs, exact = sum(epoch.pairs for epoch in known.values()), all(epoch.exact for epoch in known.values())
        return {"+".join(counted): Epoch(pairs, exact)} if len(known) == len(counted) else {}
    weights = {source.name: source.weight or 1.0 for source in sources}
    total = sum(weights.values())
    return {name: Epoch(round(epoch.pairs * total / weights[name]), epoch.exact) for name, epoch in known.items()}


def _count(source: Source, most: int) -> Epoch | None:
    """The pairs of a source, each shard as often as it is listed; None where its shards are far away or unreadable."""
    if any(is_remote(shard.address) for shard in source.shards):
        return None
    numbers = {shard.address: number for number, shard in enumerate(source.shards)}  # of each shard once
    chosen = np.linspace(0, len(numbers) - 1, min(most, len(numbers))).round().astype(int)
    wanted = [list(numbers.values())[place] for place in chosen]
    try:
        with counted_not_told():  # they are told of when training comes to them
            opened = Opener([source], max_quarantined=1.0).open(wanted)
    except (ValueError, OSError):
        return None  # training will stop with it, and say so
    found = {source.shards[number].address: len(shard.rows) for number, shard in opened.items()}
    if len(numbers) > most:
        return Epoch(round(sum(found.values()) / len(chosen) * len(source.shards)), False)
    return Epoch(sum(found.get(shard.address, 0) for shard in source.shards), True)
