"""Pairs to tar shards in the layout of img2dataset, which webdataset reads; each shard appears whole or not at all.

    00000.tar      {key}.webp (as sniffed), {key}.txt (caption), {key}.json (metadata, key, caption) for each pair
    00000.json     counts of pairs, bytes, drops by reason, and seconds since the shard before
    00000.parquet  the sidecar: key, caption, bytes of the image and a column for each name in the metadata

The tars are written with the standard library: webdataset's own writer imports torch.
"""

import json
import re
import tarfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from align_train.files import atomic_write
from align_train.records import Pair, Tally


@dataclass(frozen=True)
class ShardReport:
    """What was written: the tars in order, the number of pairs in them, their size in bytes, and what was dropped."""

    shards: tuple[Path, ...]
    pairs: int
    bytes: int
    dropped: Tally

    def described(self) -> str:
        """One line for a log."""
        size = f"{self.pairs:,} pairs in {len(self.shards)} shards, {self.bytes / 1e6:.1f} MB"
        return f"{size}; dropped: {self.dropped.described()}"


def write_shards(
    pairs: Iterable[Pair], folder: str | Path, prefix: str = "", pairs_per_shard: int = 1000, overwrite: bool = False
) -> ShardReport:
    """Writes the pairs to `folder`/`prefix`00000.tar and so on; see ShardWriter."""
    writer = ShardWriter(folder, prefix, pairs_per_shard, overwrite)
    for pair in pairs:
        writer.add(pair)
    return writer.close()


class ShardWriter:
    """Collects pairs and writes a shard whenever one is full; at most one shard is held in memory.

    The same pairs give the same tars, byte for byte. A pair is dropped and counted as `empty_caption`,
    `unknown_image_format` or `duplicate_key` (within this writer).

    Args:
        folder: where the shards go; made if missing.
        prefix: start of every file name, for several groups of shards in one folder.
        pairs_per_shard: pairs in each shard but the last.
        overwrite: replace shards of this prefix, when the first new one is ready; without it they are an error.
    """

    def __init__(
        self, folder: str | Path, prefix: str = "", pairs_per_shard: int = 1000, overwrite: bool = False
    ) -> None:
        if pairs_per_shard < 1:
            raise ValueError(f"pairs_per_shard is {pairs_per_shard}, it must be at least 1")
        self.folder, self.prefix, self.pairs_per_shard = Path(folder), prefix, pairs_per_shard
        self._replaced = _shard_files(self.folder, prefix)
        if self._replaced and not overwrite:
            raise ValueError(
                f"{self.folder} already holds {len(self._replaced)} shard files such as {self._replaced[0].name}: "
                "set overwrite=true to replace them, or name another folder"
            )
        self._waiting: list[tuple[str, str, Pair]] = []  # key in the tar, extension, pair
        self._keys: set[str] = set()
        self._shards: list[Path] = []
        self._pairs = self._bytes = 0
        self._dropped, self._dropped_before = Tally(), Tally()
        self._clock = time.monotonic()

    def add(self, pair: Pair) -> None:
        """Takes a pair, or counts it as dropped."""
        key, extension = tar_key(pair.key), image_format(pair.image)
        if not pair.caption.strip():
            self._dropped["empty_caption"] += 1
        elif extension is None:
            self._dropped["unknown_image_format"] += 1
        elif key in self._keys:
            self._dropped["duplicate_key"] += 1
        else:
            # A full shard waits for its successor, so that what is dropped at the very end counts to the last shard.
            if len(self._waiting) == self.pairs_per_shard:
                self._write()
            self._keys.add(key)
            self._waiting.append((key, extension, pair))

    def close(self, may_be_empty: bool = False) -> ShardReport:
        """Writes the last shard. ValueError if no pair was usable, unless the folder may stay empty."""
        if self._waiting:
            self._write()
        if not self._shards and not may_be_empty:
            raise ValueError(
                f"nothing to write to {self.folder}: no usable pair; dropped: {self._dropped.described()}. "
                "Check the source and its image and caption columns"
            )
        return ShardReport(tuple(self._shards), self._pairs, self._bytes, self._dropped)

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        while self._replaced:
            self._replaced.pop(0).unlink()
        stem = self.folder / f"{self.prefix}{len(self._shards):05d}"
        tar = stem.with_name(f"{stem.name}.tar")
        with atomic_write(tar) as file:
            writer = TarWriter(file)
            for key, extension, pair in self._waiting:
                writer.add(key, pair, extension)
            writer.close()
        rows = [
            {"key": key, "caption": "", **_document(key, pair), "bytes": len(pair.image)}
            for key, _, pair in self._waiting
        ]
        size, now = tar.stat().st_size, time.monotonic()
        counts = {
            "pairs": len(rows),
            "bytes": size,
            "dropped": dict(self._dropped - self._dropped_before),
            "seconds": round(now - self._clock, 3),
        }
        with atomic_write(stem.with_name(f"{stem.name}.json")) as file:
            file.write(json.dumps(counts).encode())
        # Last, so that a tar with its sidecar is complete.
        with atomic_write(stem.with_name(f"{stem.name}.parquet")) as file:
            pq.write_table(_sidecar(rows), file, compression="zstd")
        self._shards.append(tar)
        self._pairs, self._bytes = self._pairs + len(rows), self._bytes + size
        self._waiting, self._clock = [], now
        self._dropped_before = Tally(self._dropped)


def image_format(data: bytes) -> str | None:
    """The file extension that the content calls for (`jpg`, `png`, `webp`, `gif`, `bmp`, `tiff`), or None."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[:2] == b"BM" and data[6:10] == bytes(4):  # two letters alone would take text for an image
        return "bmp"
    return next((extension for magic, extension in _MAGIC.items() if data.startswith(magic)), None)


_MAGIC = {
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG\r\n\x1a\n": "png",
    b"GIF87a": "gif",
    b"GIF89a": "gif",
    b"II*\x00": "tiff",
    b"MM\x00*": "tiff",
}


def tar_key(key: str) -> str:
    """The key as a member's name, percent-encoded where needed: webdataset splits names at the first dot."""
    if not key:
        raise ValueError("a pair has an empty key: give each pair of the source a unique name")
    return quote(key, safe=" ").replace(".", "%2E")


def _shard_files(folder: Path, prefix: str) -> list[Path]:
    """The files of this prefix's shards, sidecars first: while they are removed, no shard looks complete."""
    if not folder.is_dir():
        return []
    shard = re.compile(re.escape(prefix) + r"\d{5,}\.(parquet|json|tar)")
    found = sorted(path for path in folder.iterdir() if shard.fullmatch(path.name))
    return sorted(found, key=lambda path: path.suffix != ".parquet")


class TarWriter:
    """Writes pairs into an open file, three members each; the same pairs give the same bytes.

    Args:
        file: open for writing, in binary.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._start = file, file.tell()

    def add(self, key: str, pair: Pair, extension: str) -> None:
        """Append `{key}.{extension}`, `{key}.txt` and `{key}.json`; ValueError if the metadata is not JSON."""
        document = _json(_document(key, pair), pair.key)
        for ending, data in ((extension, pair.image), ("txt", pair.caption.encode()), ("json", document.encode())):
            member = tarfile.TarInfo(f"{key}.{ending}")  # time, user and group stay 0
            member.size, member.mode = len(data), 0o444
            # As TarFile.addfile, which copies every TarInfo three times: it took a tenth of the time of fetching.
            plain = len(member.name) <= tarfile.LENGTH_NAME
            self._file.write(member.tobuf(tarfile.USTAR_FORMAT if plain else tarfile.PAX_FORMAT))
            self._file.write(data)
            self._file.write(bytes(-len(data) % tarfile.BLOCKSIZE))

    def close(self) -> None:
        """Write the end of the tar; the file stays open."""
        self._file.write(bytes(2 * tarfile.BLOCKSIZE))
        self._file.write(bytes((self._start - self._file.tell()) % tarfile.RECORDSIZE))


def _document(key: str, pair: Pair) -> dict[str, Any]:
    return {**pair.metadata, "key": key, "caption": pair.caption}


def _json(value: Any, key: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError as error:
        raise ValueError(f"metadata of pair {key} is not JSON ({error}): drop that column or make it text") from error


def _sidecar(rows: list[dict[str, Any]]) -> pa.Table:
    """A column for each name any row has; names without a single value are left out."""
    names = dict.fromkeys(name for row in rows for name, value in row.items() if value is not None)
    return pa.table({name: _column([row.get(name) for row in rows]) for name in names})


def _column(values: list[Any]) -> pa.Array:
    """Text, numbers or booleans as they are; lists, dictionaries and mixtures as JSON text."""
    kinds = {type(value) for value in values if value is not None}
    if kinds in ({str}, {bool}) or kinds <= {int, float}:
        return pa.array(values)
    return pa.array([None if value is None else json.dumps(value, ensure_ascii=False) for value in values], pa.string())
