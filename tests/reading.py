"""Tars as tests want them, and how the data engine reads them."""

import io
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from conftest import drawn_pair

from align_train.batch import Batch
from align_train.corpus.images import Unusable
from align_train.data import (
    Augmentation,
    BatchPlans,
    Loader,
    Opener,
    Order,
    OrderSettings,
    PairReader,
    Reading,
    Source,
    read_sources,
)
from align_train.data.storage.cache import Cache
from align_train.data.storage.shards import PairFiles, Shard, all_places
from align_train.records import Preprocessing

SMALL = Preprocessing(resize=12, crop=10, max_tokens=8)
NONE = Augmentation(flip=0.0)
FULL = Augmentation(flip=0.5, rotation=15, scale=0.1, shift=0.1, contrast=0.3, colour=20)


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """A tar of (name, content), without a sidecar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def pair_members(number: int, image: bytes | None = None) -> list[tuple[str, bytes]]:
    pair = drawn_pair(number)
    return [(f"{pair.key}.jpg", image or pair.image), (f"{pair.key}.txt", pair.caption.encode())]


def read_all(shard: Shard) -> list[tuple[str, bytes, str] | str]:
    """What each pair of a shard gives: its key, image and caption, or the reason why it is unusable."""
    files, found = PairFiles([shard]), list[tuple[str, bytes, str] | str]()
    for place in all_places([shard]):
        try:
            found.append((place.key, *files.read(place)))
        except Unusable as problem:
            found.append(problem.reason if str(shard.path) in str(problem) else "unnamed file")
    return found


def sources(**given: Mapping[str, Any] | Path | str) -> list[Source]:
    """Sources by name, from settings or from the shards alone."""
    train = {name: value if isinstance(value, Mapping) else {"shards": str(value)} for name, value in given.items()}
    return read_sources(train, Cache("unused"))


def order_of(read: list[Source], state: Mapping[str, Any] | None = None, **settings: Any) -> Order:
    return Order(read, OrderSettings(**settings), Opener(read, stall_seconds=60, max_quarantined=1.0), state)


def keys(order: Order, count: int, batch: int | None = None) -> list[str]:
    """Keys of the next pairs, drawn a batch at a time."""
    return [
        window[pair].key for _ in range(count // (batch or count)) for window, pair in order.take(batch or count)[0]
    ]


def batches(
    read: list[Source],
    *,
    batch_size: int = 8,
    steps: int = 6,
    workers: int = 0,
    augmentation: Augmentation = FULL,
    rank: int = 0,
    world_size: int = 1,
    start: int = 0,
    state: Mapping[str, Any] | None = None,
    reading: Reading | None = None,
    **settings: Any,
) -> Iterator[Batch]:
    """What training would get from step `start` on."""
    reading = reading or Reading(stall_seconds=60, max_quarantined=1.0, cache=Cache("unused"))
    order = OrderSettings(**{"seed": 1, **settings})
    opener = Opener(read, reading.stall_seconds, reading.max_quarantined)
    plans = BatchPlans(Order(read, order, opener, state), batch_size, start, steps, rank, world_size)
    reader = PairReader(read, SMALL, augmentation, order.seed, reading.keep_decoded, reading.scaled_decoding)
    return iter(Loader(reader, plans, workers, reading))
