"""Tar shards of images and captions."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from align_train.data.captions import Captions
from align_train.data.storage.shards import find_shards
from align_train.data.testsets.checks import captioned, listed
from align_train.data.testsets.sets import CaptionedImages
from align_train.data.testsets.shard_images import ShardImages, read_shards

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardPairs:
    """Shards as `align-train prepare`, img2dataset and CLIP_benchmark write them.

    Pairs that cannot be used are counted by reason, as in training. The shards are read once.

    Attributes:
        shards: files, folders, globs, brace ranges or addresses.
        captions: where captions come from; of several fields, the most probable.
        by_line: each line of `key.txt` is a caption, as in CLIP_benchmark's retrieval sets; else all of it is one.
        name: of the set; by default the shards.
    """

    shards: str | Sequence[str]
    captions: Captions = field(default_factory=Captions)
    by_line: bool = False
    name: str | None = None

    def open(self) -> CaptionedImages:
        """The pairs in the order of the shards.

        Raises:
            FileNotFoundError: there are no such shards.
            OSError: a shard cannot be read.
            ValueError: a shard is no tar, two shards have a pair of the same key, or no pair can be used.
        """
        return self._opened

    def excluded(self, exclude: Mapping[str, Sequence[Any]]) -> Tensor:
        """Bool (N,): the images whose sidecar has one of the named values in the named column.

        Raises:
            ValueError: a shard has no sidecar, or the sidecar no such column, or the values are no list.
        """
        for column, values in exclude.items():
            if isinstance(values, str):
                raise ValueError(f"exclude of {column!r} is the text {values!r}: write a list of values, [{values}]")
        out = torch.zeros(len(self._images.keys), dtype=torch.bool)
        for column, found in self._images.columns(list(exclude)).items():
            if absent := [value for value in exclude[column] if value not in found]:
                log.warning("%s: exclude names %s, which no %s is", self._source, listed(absent), column)
            out |= torch.tensor([value in exclude[column] for value in found], dtype=torch.bool)
        return out

    @property
    def _source(self) -> str:
        return self.shards if isinstance(self.shards, str) else listed(self.shards)

    @cached_property
    def _opened(self) -> CaptionedImages:
        images, captions, dropped = read_shards(find_shards(self.shards), self.captions.kinds, self._choose)
        return captioned(self._source, self.name or self._source, images, captions, dropped)

    @property
    def _images(self) -> ShardImages:
        images = self._opened.images
        assert isinstance(images, ShardImages)
        return images

    def _choose(self, members: Mapping[str, bytes], where: str) -> list[str]:
        lines = members.get("txt", b"").splitlines() if self.by_line else []
        if len(lines) < 2:
            return [self.captions.choose(members, None, where)]
        return [self.captions.choose({**members, "txt": line}, None, where) for line in lines]
