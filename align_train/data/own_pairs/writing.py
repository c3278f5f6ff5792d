"""Images and captions to shards: first into one file, since what belongs to an image is known when all rows are."""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tqdm import tqdm

from align_train.corpus.shards import write_shards
from align_train.data.own_pairs.findings import FINDINGS
from align_train.data.own_pairs.report import REPORT
from align_train.records import Pair

SHARD_BYTES = 2**28  # of images in a shard, about: the writer holds a shard in memory


@dataclass(slots=True)
class Image:
    """One image, in whatever rows it is.

    Attributes:
        number: of the image, in the order in which images came.
        start, size: where its file lies in the spool, bytes.
        share: in [0, 1), the hash of the file.
        width, height: pixels.
        where: the first row it is in.
        label: its class.
        captions: with the row that each came in first.
        name: the first path that it has; of a file without a path, its row.
        copies: how many rows have it under another name.
        held_out: it is for validation.
    """

    number: int
    start: int
    size: int
    share: float
    width: int
    height: int
    where: str
    label: str | None
    captions: dict[str, str]
    name: str
    copies: int = 0
    held_out: bool = False


class Spool:
    """One temporary file that holds many. Removed at the end of the `with`."""

    def __init__(self, path: Path) -> None:
        self._path, self._end = path, 0
        self._file = path.open("wb+")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)

    def add(self, content: bytes) -> int:
        """Appends a file; returns where it starts. To be called before the first `read`."""
        start = self._end
        self._file.write(content)
        self._end += len(content)
        return start

    def read(self, start: int, size: int) -> bytes:
        """A file that was added."""
        self._file.seek(start)
        return self._file.read(size)


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` when all has been written; if the body raises, nothing is left.

    What a killed process has left of its own is removed, and so is the report of pairs that were refused before.

    Raises:
        FileExistsError: `folder` holds something else.
    """
    folder = folder.resolve()
    _check_free(folder)
    work = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield work
        (folder / REPORT).unlink(missing_ok=True)
        work.rename(folder)  # takes the place of an empty folder
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _check_free(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()} - {REPORT} if folder.exists() else set()
    if FINDINGS in names:
        raise FileExistsError(f"{folder} holds pairs that were prepared before: remove it, or name another folder")
    if names:
        raise FileExistsError(f"{folder} is for the prepared pairs, but it holds {min(names)}: name an empty folder")


def write_parts(images: Iterable[Image], spool: Spool, folder: Path, pairs_per_shard: int) -> dict[str, int]:
    """FOLDER/train/NNNNN.tar and FOLDER/validation/NNNNN.tar, a pair for each image; returns their sizes in bytes.

    Images come in the order of their hashes, which mixes the classes: pairs are permuted within some shards at a time.
    A shard holds fewer pairs than asked for where images are large.
    """
    parts: dict[str, list[Image]] = {"train": [], "validation": []}
    for image in sorted(images, key=lambda image: image.share):
        parts["validation" if image.held_out else "train"].append(image)
    sizes: dict[str, int] = {}
    for name, part in parts.items():
        if part:
            mean = sum(image.size for image in part) / len(part)
            most = min(pairs_per_shard, max(1, int(SHARD_BYTES / mean)))
            bar = tqdm(part, desc=f"write {name}", unit="image", delay=3)
            report = write_shards((_pair(image, spool) for image in bar), folder / name, "", most)
            assert report.pairs == len(part), report.described()  # all that a shard refuses was found before
            sizes |= {f"{name}/{path.name}": path.stat().st_size for path in report.shards}
    return sizes


def _pair(image: Image, spool: Spool) -> Pair:
    """A record: its captions one a line."""
    content = spool.read(image.start, image.size)
    return Pair(f"{image.number:08d}", content, "\n".join(image.captions), {"label": image.label, "where": image.where})
