"""Tables of images and captions: csv, tsv, jsonl, parquet, and the metadata files of image folders."""

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from align_train.data.own_pairs.columns import SAMPLE, Columns, Wanted, choose_columns
from align_train.data.own_pairs.opened import OpenedPairs
from align_train.data.own_pairs.pictures import ALLOW, Links, is_link, looks_like_picture
from align_train.data.own_pairs.rows import Row
from align_train.data.own_pairs.walking import contents
from align_train.data.testsets.table_files import KINDS, header, holds_files, rows

METADATA = tuple(f"metadata{kind}" for kind in (".jsonl", ".csv", ".parquet"))  # of Hugging Face's imagefolder


@dataclass(frozen=True)
class TableFile:
    """A table, what messages call it, and the folder that its paths are relative to."""

    path: Path
    name: str
    folder: Path


def open_table(path: str, images: str | None, wanted: Wanted, links: Links) -> OpenedPairs:
    """The rows of a file, or of a glob of files of one kind; all are read once to count rows and links.

    Args:
        path: csv, tsv, jsonl or parquet.
        images: the folder of image paths; None for that of each file.
        wanted: columns.
        links: whether links may be followed.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is not what its ending says, a column is not there or cannot be guessed, or images are links
            that may not be followed.
    """
    found = [Path(path)] if Path(path).exists() else [Path(name) for name in sorted(glob.glob(path))]
    if not found:
        raise FileNotFoundError(f"there is no table {path}: looked in {Path(path).parent.absolute()}")
    if wrong := [file for file in found if file.suffix not in KINDS or file.suffix != found[0].suffix]:
        raise ValueError(f"{wrong[0]} is no table of that kind: give files of one kind, {', '.join(KINDS)}")
    files = [TableFile(file, file.name, Path(images) if images else file.parent) for file in found]
    opened, _ = _opened(path, files, wanted, links)
    return opened


def open_image_folder(path: str, wanted: Wanted, links: Links) -> OpenedPairs:
    """The rows of all metadata.jsonl, .csv or .parquet below a folder, images relative to the folder of each.

    That is the layout `imagefolder` of Hugging Face's `datasets`.

    Raises:
        OSError: as `open_table`.
        ValueError: as `open_table`; or there is no such file, or two in one folder.
    """
    found = contents(path)
    tables = [name for name in found.others if Path(name).name in METADATA]
    if not tables:
        raise ValueError(f"{path} has no {', '.join(METADATA)} in it or its folders: write one, or set pairs.format")
    if len({os.path.dirname(name) for name in tables}) < len(tables):
        raise ValueError(f"{path} has several metadata files in one folder ({', '.join(tables)}): leave one in each")
    files = [TableFile(Path(path) / name, name, (Path(path) / name).parent) for name in tables]
    opened, columns = _opened(path, files, wanted, links)
    named = {_place(file, row.get(columns.image)) for file in files for row in rows(file.path, [columns.image])}
    left = [name for name in found.images if os.path.normpath(os.path.join(path, name)) not in named]
    told = [f"{path}: {len(left):,} of {len(found.images):,} images are named by no row, and left out"] if left else []
    return OpenedPairs([*opened.told, *told, *found.told(path, frozenset(tables))], opened.train, total=opened.total)


def _opened(path: str, files: Sequence[TableFile], wanted: Wanted, links: Links) -> tuple[OpenedPairs, Columns]:
    names, first = _sample(files[0])
    shows = partial(looks_like_picture, folder=files[0].folder)
    columns = choose_columns(str(files[0].path), names, first, wanted, shows)
    for file in files[1:]:
        if lacking := [name for name in columns.taken if name not in _sample(file)[0]]:
            raise ValueError(
                f"{file.path} has no column {lacking[0]}, which {files[0].path} has: write it in each file"
            )
    total, linked = _counted(files, columns.image)
    if linked and not links.allowed:
        raise ValueError(f"{linked:,} of {total:,} rows of {path} are links (column {columns.image}): {ALLOW}")
    told = [columns.told(names), f"{path}: {total:,} rows" + (f", of which {linked:,} are links" if linked else "")]

    def read() -> Iterator[Row]:
        for file in files:
            for number, cells in enumerate(rows(file.path, columns.taken), 1):
                yield columns.row(cells, f"row {number} of {file.name}", file.folder, links)

    return OpenedPairs(told, read, total=total), columns


def _sample(file: TableFile) -> tuple[list[str], list[Mapping[str, Any]]]:
    """Names of the columns and the first rows; a row of jsonl may have names that the first one has not."""
    first: list[Mapping[str, Any]] = list(islice(rows(file.path), SAMPLE))
    return list(dict.fromkeys([*header(file.path), *(name for row in first for name in row)])), first


def _counted(files: Sequence[TableFile], image: str) -> tuple[int, int]:
    """All rows, and those whose image is a link; reads all tables, but not the image files in them."""
    total = linked = 0
    for file in files:
        if holds_files(file.path, image):
            total += pq.read_metadata(file.path).num_rows
            continue
        for row in rows(file.path, [image]):
            total += 1
            linked += is_link(row.get(image))
    return total, linked


def _place(file: TableFile, cell: object) -> str:
    """The path that a cell names, as `contents` would; no file's for other cells."""
    return os.path.normpath(file.folder / cell) if isinstance(cell, str) else ""
