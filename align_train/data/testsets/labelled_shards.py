"""Tar shards of images with labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align_train.corpus.images import Unusable
from align_train.data.captions import read_json
from align_train.data.storage.shards import find_shards
from align_train.data.testsets.checks import labelled, listed
from align_train.data.testsets.labels import numbered, read_classes
from align_train.data.testsets.sets import LabelledImages
from align_train.data.testsets.shard_images import read_shards


@dataclass(frozen=True)
class LabelledShards:
    """webdataset's tars whose images have labels, as CLIP_benchmark's sets: `test/0.tar` with `key.cls`.

    Images that cannot be used are counted by reason, those without a label as no_label.

    Attributes:
        shards: files, folders, globs, brace ranges or addresses.
        label: `cls`, the member with the number or name of the class (any extension will do), `json.NAME`, a value of
            `key.json`, or `sidecar.NAME`, a column of the parquet beside the tar.
        classes: file with the name of a class on each line, CLIP_benchmark's classnames.txt; without it, the classes
            are the labels that occur.
        allow_empty: take classes without images for possible answers; else they are an error.
        name: of the set; by default the shards.
    """

    shards: str | Sequence[str]
    label: str = "cls"
    classes: str | None = None
    allow_empty: bool = False
    name: str | None = None

    def __post_init__(self) -> None:
        kind, _, value = self.label.partition(".")
        if not kind or (kind in ("json", "sidecar")) != bool(value):
            raise ValueError(f"label is {self.label!r}: write cls, json.NAME or sidecar.NAME")

    def open(self) -> LabelledImages:
        """The images in the order of the shards.

        Raises:
            FileNotFoundError: there are no such shards, or no file of classes.
            OSError: a shard cannot be read.
            ValueError: a shard is no tar, two shards have an image of the same key, no image can be used, a sidecar
                has no such column, or labels and classes do not fit.
        """
        classes = None if self.classes is None else read_classes(self.classes)
        kind, _, value = self.label.partition(".")
        beside = kind == "sidecar"
        images, labels, dropped = read_shards(find_shards(self.shards), [] if beside else [kind], self._label)
        if beside:
            labels = images.columns([value])[value]
        source = self.shards if isinstance(self.shards, str) else listed(self.shards)
        numbers, names = numbered(source, images.keys, labels, classes)
        return labelled(source, self.name or source, images, numbers, names, self.allow_empty, dropped)

    def _label(self, members: Mapping[str, bytes], where: str) -> Any:
        kind, _, value = self.label.partition(".")
        if kind == "sidecar":
            return None
        content = members.get(kind, b"")
        label = read_json(content or b"{}", where).get(value) if value else content.decode("utf-8", "replace").strip()
        if label is None or label == "":
            raise Unusable("no_label", where)
        return label
