"""Tar shards as webdataset and img2dataset write them, read at any place: `key.jpg`, `key.txt`, `key.json`."""

import glob
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
from webdataset.tariterators import base_plus_ext

from align_train.corpus.images import Unusable

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "image"})


class Span(NamedTuple):
    """Where a file's bytes lie in its tar."""

    offset: int
    size: int


@dataclass(slots=True)
class Row:
    """One pair of a shard: its key, and where its image and caption lie; None where the tar has none."""

    key: str
    image: Span | None = None
    caption: Span | None = None


class Index(NamedTuple):
    """The pairs of a tar, and whether it ends as a tar should, with a block of zeros."""

    rows: list[Row]
    whole: bool


class Shard:
    """One tar file. Its index is built from the tar's headers when first needed, then kept until `close`.

    A tar that ends too early gives the pairs before the break. The others are counted as truncated_shard: as many as
    the sidecar promises, or one where there is no sidecar to tell.

    Args:
        path: the tar. A parquet of the same name beside it, the sidecar, tells the number of pairs at once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __len__(self) -> int:
        return self._length

    @cached_property
    def _length(self) -> int:
        """Pairs the shard should hold: what the sidecar says, else what the tar has."""
        sidecar = self.path.with_suffix(".parquet")
        if not sidecar.is_file():
            return len(self.rows) + (not self._index.whole)
        try:
            with pq.ParquetFile(sidecar) as file:
                if not set(file.schema_arrow.names) >= {"status", "error_message"}:
                    return int(file.metadata.num_rows)
                # img2dataset has a row for every link that it tried
                return int(file.read(columns=["status"])["status"].to_pylist().count("success"))
        except Exception as error:
            message = f"{sidecar} is not readable parquet ({error}): remove it or write the shard again"
            raise ValueError(message) from error

    @property
    def rows(self) -> list[Row]:
        """The pairs in the order of the tar; fewer than `len` where it is truncated."""
        return self._index.rows

    @cached_property
    def _index(self) -> Index:
        try:
            with self.path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
                rows = _pairs(_whole_members(tar, os.fstat(file.fileno()).st_size))
                file.seek(tar.offset)
                whole = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
        except tarfile.ReadError as error:
            raise ValueError(f"{self.path} is not a tar file ({error}): remove it or write the shard again") from error
        if not whole and rows and (rows[-1].image is None or rows[-1].caption is None):
            rows.pop()  # the pair that the break went through
        return Index(rows, whole)

    def read(self, number: int) -> tuple[str, bytes, str]:
        """Key, encoded image and caption of a pair.

        Raises:
            Unusable: truncated_shard, no_image, no_caption or empty_caption.
        """
        if number >= len(self.rows):
            raise Unusable("truncated_shard", f"{self.path} ends before its pair {number}")
        row = self.rows[number]
        where = f"{row.key} in {self.path}"
        if row.image is None:
            raise Unusable("no_image", where)
        if row.caption is None:
            raise Unusable("no_caption", where)
        caption = self._bytes(row.caption, where).decode("utf-8", "replace").strip()
        if not caption:
            raise Unusable("empty_caption", where)
        return row.key, self._bytes(row.image, where), caption

    def _bytes(self, span: Span, where: str) -> bytes:
        content = os.pread(self._descriptor, span.size, span.offset)
        if len(content) < span.size:
            raise Unusable("truncated_shard", where)
        return content

    @cached_property
    def _descriptor(self) -> int:
        return os.open(self.path, os.O_RDONLY)

    def close(self) -> None:
        """Close the file and forget the index; both come again when needed."""
        self.__dict__.pop("_index", None)
        if "_descriptor" in self.__dict__:
            os.close(self.__dict__.pop("_descriptor"))

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_descriptor"}


class OpenShards:
    """Reads shards and closes those that were not read for long: no process can hold a whole corpus open.

    Args:
        limit: shards that may be open at a time.
    """

    def __init__(self, limit: int = 64) -> None:
        self.limit = limit
        self._recent: dict[Shard, None] = {}  # the one read last comes last

    def read(self, shard: Shard, number: int) -> tuple[str, bytes, str]:
        """As `Shard.read`."""
        self._recent.pop(shard, None)
        self._recent[shard] = None
        if len(self._recent) > self.limit:
            oldest = next(iter(self._recent))
            del self._recent[oldest]
            oldest.close()
        return shard.read(number)


def find_shards(patterns: str | Sequence[str]) -> list[Shard]:
    """The shards that file names or globs match, sorted by name; a folder stands for its tars.

    Raises:
        FileNotFoundError: a pattern matches nothing; the message names it.
    """
    paths: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        wanted = os.path.join(glob.escape(pattern), "*.tar") if os.path.isdir(pattern) else pattern
        found = sorted(glob.glob(wanted, recursive=True))
        if not found:
            folder = Path(wanted).parent
            raise FileNotFoundError(
                f"no shard matches {pattern!r}: write the shards first (`align-train prepare` writes the sample "
                f"corpus), or point data at yours; looked in {folder.absolute()}"
            )
        paths += found
    return [Shard(Path(path)) for path in paths]


def _whole_members(tar: tarfile.TarFile, size: int) -> Iterator[tarfile.TarInfo]:
    """Files of a tar up to where it ends or breaks."""
    with suppress(tarfile.ReadError):
        while (member := tar.next()) is not None:
            if member.isfile() and member.offset_data + member.size <= size:
                yield member


def _pairs(members: Iterable[tarfile.TarInfo]) -> list[Row]:
    """Members to pairs by key. A second image or caption of a key begins another pair: none hides another."""
    rows: list[Row] = []
    newest: dict[str, Row] = {}
    for member in members:
        key, extension = base_plus_ext(member.name)
        if key is None:
            continue
        kind = "image" if extension.lower() in IMAGE_EXTENSIONS else "caption" if extension.lower() == "txt" else None
        row = newest.get(key)
        if row is None or (kind and getattr(row, kind)):
            row = newest[key] = Row(key)
            rows.append(row)
        if kind:
            setattr(row, kind, Span(member.offset_data, member.size))
    return rows
