"""What an exam reads: images by number, and what is known of them."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from align_train.records import Tally


class Images(Protocol):
    """N encoded images; read by several threads at a time."""

    @property
    def keys(self) -> Sequence[str]:
        """A name of each, no two equal."""

    def read(self, number: int) -> bytes:
        """The file of an image.

        Raises:
            Unusable: it is known to be lost, by reason.
            OSError: a disk fails.
        """

    def where(self, number: int) -> str:
        """Its name and place, for messages."""


@dataclass(frozen=True)
class CaptionedImages:
    """N images and M captions, each of one of them.

    Attributes:
        name: of the set, for tables.
        images: N images.
        captions: M texts.
        image_of_caption: int64 (M,), number of the image that a caption describes; every image has a caption.
        dropped: what the source has and the set has not, by reason.
    """

    name: str
    images: Images
    captions: Sequence[str]
    image_of_caption: Tensor
    dropped: Tally = field(default_factory=Tally)

    @property
    def digest(self) -> str:
        """SHA-256 of which images and captions are asked for, in their order: equal for the same split alone."""
        owners = (self.images.keys[number] for number in self.image_of_caption.tolist())
        return digest([*self.images.keys, *(text for pair in zip(owners, self.captions, strict=True) for text in pair)])


@dataclass(frozen=True)
class LabelledImages:
    """N images, each of one of C classes.

    Attributes:
        name: of the set, for tables.
        images: N images.
        labels: int64 (N,), number of the class of each.
        classes: C names as the source has them: folders, a dataset's names.
        dropped: what the source has and the set has not, by reason.
    """

    name: str
    images: Images
    labels: Tensor
    classes: tuple[str, ...]
    dropped: Tally = field(default_factory=Tally)

    @property
    def digest(self) -> str:
        """SHA-256 of which images and labels are asked for, in their order."""
        labels = (self.classes[label] for label in self.labels.tolist())
        return digest([*self.classes, *(word for pair in zip(self.images.keys, labels, strict=True) for word in pair)])

    def counts(self) -> Tensor:
        """int64 (C,), images of each class."""
        return torch.bincount(self.labels, minlength=len(self.classes))


class CaptionedSource(Protocol):
    """Settings of a set of images with captions."""

    def open(self) -> CaptionedImages:
        """The set; ValueError where something is wrong with it, OSError where it cannot be read."""


class LabelledSource(Protocol):
    """Settings of a set of images with classes."""

    def open(self) -> LabelledImages:
        """The set; ValueError where something is wrong with it, OSError where it cannot be read."""


def digest(words: Iterable[str]) -> str:
    """SHA-256 of texts and of where each ends, in hexadecimal."""
    total = hashlib.sha256()
    for word in words:
        encoded = word.encode("utf-8", "surrogatepass")
        total.update(len(encoded).to_bytes(8, "little") + encoded)
    return total.hexdigest()
