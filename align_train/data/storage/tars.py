"""What is in a tar, and where: its headers read once, without the files between them."""

import os
import re
import tarfile
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "image"})
IMAGE = "image"  # the kind of member that holds the picture, whatever its extension; other kinds are extensions

_BLOCK = tarfile.BLOCKSIZE
_ZEROS = bytes(_BLOCK)
_FILE_OR_FOLDER = (b"0", b"\0", b"5")
_SPECIAL = (b"L", b"K", b"x", b"g", b"X", b"S", b"7", b"1", b"2", b"3", b"4", b"6")  # long names, links, devices ...


class Span(NamedTuple):
    """Where a file's bytes lie in its tar."""

    offset: int
    size: int


class BrokenShard(ValueError):
    """A shard that cannot be read as what it should be; the message names it and the remedy."""


class _SpecialHeader(Exception):
    """A header that only the standard library is to read: long names, other dialects."""


@dataclass(frozen=True)
class Index:
    """The n pairs of a tar, in the order in which they begin.

    Attributes:
        keys: name of each pair.
        spans: int64 (n, 2) for each kind of member, offset and size; size -1 where a pair has none.
        repeated: bool (n,), whether an earlier pair has the same key.
        whole: whether the tar ends as a tar should, with a block of zeros.
    """

    keys: list[str]
    spans: dict[str, np.ndarray]
    repeated: np.ndarray
    whole: bool

    def __len__(self) -> int:
        return len(self.keys)

    def has(self, kind: str) -> np.ndarray:
        """Bool (n,): which pairs have a member of this kind."""
        return self.spans[kind][:, 1] >= 0

    def span(self, kind: str, row: int) -> Span | None:
        """Where that member of a pair lies; None where there is none."""
        offset, size = self.spans[kind][row].tolist()
        return Span(offset, size) if size >= 0 else None


def read_index(path: str | Path, kinds: Collection[str] = ("txt",)) -> Index:
    """Which pairs a tar holds, and where their images and the other `kinds` of members lie.

    Members of a pair need not be neighbours. A second member of one kind under a key that has one begins another pair
    of that key, which is `repeated`, so that none hides another.

    Args:
        path: an uncompressed tar.
        kinds: extensions of the members that are wanted beside the image, such as `txt` and `json`.

    Raises:
        BrokenShard: it is no tar.
        OSError: it cannot be read.
    """
    members, whole = _members(path)
    keys: list[str] = []
    newest: dict[str, int] = {}  # the row that a key began last
    repeated: list[bool] = []
    found: dict[str, dict[int, Span]] = {kind: {} for kind in (IMAGE, *kinds)}  # by row
    for name, span in members:
        key, kind = _key_and_kind(name)
        if not key:
            continue
        row = newest.get(key)
        if row is None or row in found.get(kind, ()):
            repeated.append(row is not None)
            row = newest[key] = len(keys)
            keys.append(key)
        if kind in found:
            found[kind][row] = span
    last = len(keys) - 1
    if not whole and keys and (last not in found[IMAGE] or not any(last in found[kind] for kind in kinds)):
        keys.pop()  # the pair that the break went through
        repeated.pop()
        for rows in found.values():
            rows.pop(last, None)
    return Index(keys, {kind: _spans(len(keys), rows) for kind, rows in found.items()}, np.array(repeated, bool), whole)


def _spans(count: int, rows: Mapping[int, Span]) -> np.ndarray:
    spans = np.full((count, 2), -1, np.int64)
    if rows:
        spans[list(rows)] = list(rows.values())
    return spans


def _key_and_kind(name: str) -> tuple[str, str]:
    """As webdataset splits names: folders and all up to the first dot of the file are the key, the rest the kind.

    Hidden files belong to nobody; webdataset takes the ._cat.jpg that macOS leaves beside cat.jpg for a pair.
    """
    folder, slash, file = name.rpartition("/")
    stem, dot, extension = file.partition(".")
    if not stem or not dot:
        return "", ""
    extension = extension.lower()
    return folder + slash + stem, IMAGE if extension in IMAGE_EXTENSIONS else extension


def _members(path: str | Path) -> tuple[list[tuple[str, Span]], bool]:
    """Names and places of the files up to where the tar ends or breaks, and whether it ends as it should."""
    with open(path, "rb", buffering=0) as file:
        try:
            return _plain_members(file.fileno(), os.fstat(file.fileno()).st_size)
        except _SpecialHeader:
            return _any_members(file, path)


def _plain_members(file: int, size: int) -> tuple[list[tuple[str, Span]], bool]:
    """As the standard library reads a tar of plain headers, ten times as fast."""
    members: list[tuple[str, Span]] = []
    offset = 0
    while True:
        header = os.pread(file, _BLOCK, offset)
        if header == _ZEROS and offset:
            return members, True
        kind = header[156:157]
        if header[257:262] != b"ustar" or kind not in _FILE_OR_FOLDER:
            if offset and kind not in _SPECIAL:
                return members, False  # broken, or cut off
            raise _SpecialHeader
        length = header[124:136].strip(b"\0 ")
        if header[124] & 0x80:
            raise _SpecialHeader  # a file over 8 GiB
        if not re.fullmatch(rb"[0-7]+", length):
            return members, False
        span = Span(offset + _BLOCK, int(length, 8))
        if kind != b"5":
            if span.offset + span.size > size:
                return members, False
            folder, name = header[345:500].partition(b"\0")[0], header[:100].partition(b"\0")[0]
            name = folder + b"/" + name if folder else name
            members.append((name.decode("utf-8", "surrogateescape"), span))
        offset = span.offset + -(-span.size // _BLOCK) * _BLOCK


def _any_members(file: BinaryIO, path: str | Path) -> tuple[list[tuple[str, Span]], bool]:
    size = os.fstat(file.fileno()).st_size
    members = []
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            with suppress(tarfile.ReadError):
                while (member := tar.next()) is not None:
                    if member.isfile() and member.offset_data + member.size <= size:
                        members.append((member.name, Span(member.offset_data, member.size)))
            file.seek(tar.offset)
            return members, file.read(_BLOCK) == _ZEROS
    except tarfile.ReadError as error:
        raise BrokenShard(f"{path} is not a tar file ({error}): remove it or write the shard again") from error
