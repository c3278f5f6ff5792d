"""A table of images and captions."""

import glob
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align_train.corpus.hf_dataset import CAPTION_NAMES
from align_train.data.pairs import hashed
from align_train.data.testsets.checks import captioned, refuse
from align_train.data.testsets.files import image_files
from align_train.data.testsets.parquet_images import ParquetImages, Row, contents_of
from align_train.data.testsets.sets import CaptionedImages, Images
from align_train.data.testsets.table_files import KINDS, header, holds_files, values

log = logging.getLogger(__name__)
IMAGE_NAMES = ("image", "image_path", "image_file", "filepath", "file_path", "file_name", "filename", "path", "img")


@dataclass(frozen=True)
class Table:
    """csv, tsv, jsonl or parquet whose rows have an image and a caption, or in jsonl and parquet a list of captions.

    Rows of one image are captions of one image, which is known by its key, or else by its path or its bytes. Without
    names, columns with usual ones are taken, and the log says which.

    Attributes:
        path: the file, or a glob of files of one kind. Of images in parquet two row groups are in memory at a time:
            write some hundred images in each.
        images: folder of the image paths; by default the one that the table lies in.
        image_column: paths of images, or in parquet the files themselves: bytes, or the structs of `datasets`.
        caption_column: their captions.
        key_column: names of the images; by default their paths, or the XXH3 of their bytes.
        delimiter: of csv and tsv; by default a comma and a tab.
        name: of the set; by default the table's file name.
    """

    path: str
    images: str | None = None
    image_column: str | None = None
    caption_column: str | None = None
    key_column: str | None = None
    delimiter: str | None = None
    name: str | None = None

    def open(self) -> CaptionedImages:
        """The images in the order in which the table names them first, each with its captions.

        Raises:
            OSError: a file cannot be read.
            ValueError: a file is not what its ending says, a column is not there, or images, captions or image files
                are missing.
        """
        files = self._files()
        columns = header(files[0], self.delimiter)
        image = _chosen(self.path, "image_column", self.image_column, IMAGE_NAMES, columns)
        caption = _chosen(self.path, "caption_column", self.caption_column, CAPTION_NAMES, columns)
        key = self.key_column and _chosen(self.path, "key_column", self.key_column, (), columns)
        log.info("%s: images from the column %s, captions from %s", self.path, image, caption)
        rows: list[Row] = []
        if holds_files(files[0], image):
            names, rows = _hashes(files, image)
        else:
            names = self._column(files, image)
        captions = self._captions(names, self._column(files, caption))
        keys = self._keys(names, self._column(files, key)) if key else [str(name) for name in names]
        first, texts = _grouped(keys, captions)
        images: Images
        if rows:
            images = ParquetImages(list(first), list(map(str, files)), image, [rows[row] for row in first.values()])
        else:
            folder = str(files[0].parent) if self.images is None else self.images
            images = image_files(self.path, folder, ((each, [str(names[row])]) for each, row in first.items()))
        return captioned(self.path, self.name or files[0].stem, images, texts)

    def _files(self) -> list[Path]:
        files = [Path(self.path)] if Path(self.path).exists() else [Path(name) for name in sorted(glob.glob(self.path))]
        if not files:
            raise FileNotFoundError(f"there is no table {self.path}: looked in {Path(self.path).parent.absolute()}")
        kinds = sorted({file.suffix for file in files})
        if len(kinds) > 1 or kinds[0] not in KINDS:
            raise ValueError(f"{self.path} ends with {' and '.join(kinds)}: give files of one kind, {', '.join(KINDS)}")
        return files

    def _column(self, files: Sequence[Path], column: str) -> list[Any]:
        return [value for file in files for value in values(file, column, self.delimiter)]

    def _captions(self, names: Sequence[object], cells: Sequence[Any]) -> list[list[str]]:
        """The captions of each row; refuses rows without image or caption, and captions that are no text."""
        rows = [f"row {number}" for number in range(1, len(cells) + 1)]
        lost = [row for row, name in zip(rows, names, strict=True) if name is None or name == ""]
        refuse(self.path, lost, len(rows), "rows have no image", "Name it, or take the row out")
        bare = [row for row, cell in zip(rows, cells, strict=True) if cell is None or cell == []]
        refuse(self.path, bare, len(rows), "rows have no caption", "Write one, or take the row out")
        captions = [cell if isinstance(cell, list) else [cell] for cell in cells]
        other = [row for row, texts in zip(rows, captions, strict=True) if not all(isinstance(t, str) for t in texts)]
        refuse(self.path, other, len(rows), "rows have a caption that is no text", "Set caption_column to one of texts")
        return captions

    def _keys(self, names: Sequence[object], cells: Sequence[Any]) -> list[str]:
        """Names of the images; refuses one that two images have."""
        images: dict[str, set[object]] = {}
        for cell, name in zip(cells, names, strict=True):
            images.setdefault(str(cell), set()).add(name)
        shared = [key for key, found in images.items() if len(found) > 1]
        refuse(self.path, shared, len(images), "keys name several images", "Set key_column to names of images")
        return [str(cell) for cell in cells]


def _chosen(path: str, setting: str, wanted: str | None, known: Sequence[str], columns: Sequence[str]) -> str:
    """The column that is wanted, else the first of the usual names that there is."""
    if wanted is not None and wanted in columns:
        return wanted
    by_name = {column.lower(): column for column in columns}
    found = [by_name[name] for name in known if name in by_name]
    if wanted is None and found:
        return found[0]
    problem = f"has no column {wanted}" if wanted is not None else "has no column of a usual name"
    raise ValueError(f"{path} {problem}: set {setting} to one of {', '.join(columns)}")


def _hashes(files: Sequence[Path], column: str) -> tuple[list[str | None], list[Row]]:
    """The hash of each row's image, None where there is none, and where it lies."""
    names: list[str | None] = []
    rows: list[Row] = []
    for row, content in contents_of([str(file) for file in files], column):
        names.append(hashed(content).hex() if content else None)
        rows.append(row)
    return names, rows


def _grouped(keys: Sequence[str], captions: Sequence[list[str]]) -> tuple[dict[str, int], list[list[str]]]:
    """The first row of each key, and the captions of all its rows."""
    first: dict[str, int] = {}
    texts: dict[str, list[str]] = {}
    for row, (key, found) in enumerate(zip(keys, captions, strict=True)):
        first.setdefault(key, row)
        texts.setdefault(key, []).extend(found)
    return first, list(texts.values())
