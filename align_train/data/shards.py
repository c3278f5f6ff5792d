"""Tar shards as webdataset and img2dataset write them, read at any place: `key.jpg`, `key.txt`, `key.json`."""

import glob
import os
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
from webdataset.tariterators import base_plus_ext

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


class Unusable(Exception):
    """A pair that cannot be used. `reason` is the name it is counted under."""

    def __init__(self, reason: str, where: str) -> None:
        super().__init__(f"{reason}: {where}")
        self.reason = reason


class Shard:
    """One tar file. Its index is built from the tar's headers when first needed, then kept.

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
            return len(self.rows)
        try:
            return int(pq.read_metadata(sidecar).num_rows)  # type: ignore[no-untyped-call]
        except Exception as error:
            raise ValueError(f"{sidecar} is not readable parquet ({error}): remove it or write the shard again") from error

    @cached_property
    def rows(self) -> list[Row]:
        """The pairs in the order of the tar; fewer than `len` where it is truncated."""
        rows: dict[str, Row] = {}
        try:
            with tarfile.open(self.path, "r:") as tar:
                for member in _readable_members(tar):
                    _place(rows, member)
        except tarfile.ReadError as error:
            raise ValueError(f"{self.path} is not a tar file ({error}): remove it or write the shard again") from error
        return list(rows.values())

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
        """Close the file; it opens again when needed."""
        if "_descriptor" in self.__dict__:
            os.close(self.__dict__.pop("_descriptor"))

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_descriptor"}


def find_shards(patterns: str | Sequence[str]) -> list[Shard]:
    """The shards that file names or globs match, sorted by name.

    Raises:
        FileNotFoundError: a pattern matches nothing; the message names it.
    """
    paths: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = sorted(glob.glob(pattern, recursive=True))
        if not found:
            folder = Path(glob.escape(pattern)).parent
            raise FileNotFoundError(
                f"no shard matches {pattern!r}: write the shards first (`align-train prepare` writes the sample "
                f"corpus), or point data at yours; looked in {folder.absolute()}"
            )
        paths += found
    return [Shard(Path(path)) for path in paths]


def _readable_members(tar: tarfile.TarFile) -> Iterable[tarfile.TarInfo]:
    """Files of a tar up to where it ends or breaks; what a sidecar promises beyond is counted by `read`."""
    while True:
        try:
            member = tar.next()
        except tarfile.ReadError:
            if not tar.getmembers():
                raise
            return
        if member is None:
            return
        if member.isfile():
            yield member


def _place(rows: dict[str, Row], member: tarfile.TarInfo) -> None:
    key, extension = base_plus_ext(member.name)
    if key is None:
        return
    row = rows.setdefault(key, Row(key))
    span = Span(member.offset_data, member.size)
    if extension.lower() in IMAGE_EXTENSIONS:
        row.image = span
    elif extension.lower() == "txt":
        row.caption = span
