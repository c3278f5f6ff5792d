"""Tables of images and captions: csv, tsv, jsonl, parquet, and the metadata files of image folders."""

import glob
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from align_train.corpus.images import Unusable
from align_train.data.own_pairs.columns import PART, PARTS, SAMPLE, Columns, Wanted, choose_columns
from align_train.data.own_pairs.layouts import layout_of
from align_train.data.own_pairs.opened import OpenedPairs
from align_train.data.own_pairs.pictures import ALLOW, Links, is_link, located, looks_like_picture
from align_train.data.own_pairs.rows import Row
from align_train.data.own_pairs.saved_datasets import VALIDATION
from align_train.data.own_pairs.walking import contents
from align_train.data.testsets.table_files import KINDS, Broken, Layout, class_names, header, holds_files, kind, rows

TABLES = (*KINDS, ".txt")  # Flickr8k has captions.txt
METADATA = tuple(f"metadata{kind}" for kind in (".jsonl", ".csv", ".parquet"))  # of Hugging Face's imagefolder


@dataclass(frozen=True)
class TableFile:
    """A table, what messages call it, the folder that its paths are relative to, and how it is written."""

    path: Path
    name: str
    folder: Path
    layout: Layout

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any] | Broken]:
        """As `table_files.rows`."""
        return rows(self.path, columns, self.layout)


def open_table(path: str, images: str | None, delimiter: str | None, wanted: Wanted, links: Links) -> OpenedPairs:
    """The rows of a file, or of a glob of files of one kind; all are read once to count rows and links.

    Args:
        path: csv, tsv, txt, jsonl or parquet.
        images: the folder of image paths; None for that of each file.
        delimiter: of columns; None to look.
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
    if wrong := [file for file in found if kind(file) not in TABLES or kind(file) != kind(found[0])]:
        raise ValueError(f"{wrong[0]} is no table of that kind: give files of one kind, {', '.join(TABLES)}")
    unique = len({file.name for file in found}) == len(found)
    each = [(file, file.name if unique else str(file), Path(images) if images else file.parent) for file in found]
    files, told = _files(each, delimiter)
    opened, _ = _opened(path, files, wanted, links)
    return replace(opened, told=[*told, *opened.told])


def _files(each: Sequence[tuple[Path, str, Path]], delimiter: str | None) -> tuple[list[TableFile], list[str]]:
    layouts = [layout_of(path, delimiter) for path, _, _ in each]
    files = [TableFile(*one, layout) for one, (layout, _) in zip(each, layouts, strict=True)]
    return files, [line for _, told in layouts for line in told]


def open_image_folder(path: str, delimiter: str | None, wanted: Wanted, links: Links) -> OpenedPairs:
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
    files, said = _files([(Path(path) / name, name, (Path(path) / name).parent) for name in tables], delimiter)
    opened, columns = _opened(path, files, wanted, links)
    named = {
        _place(file, row.get(columns.image))
        for file in files
        for row in file.rows([columns.image])
        if isinstance(row, dict)
    }
    left = [name for name in found.images if os.path.normpath(os.path.join(path, name)) not in named]
    told = [f"{path}: {len(left):,} of {len(found.images):,} images are named by no row, and left out"] if left else []
    return replace(opened, told=[*said, *opened.told, *told, *found.told(path, frozenset(tables))])


def _opened(path: str, files: Sequence[TableFile], wanted: Wanted, links: Links) -> tuple[OpenedPairs, Columns]:
    names, first = _sample(files[0])
    shows = partial(looks_like_picture, folder=files[0].folder)
    columns = choose_columns(str(files[0].path), names, first, wanted, shows)
    if columns.label:
        columns = replace(columns, classes=class_names(files[0].path, columns.label))
    for file in files[1:]:
        if lacking := [name for name in columns.taken if name not in _sample(file)[0]]:
            raise ValueError(
                f"{file.path} has no column {lacking[0]}, which {files[0].path} has: write it in each file"
            )
    parts = _parts(files) if PART in names and PART not in columns.taken else None
    total, linked = _counted(files, columns.image)
    if linked and not links.allowed:
        raise ValueError(f"{linked:,} of {total:,} rows of {path} are links (column {columns.image}): {ALLOW}")
    told = [columns.told(names), f"{path}: {total:,} rows" + (f", of which {linked:,} are links" if linked else "")]

    def read(taken: Collection[str] = ()) -> Iterator[Row]:
        for file in files:
            for number, cells in enumerate(file.rows([*columns.taken, *([PART] if taken else [])]), 1):
                if taken and isinstance(cells, dict) and cells.get(PART) not in taken:
                    continue
                where = f"row {number} of {file.name}"
                if isinstance(cells, Broken):
                    yield Row(where, None, (), problem=Unusable(cells.reason, cells.detail))
                else:
                    yield columns.row(cells, where, file.folder, links)

    if not parts or not parts["train"]:
        if PART in names and PART not in columns.taken:
            told.append(f"{path}: the column {PART} names no rows to train on, and all rows are taken")
        return OpenedPairs(told, read, total=total), columns
    held_out = next((name for name in VALIDATION if parts[name]), None)
    counts = ", ".join(f"{name} {count:,}" for name, count in parts.items())
    told.append(
        f"{path}: the column {PART} has {counts}: trains on train{' and restval' if parts['restval'] else ''}, "
        f"validates on {held_out or 'none of them'}. Change by calling the column otherwise"
    )
    train = partial(read, ("train", "restval"))
    return OpenedPairs(told, train, partial(read, (held_out,)) if held_out else None), columns


def _parts(files: Sequence[TableFile]) -> Counter[Any] | None:
    """How many rows each split has that the column of that name says; None where it says other things."""
    counts = Counter(row.get(PART) for file in files for row in file.rows([PART]) if isinstance(row, dict))
    return counts if PARTS.issuperset(counts) else None


def _sample(file: TableFile) -> tuple[list[str], list[Mapping[str, Any]]]:
    """Names of the columns and the first rows; a row of jsonl may have names that the first one has not."""
    first = list(islice(file.rows(), SAMPLE))
    read: list[Mapping[str, Any]] = [row for row in first if isinstance(row, dict)]
    if first and not read and isinstance(broken := first[0], Broken):
        raise ValueError(f"none of the first {len(first)} rows can be read: {broken.detail}")
    names = dict.fromkeys(name for row in read for name in row)
    return list(names) or header(file.path, file.layout.delimiter), read


def _counted(files: Sequence[TableFile], image: str) -> tuple[int, int]:
    """All rows, and those whose image is a link; reads all tables, but not the image files in them."""
    total = linked = 0
    for file in files:
        if holds_files(file.path, image):
            total += pq.read_metadata(file.path).num_rows
            continue
        for row in file.rows([image]):
            total += 1
            linked += isinstance(row, dict) and is_link(row.get(image))
    return total, linked


def _place(file: TableFile, cell: object) -> str:
    """The path that a cell names, as `contents` would; no file's for other cells."""
    return os.path.normpath(located(file.folder / cell)) if isinstance(cell, str) else ""
