"""What an exam reads: images by number, and what is known of them."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Protocol

from torch import Tensor

from align_train.records import Tally


class Images(Protocol):
    """N encoded images; read by several threads at a time."""

    @property
    def keys(self) -> Sequence[str]:
        """A name of each, no two equal."""

    @property
    def identity(self) -> str:
        """A digest of what lies where, without reading images: another one where an image's bytes may be others."""

    def read(self, number: int) -> bytes:
        """The file of an image.

        Raises:
            Unusable: it is known to be lost, by reason.
            OSError: it cannot be read.
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
        dropped: images, or captions, that should be in the set and cannot be used, by reason.
        left_out: what the source has, and the protocol or the format keeps out of the set, by reason.
    """

    name: str
    images: Images
    captions: Sequence[str]
    image_of_caption: Tensor
    dropped: Tally = field(default_factory=Tally)
    left_out: Tally = field(default_factory=Tally)

    def digest(self, kept: Tensor) -> str:
        """SHA-256 of the keys of the images that are kept, bool (N,), and their captions, in their order."""
        keys, keep = self.images.keys, kept.tolist()
        pairs = zip(self.image_of_caption.tolist(), self.captions, strict=True)
        words = (word for owner, text in pairs if keep[owner] for word in (keys[owner], text))
        return digest([*compress(keys, keep), *words])


@dataclass(frozen=True)
class LabelledImages:
    """N images, each of one of C classes.

    Attributes:
        name: of the set, for tables.
        images: N images.
        labels: int64 (N,), number of the class of each.
        classes: C names as the source has them: folders, a dataset's names.
        dropped: images that should be in the set and cannot be used, by reason.
        left_out: what the source has, and the protocol or the format keeps out of the set, by reason.
    """

    name: str
    images: Images
    labels: Tensor
    classes: tuple[str, ...]
    dropped: Tally = field(default_factory=Tally)
    left_out: Tally = field(default_factory=Tally)

    def digest(self, kept: Tensor) -> str:
        """SHA-256 of the classes, and of the keys of the images that are kept, bool (N,), and theirs, in order."""
        labels = (self.classes[label] for label in self.labels.tolist())
        pairs = compress(zip(self.images.keys, labels, strict=True), kept.tolist())
        return digest([*self.classes, *(word for pair in pairs for word in pair)])


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


def file_identity(path: str) -> str:
    """Where a file lies, how long it is and when it was written; of one that is gone, whoever reads it will tell."""
    place = os.path.abspath(path)
    try:
        found = os.stat(place)
    except OSError:
        return place
    return f"{place} {found.st_size} {found.st_mtime_ns}"
