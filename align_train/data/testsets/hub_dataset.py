"""A Hugging Face dataset of images and labels on disk."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from align_train.data.testsets.checks import labelled, refuse
from align_train.data.testsets.labels import numbered
from align_train.data.testsets.sets import LabelledImages, digest, file_identity

log = logging.getLogger(__name__)
LABEL_NAMES = ("label", "labels", "cls", "class", "fine_label", "category", "target")


class RowImages:
    """N images of a dataset, read from its memory-mapped files.

    Args:
        rows: the dataset, of one column, its images not decoded.
        path: where it lies.
        origin: fingerprint of the whole dataset, and the split.
    """

    def __init__(self, rows: Any, path: str, origin: Sequence[str]) -> None:
        self.rows, self.path, self.origin = rows, path, tuple(origin)
        self.keys = [f"{number:08d}" for number in range(len(rows))]

    @property
    def identity(self) -> str:
        """Of fingerprint, split and column, and of the files, as `file_identity`."""
        files = [file_identity(file["filename"]) for file in self.rows.cache_files]
        return digest([*self.origin, *self.rows.column_names, *files])

    def read(self, number: int) -> bytes:
        """The bytes of an image."""
        (content,) = self.rows[number].values()
        return bytes(content["bytes"] if isinstance(content, dict) else content)

    def where(self, number: int) -> str:
        """Its row and place."""
        return f"row {number} of {self.path}"


@dataclass(frozen=True)
class HubDataset:
    """What `save_to_disk` of the library `datasets` wrote: a dataset or a dictionary of splits; images stay encoded.

    Images are named by their row. Without names, the columns are the only one of images and the only one of class
    labels, or those of usual names; the log says which.

    Attributes:
        path: the folder.
        split: of the dictionary, or what the dataset says that it is, if it says so.
        image_column: of the type Image, or of bytes.
        label_column: of the type ClassLabel, whose names are the classes, or of integers or texts.
        allow_empty: take classes without images for possible answers; else they are an error.
        name: of the set; by default the folder's name and the split.
    """

    path: str
    split: str = "test"
    image_column: str | None = None
    label_column: str | None = None
    allow_empty: bool = False
    name: str | None = None

    def open(self) -> LabelledImages:
        """The images in the order of the rows.

        Raises:
            OSError: the folder cannot be read.
            ValueError: it is no saved dataset, or has no such split or column; images or labels are missing; labels
                and classes do not fit.
        """
        from datasets import ClassLabel, Image

        rows = self._rows()
        image = self._column("image_column", self.image_column, rows.features, Image, ("image", "img", "jpg", "png"))
        label = self._column("label_column", self.label_column, rows.features, ClassLabel, LABEL_NAMES)
        log.info("%s: images from the column %s, labels from %s", self.path, image, label)
        images = RowImages(self._images(rows, image), self.path, (rows._fingerprint, self.split))
        labels = rows.select_columns([label])[:][label]
        bare = [key for key, value in zip(images.keys, labels, strict=True) if value is None]
        refuse(self.path, bare, len(labels), "rows have no label", "Take them out")
        feature = rows.features[label]
        classes = feature.names if isinstance(feature, ClassLabel) else None
        numbers, names = numbered(self.path, images.keys, labels, classes)
        name = self.name or f"{Path(self.path).absolute().name} {self.split}"
        return labelled(self.path, name, images, numbers, names, self.allow_empty)

    def _rows(self) -> Any:
        from datasets import DatasetDict, load_from_disk

        if not any((Path(self.path) / name).is_file() for name in ("state.json", "dataset_dict.json")):
            raise ValueError(f"{self.path} is no folder that save_to_disk wrote: save the dataset there with it")
        saved = load_from_disk(self.path)
        if isinstance(saved, DatasetDict):
            if self.split not in saved:
                there = ", ".join(f"{split} ({len(rows):,})" for split, rows in saved.items()) or "none at all"
                raise ValueError(f"{self.path} has no split {self.split}: its splits are {there}")
            return saved[self.split]
        if saved.split is not None and str(saved.split) != self.split:
            raise ValueError(f"{self.path} is the split {saved.split} ({len(saved):,}), not {self.split}: set split")
        return saved

    def _column(self, setting: str, wanted: str | None, features: Any, kind: type, known: Sequence[str]) -> str:
        """The column that is wanted, else the only one of the kind, else the first of the usual names."""
        found = [name for name, feature in features.items() if isinstance(feature, kind)]
        chosen = wanted or (found[0] if len(found) == 1 else next((name for name in known if name in features), None))
        if chosen in features:
            return str(chosen)
        columns = ", ".join(f"{name} ({getattr(each, 'dtype', each)})" for name, each in features.items())
        problem = f"has no column {wanted}" if wanted else f"has {len(found)} columns that could be meant"
        raise ValueError(f"{self.path} {problem}: set {setting} to one of {columns}")

    def _images(self, rows: Any, column: str) -> Any:
        """The rows with the files of images alone."""
        from datasets import Image

        rows = rows.select_columns([column])
        if isinstance(rows.features[column], Image):
            rows = rows.cast_column(column, Image(decode=False))
        elif getattr(rows.features[column], "dtype", "") not in ("binary", "large_binary"):
            raise ValueError(f"{self.path}: the column {column} holds no images: set image_column to one that does")
        values = rows.data.column(column)
        if isinstance(rows.features[column], Image):
            values = pc.struct_field(values, "bytes")
        lost = [f"row {number}" for number, absent in enumerate(values.is_null().to_pylist()) if absent]
        refuse(self.path, lost, len(rows), "rows have no image", "Take them out, or save the dataset with its images")
        return rows
