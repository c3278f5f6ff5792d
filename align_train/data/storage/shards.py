"""Tar shards as webdataset and img2dataset write them: `key.jpg`, `key.txt`, `key.json`, and perhaps a sidecar."""

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from align_train.corpus.images import Unusable
from align_train.data.captions import Captions
from align_train.data.storage.addresses import expand, is_remote, shown
from align_train.data.storage.cache import Cache
from align_train.data.storage.tars import IMAGE, BrokenShard, Index, Span, read_index

T = TypeVar("T")
TRIES = 5  # to open a copy that a cache too small for its shards lets go of


class Shard:
    """One tar, here or far away, with the parquet of the same name beside it, the sidecar, if there is one.

    Args:
        address: a path, or an address that fsspec opens.
        cache: where copies of what is far away lie.
    """

    def __init__(self, address: str | Path, cache: Cache | None = None) -> None:
        self.address, self._cache = str(address), cache or Cache()

    def __str__(self) -> str:
        return shown(self.address)

    @property
    def path(self) -> Path:
        """The tar on a local disk; brought there, once more if the cache has let it go."""
        return self._cache.path(self.address)

    @property
    def sidecar(self) -> Path | None:
        """The sidecar on a local disk; None where there is none."""
        if not self.address.endswith(".tar"):  # the signature of a signed address is of the tar alone
            return None
        return self._cache.optional(self.address.removesuffix(".tar") + ".parquet")

    @property
    def room(self) -> int:
        """Bytes that the cache of a remote shard may hold; 0 for a local one."""
        return self._cache.limit if is_remote(self.address) else 0

    @property
    def size(self) -> int:
        """Bytes of the tar; 0 where it is not there."""
        try:
            return self.path.stat().st_size
        except OSError:
            return 0

    def opened(self, use: Callable[[Path], T]) -> T:
        """What `use` makes of the tar's path; tried again, since the cache may let go of a copy before it is opened."""
        for _ in range(TRIES - 1):
            with suppress(FileNotFoundError):
                return use(self.path)
        return use(self.path)

    def index(self, kinds: Collection[str] = ("txt",)) -> Index:
        """Its pairs; BrokenShard and OSError as `read_index`."""
        return self.opened(lambda path: read_index(path, kinds))

    def lost(self, index: Index) -> int:
        """Pairs that are missing since the tar ends too early: as many as the sidecar promises, at least one."""
        return 0 if index.whole else max(self._promised - len(index), 1)

    def bring(self) -> None:
        """Copy tar and sidecar to the local disk where they are far away."""
        _ = self.path, self.sidecar

    @property
    def sidecar_columns(self) -> list[str]:
        """Names of the sidecar's columns, none where there is none; BrokenShard where it is no parquet file."""
        if self.sidecar is None:
            return []
        try:
            return list(pq.read_schema(self.sidecar).names)
        except Exception as error:
            raise BrokenShard(self._unreadable(error)) from error

    def metadata(self, columns: Collection[str]) -> pa.Table:
        """Those of the columns that the sidecar has, of the pairs that the tar should hold.

        Raises:
            BrokenShard: the sidecar is no parquet file, or there is none.
        """
        if self.sidecar is None:
            raise BrokenShard(f"{self} has no sidecar: a parquet of the same name beside it")
        try:
            with pq.ParquetFile(self.sidecar) as file:
                names = set(file.schema_arrow.names)
                # img2dataset has a row for every link that it tried
                tried = {"status"} if names >= {"status", "error_message"} else set()
                table = file.read(columns=sorted(({*columns} & names) | tried))
        except Exception as error:
            raise BrokenShard(self._unreadable(error)) from error
        return table.filter(pc.equal(table["status"], "success")) if tried else table

    def _unreadable(self, error: Exception) -> str:
        return f"{self.sidecar} is not readable parquet ({error}): remove it or write the shard again"

    @cached_property
    def _promised(self) -> int:
        return 0 if self.sidecar is None else len(self.metadata(["key"]))


class Place(NamedTuple):
    """Where a pair lies, for whoever reads it.

    Attributes:
        shard: number of the shard in a list.
        row: number of the pair in the shard.
        key: its name.
        image: where the encoded image lies.
        texts: where its other members lie, by kind; those that it has.
        lost: why it cannot be used, where that is known; else empty.
    """

    shard: int
    row: int
    key: str
    image: Span | None
    texts: Mapping[str, Span]
    lost: str = ""


def place_of(shard: int, index: Index, row: int) -> Place:
    """The place of a pair by its row in the index."""
    spans = {kind: index.span(kind, row) for kind in index.spans}
    image = spans.pop(IMAGE)
    return Place(shard, row, index.keys[row], image, {kind: span for kind, span in spans.items() if span})


class OpenFiles:
    """Reads parts of files and keeps those open that were read last: no process can hold a whole corpus open.

    Args:
        limit: files that may be open at a time.
    """

    def __init__(self, limit: int = 32) -> None:
        self.limit = limit
        self._descriptors: dict[Path, int] = {}  # the one read last comes last

    def read(self, path: Path, span: Span, where: str) -> bytes:
        """The bytes of the span; `where` names them in messages.

        Raises:
            Unusable: truncated_shard, since the file has become shorter.
            OSError: the file cannot be opened or read.
        """
        descriptor = self._descriptors.pop(path, None)
        if descriptor is None:
            descriptor = os.open(path, os.O_RDONLY)
        self._descriptors[path] = descriptor
        if len(self._descriptors) > self.limit:
            os.close(self._descriptors.pop(next(iter(self._descriptors))))
        content = os.pread(descriptor, span.size, span.offset)
        if len(content) < span.size:
            raise Unusable("truncated_shard", where)
        return content

    def close(self) -> None:
        """Close all; they open again when needed."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, object]:
        return {"limit": self.limit, "_descriptors": {}}


def find_shards(patterns: str | Sequence[str], cache: Cache | None = None) -> list[Shard]:
    """The shards that paths, globs, folders, brace ranges and addresses stand for, see `expand`."""
    cache = cache or Cache()
    return [Shard(address, cache) for address in expand(patterns, cache.stall_seconds)]


def all_places(shards: Sequence[Shard], kinds: Collection[str] = ("txt",)) -> Iterator[Place]:
    """Every pair of the shards in their order, also those that are lost with the end of a tar."""
    for number, shard in enumerate(shards):
        index = shard.index(kinds)
        for row in range(len(index)):
            place = place_of(number, index, row)
            reason = "duplicate_key" if index.repeated[row] else "" if place.image else "no_image"
            yield place._replace(lost=reason)
        for row in range(len(index), len(index) + shard.lost(index)):
            yield Place(number, row, f"pair {row}", None, {}, "truncated_shard")


class PairFiles:
    """Reads pairs of shards by their places.

    Args:
        shards: what the places' numbers count.
        captions: where captions come from.
    """

    def __init__(self, shards: Sequence[Shard], captions: Captions | None = None) -> None:
        self.shards, self._files, self._captions = list(shards), OpenFiles(), captions or Captions()

    def where(self, place: Place) -> str:
        """A pair's key and shard, for messages."""
        return f"{place.key} in {self.shards[place.shard]}"

    def read(self, place: Place) -> tuple[bytes, str]:
        """Encoded image and caption; Unusable where one is missing."""
        where = self.where(place)
        if place.lost or place.image is None:
            raise Unusable(place.lost, where)
        path = self.shards[place.shard].path
        texts = {kind: self._files.read(path, span, where) for kind, span in place.texts.items()}
        return self._files.read(path, place.image, where), self._captions.choose(texts, None, where)
