"""One task: a slice of the selected rows to one shard, so that it is there whole or not at all, whatever happens.

    NNNNN.tar      {key}.jpg, {key}.txt, {key}.json for each image that came
    NNNNN.json     counts by reason, and seconds
    NNNNN.parquet  every row of the task, fetched or not, with status, reason, final size, bytes and SHA-256

The three are written under temporary names, flushed, and renamed, the parquet last: a task with its parquet is done.
Its staged parquet is the point of no return: if that is found after a crash, the renaming is finished, else the task
is begun anew.
"""

import fcntl
import json
import os
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from align_train.corpus.captions import clean_caption
from align_train.corpus.fetch.fetcher import Fetched, Fetcher
from align_train.corpus.images import StoredImage
from align_train.corpus.shards import TarWriter, image_format, tar_key
from align_train.files import atomic_write
from align_train.records import Pair, Tally

Row = dict[str, Any]

# What a sidecar has beside the columns of the metadata; status and error_message as in img2dataset's.
WRITTEN = {
    "key": pa.string(),
    "caption": pa.string(),  # cleaned
    "status": pa.string(),  # success or failed
    "reason": pa.string(),  # empty, or why it failed in one word
    "error_message": pa.string(),
    "stored_width": pa.int32(),  # pixels
    "stored_height": pa.int32(),
    "original_width": pa.int32(),
    "original_height": pa.int32(),
    "bytes": pa.int64(),  # of the image in the shard
    "sha256": pa.string(),  # of the image in the shard
}
SIZES = ("stored_width", "stored_height", "original_width", "original_height")


@dataclass(frozen=True)
class Columns:
    """Which columns of the metadata name a pair, link to its image, and caption it."""

    key: str = "id"
    url: str = "url"
    caption: str = "text"


@dataclass(frozen=True)
class Task:
    """A slice of rows.

    Attributes:
        index: number of the task; its files are named by it.
        rows: the slice, with all columns of the metadata.
        folder: where its files go.
        fetcher: gets the images.
        columns: names of the columns that matter here.
    """

    index: int
    rows: pa.Table
    folder: Path
    fetcher: Fetcher = field(default_factory=Fetcher)
    columns: Columns = field(default_factory=Columns)

    @property
    def stem(self) -> Path:
        """FOLDER/NNNNN."""
        return self.folder / f"{self.index:05d}"

    def run(self, tell: Callable[[str], None] = lambda reason: None, retry: bool = False) -> bool:
        """Do what is left of the task; False if another process is at it.

        Args:
            tell: called for each row with the reason why it failed, or with an empty text.
            retry: fetch those rows of a finished task again that failed.
        """
        with claimed(self.stem) as ours:
            if not ours:
                return False
            recover(self.stem)
            finished = read_sidecar(self.stem)
            if finished is None:
                self._write({}, tell)
            elif retry and any(row["status"] != "success" for row in finished):
                self._write({row["key"]: row for row in finished if row["status"] == "success"}, tell)
            return True

    def _write(self, before: dict[str, Row], tell: Callable[[str], None]) -> None:
        """Fetch all rows but those of `before`, which are taken from the shard that is there, and replace the shard."""
        clock, reasons, sidecar = time.monotonic(), Tally(), []
        staged = {ending: _staged(self.stem, ending) for ending in ("tar", "json", "parquet")}
        with atomic_write(staged["tar"]) as file, _images(self.stem, before) as images:
            writer = TarWriter(file)
            for row, key, caption, fetched in self._results(before, images):
                written = _sidecar_row(key, caption, fetched)
                sidecar.append(written)
                reasons[written["reason"] or "success"] += 1
                if fetched.image is not None:
                    known = {name: value for name, value in row.items() if value is not None}
                    sizes = {name: written[name] for name in SIZES}
                    pair = Pair(key, fetched.image.content, caption, {**known, **sizes})
                    writer.add(key, pair, image_format(pair.image) or "jpg")
                if key not in before:
                    tell(written["reason"])
            writer.close()
        counts = {
            "rows": len(sidecar),
            "pairs": reasons["success"],
            "bytes": staged["tar"].stat().st_size,
            "reasons": dict(reasons - Tally({"success": reasons["success"]})),
            "seconds": round(time.monotonic() - clock, 3),
        }
        with atomic_write(staged["json"]) as file:
            file.write(json.dumps(counts).encode())
        with atomic_write(staged["parquet"]) as file:
            pq.write_table(self._sidecar(sidecar), file, compression="zstd")
        recover(self.stem)

    def _results(
        self, before: dict[str, Row], images: Mapping[str, bytes]
    ) -> Iterator[tuple[Row, str, str, Fetched[int]]]:
        """Row, key, caption and result of each row, in order."""
        rows, keys = self.rows.to_pylist(), set[str]()
        known: list[tuple[str, str, Fetched[int] | None]] = []
        for number, row in enumerate(rows):
            key, caption = tar_key(str(row[self.columns.key])), clean_caption(row[self.columns.caption] or "")
            result = None
            if key in keys:
                result = Fetched(number, None, "duplicate_key", f"{key} came before in this task")
            elif not caption:
                result = Fetched(number, None, "empty_caption", f"{key} has no text")
            elif key in before:
                result = _from_before(number, before[key], images[key])
            keys.add(key)
            known.append((key, caption, result))
        wanted = [(i, rows[i][self.columns.url] or "") for i, (_, _, result) in enumerate(known) if result is None]
        fetched = self.fetcher.fetch(wanted)
        try:
            for row, (key, caption, result) in zip(rows, known, strict=True):
                yield row, key, caption, result or next(fetched)
        finally:
            fetched.close()

    def _sidecar(self, written: list[Row]) -> pa.Table:
        """The rows as they were selected, and what became of each."""
        table = self.rows
        for name, kind in WRITTEN.items():
            column = pa.array([row[name] for row in written], kind)
            place = table.schema.get_field_index(name)
            table = table.append_column(name, column) if place < 0 else table.set_column(place, name, column)
        return table


def _sidecar_row(key: str, caption: str, fetched: Fetched[int]) -> Row:
    row: Row = dict.fromkeys(WRITTEN) | {"key": key, "caption": caption, "reason": fetched.reason}
    if fetched.image is None:
        return row | {"status": "failed", "error_message": fetched.detail or fetched.reason}
    image = fetched.image
    return row | {
        "status": "success",
        "stored_width": image.width,
        "stored_height": image.height,
        "original_width": image.original_width,
        "original_height": image.original_height,
        "bytes": len(image.content),
        "sha256": sha256(image.content).hexdigest(),
    }


def _from_before(number: int, row: Row, content: bytes) -> Fetched[int]:
    return Fetched(number, StoredImage(content, *(row[name] for name in SIZES)))


def read_sidecar(stem: Path) -> list[Row] | None:
    """What became of each row of a finished task, columns of WRITTEN; None if the task is not finished."""
    path = stem.with_name(f"{stem.name}.parquet")
    if not path.is_file():
        return None
    try:
        return list(pq.read_table(path, columns=list(WRITTEN)).to_pylist())
    except pa.ArrowException as error:
        raise ValueError(f"{path} is not the sidecar of a fetched shard ({error}): remove it to fetch again") from error


@contextmanager
def claimed(stem: Path) -> Iterator[bool]:
    """True if no other process on any machine is at this task; the claim ends with the block or the process.

    A lock on byte number NNNNN of FOLDER/.lock (POSIX record locks: they work over NFS, and the kernel drops them when
    a process dies).
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    with (stem.parent / ".lock").open("a+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, int(stem.name))
        except BlockingIOError:
            yield False
        else:
            yield True


def recover(stem: Path) -> None:
    """Finish the renaming of a task whose staged files are complete; remove what else an interrupted one left."""
    staged = {ending: _staged(stem, ending) for ending in ("tar", "json", "parquet")}  # in the order of renaming
    if staged["parquet"].is_file():
        for ending, path in staged.items():
            if path.is_file():
                path.replace(stem.with_name(f"{stem.name}.{ending}"))
        folder = os.open(stem.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new names are on the disk too
        finally:
            os.close(folder)
    for left in [*stem.parent.glob(f".{stem.name}.*"), *stem.parent.glob(f"..{stem.name}.*")]:
        left.unlink()


def _staged(stem: Path, ending: str) -> Path:
    return stem.with_name(f".{stem.name}.{ending}.staged")


@contextmanager
def _images(stem: Path, before: Mapping[str, Row]) -> Iterator[Mapping[str, bytes]]:
    """The images of the shard that is there, by key; nothing is opened where `before` is empty."""
    if not before:
        yield {}
        return
    with tarfile.open(stem.with_name(f"{stem.name}.tar")) as tar:
        yield _Images(tar)


class _Images(Mapping[str, bytes]):
    """The images of an open shard, read when asked for."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar
        names = (member.rpartition(".") for member in tar.getnames())
        self._extensions = {key: ending for key, _, ending in names if ending not in ("txt", "json")}

    def __getitem__(self, key: str) -> bytes:
        member = self._tar.extractfile(f"{key}.{self._extensions[key]}")
        assert member is not None, "a member that is no file"
        return member.read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._extensions)

    def __len__(self) -> int:
        return len(self._extensions)
