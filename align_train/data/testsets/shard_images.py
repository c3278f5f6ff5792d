"""Images that lie in tar shards."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from align_train.corpus.images import Unusable
from align_train.data.storage.addresses import is_remote
from align_train.data.storage.shards import OpenFiles, Shard, all_places
from align_train.data.storage.tars import Span
from align_train.data.testsets.checks import SHOWN, refuse
from align_train.data.testsets.sets import digest, file_identity
from align_train.records import Tally

log = logging.getLogger(__name__)
T = TypeVar("T")


class ShardImages:
    """N images of shards.

    Args:
        shards: what the numbers count.
        keys: name of each image.
        places: number of its shard, and where it lies there.
    """

    def __init__(self, shards: Sequence[Shard], keys: Sequence[str], places: Sequence[tuple[int, Span]]) -> None:
        self.shards, self.keys, self.places = list(shards), tuple(keys), tuple(places)

    @property
    def identity(self) -> str:
        """Of the tars, as `file_identity`, or the addresses and sizes of remote ones, and of where images lie there."""
        return digest([*map(_shard_identity, self.shards), *map(str, self.places)])

    def read(self, number: int) -> bytes:
        """The file of an image; a shard is opened for it, so that threads share nothing.

        Raises:
            Unusable: truncated_shard, since the tar has become shorter.
            OSError: the tar cannot be read.
        """
        shard, span = self.places[number]

        def part(path: Path) -> bytes:
            with path.open("rb", buffering=0) as file:
                return os.pread(file.fileno(), span.size, span.offset)

        content = self.shards[shard].opened(part)
        if len(content) < span.size:
            raise Unusable("truncated_shard", self.where(number))
        return content

    def where(self, number: int) -> str:
        """Its key and shard."""
        return f"{self.keys[number]} in {self.shards[self.places[number][0]]}"

    def columns(self, names: Sequence[str]) -> dict[str, list[Any]]:
        """Columns of the sidecars, each with the values of the N images in their order.

        Raises:
            ValueError: a shard has no sidecar, or the sidecar no such column or no row for an image.
        """
        found: dict[str, list[Any]] = {name: [] for name in names}
        rows = [_sidecar(shard, names) for shard in self.shards] if names else []
        for number, shard in enumerate(self.shards if names else ()):
            keys = [key for key, (of, _) in zip(self.keys, self.places, strict=True) if of == number]
            lost = [key for key in keys if key not in rows[number]]
            refuse(shard, lost, len(keys), "images have no row in the sidecar", "Write the shard again")
        for key, (shard_number, _) in zip(self.keys, self.places, strict=True):
            for name in names:
                found[name].append(rows[shard_number][key][name])
        return found


def read_shards(
    shards: Sequence[Shard], kinds: Sequence[str], take: Callable[[Mapping[str, bytes], str], T]
) -> tuple[ShardImages, list[T], Tally]:
    """The images of shards, what `take` makes of the members of each by kind, and what could not be used.

    Args:
        shards: what to read, in this order.
        kinds: of members.
        take: raises Unusable where the members will not do; its second argument names them in messages.

    Raises:
        ValueError: a file is no tar, or two shards have a pair of the same key.
        OSError: a tar cannot be read.
    """
    files, dropped = OpenFiles(), Tally()
    keys, places, found = list[str](), list[tuple[int, Span]](), list[T]()
    for place in all_places(shards, kinds):
        where = f"{place.key} in {shards[place.shard]}"
        try:
            if place.lost or place.image is None:
                raise Unusable(place.lost, where)
            path = shards[place.shard].path
            found.append(take({kind: files.read(path, span, where) for kind, span in place.texts.items()}, where))
        except Unusable as problem:
            dropped[problem.reason] += 1
            if dropped.total() <= SHOWN:
                log.warning("left out %s", problem)
            continue
        keys.append(place.key)
        places.append((place.shard, place.image))
    files.close()
    return ShardImages(shards, keys, places), found, dropped


def _shard_identity(shard: Shard) -> str:
    """Of a remote shard there is no time of writing: a copy of it has the time of its download."""
    return f"{shard} {shard.size}" if is_remote(shard.address) else file_identity(str(shard.path))


def _sidecar(shard: Shard, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The rows of a shard's sidecar by key."""
    table = shard.metadata(["key", *names]) if shard.sidecar else None
    there = [] if table is None else table.column_names
    lacks = [name for name in ("key", *names) if name not in there]
    if table is None or lacks:
        raise ValueError(f"the column {lacks[-1]!r} is asked for, but {shard} has no sidecar with it")
    return {row["key"]: row for row in table.to_pylist()}
