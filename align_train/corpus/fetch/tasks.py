"""One task: a slice of the selected rows to one shard, so that it is there whole or not at all, whatever happens.

    NNNNN.tar      {key}.jpg, {key}.txt, {key}.json for each image that came
    NNNNN.json     counts by reason, and seconds
    NNNNN.parquet  every row of the task, fetched or not, with status, reason, final size, bytes and SHA-256

How the three appear whole or not at all is told in `commit`.
"""

import json
import tarfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from align_train.corpus.captions import clean_caption
from align_train.corpus.fetch.commit import claimed, commit, flush, recover, room_in, staged, swept
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

    Raises:
        ValueError: one of these columns is missing.
    """

    index: int
    rows: pa.Table
    folder: Path
    fetcher: Fetcher = field(default_factory=Fetcher)
    columns: Columns = field(default_factory=Columns)

    def __post_init__(self) -> None:
        for name, column in asdict(self.columns).items():
            if column not in self.rows.column_names:
                raise ValueError(f"the selected rows have no column {column!r}: set source.fetch.columns.{name}")

    @property
    def stem(self) -> Path:
        """FOLDER/NNNNN."""
        return self.folder / f"{self.index:05d}"

    def run(self, tell: Callable[[str], None] = lambda reason: None, retry: bool = False) -> bool:
        """Do what is left of the task; False if another process is at it.

        Args:
            tell: called for each row with the reason why it failed, or with an empty text.
            retry: fetch those rows of a finished task again that failed.

        Raises:
            ValueError: what is there of the task is broken.
            OSError: the disk is full, for instance; what was finished before is whole.
        """
        with room_in(self.folder), claimed(self.stem) as ours:
            if not ours:
                return False
            recover(self.stem)
            finished = read_sidecar(self.stem) if is_finished(self.stem) else None
            if finished is None:
                self._write({}, 0, tell)
            elif retry and any(row["status"] != "success" for row in finished):
                seconds = json.loads(self.stem.with_name(f"{self.stem.name}.json").read_text())["seconds"]
                self._write({row["key"]: row for row in finished if row["status"] == "success"}, seconds, tell)
            return True

    def _write(self, before: dict[str, Row], seconds: float, tell: Callable[[str], None]) -> None:
        """Replace what is there of the task. `before`: rows whose images are taken from the old shard; its seconds."""
        clock = time.monotonic()
        with swept(self.stem):
            written = self._write_tar(before, tell)
            reasons = Tally(row["reason"] for row in written if row["reason"])
            counts = {
                "rows": len(written),
                "pairs": len(written) - reasons.total(),
                "bytes": staged(self.stem, "tar").stat().st_size,
                "reasons": reasons,
                "seconds": round(seconds + time.monotonic() - clock, 3),
            }
            with atomic_write(staged(self.stem, "json")) as file:
                file.write(json.dumps(counts).encode())
            flush(self.folder)  # no staged parquet without the others
            with atomic_write(staged(self.stem, "parquet")) as file:
                pq.write_table(self._sidecar(written), file, compression="zstd")
            commit(self.stem)

    def _write_tar(self, before: dict[str, Row], tell: Callable[[str], None]) -> list[Row]:
        """Stage the shard; what the sidecar says of each row."""
        rows: list[Row] = []
        with (
            atomic_write(staged(self.stem, "tar")) as file,
            _images(self.stem, before) as images,
            closing(self._results(before, images)) as results,
        ):
            writer = TarWriter(file)
            for row, key, caption, fetched in results:
                written = _sidecar_row(key, caption, fetched)
                rows.append(written)
                if fetched.image is not None:
                    known = {name: value for name, value in row.items() if value is not None}
                    sizes = {name: written[name] for name in SIZES}
                    pair = Pair(key, fetched.image.content, caption, {**known, **sizes})
                    writer.add(key, pair, image_format(pair.image) or "jpg")
                if key not in before:
                    tell(written["reason"])
            writer.close()
        return rows

    def _results(
        self, before: dict[str, Row], images: Mapping[str, bytes]
    ) -> Generator[tuple[Row, str, str, Fetched[int]], None, None]:
        """Row, key, caption and result of each row, in order."""
        rows, keys = self.rows.to_pylist(), set[str]()
        known: list[tuple[str, str, Fetched[int] | None]] = []
        for number, row in enumerate(rows):
            name, caption = row[self.columns.key], clean_caption(row[self.columns.caption] or "")
            key, result = "" if name in (None, "") else tar_key(str(name)), None
            if not key:
                result = Fetched(number, None, "no_key", f"row {number} of the task has no {self.columns.key}")
            elif key in keys:
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


def is_finished(stem: Path) -> bool:
    """True if the shard and its sidecar are there."""
    return all(stem.with_name(f"{stem.name}.{ending}").is_file() for ending in ("tar", "parquet"))


def read_sidecar(stem: Path) -> list[Row]:
    """What became of each row of a finished task, columns of WRITTEN."""
    path = stem.with_name(f"{stem.name}.parquet")
    try:
        return list(pq.read_table(path, columns=list(WRITTEN), partitioning=None).to_pylist())
    except (pa.ArrowException, OSError) as error:
        says = " ".join(str(error).split())
        raise ValueError(f"{path} is not the sidecar of a fetched shard ({says}): remove it to fetch again") from error


@contextmanager
def _images(stem: Path, before: Mapping[str, Row]) -> Iterator[Mapping[str, bytes]]:
    """The images of the shard that is there, by key; nothing is opened where `before` is empty."""
    if not before:
        yield {}
        return
    path = stem.with_name(f"{stem.name}.tar")
    with ExitStack() as stack:
        try:
            images = _Images(stack.enter_context(tarfile.open(path)))
            if lost := before.keys() - images.keys():
                raise ValueError(f"{len(lost)} images of its sidecar are not in it")
        except (OSError, ValueError, tarfile.TarError) as error:
            remedy = f"remove {stem.name}.parquet to fetch all of this task again"
            raise ValueError(f"{path} is broken ({error}): {remedy}") from error
        yield images


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
