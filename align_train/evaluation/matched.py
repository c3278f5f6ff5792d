"""Images of a test that count, with their captions or classes, embedded.

Rank 0 judges: on others the tensors have no rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from align_train.data.testsets import CaptionedImages, CaptionedSource, LabelledImages, LabelledSource
from align_train.distributed import on_all_ranks, rank
from align_train.evaluation.embedded import NAMED, Embedded
from align_train.evaluation.encoder import Encoder
from align_train.records import Tally


@dataclass(frozen=True)
class Matched:
    """N images and M captions of a test.

    Attributes:
        test: what they are of.
        images: int64 (N,), their numbers there.
        captions: int64 (M,), likewise.
        image: float32 (N, D).
        text: float32 (M, D).
        image_of_text: int64 (M,), the row in `image` that a caption describes.
        dropped: images of the test that cannot be used, by reason.
        facts: data, its hash and that of what counts of it, and what was left out.
    """

    test: CaptionedImages
    images: Tensor
    captions: Tensor
    image: Tensor
    text: Tensor
    image_of_text: Tensor
    dropped: Tally
    facts: Mapping[str, Any]

    @property
    def counts(self) -> dict[str, int]:
        """For a score."""
        return {"images": len(self.images), "captions": len(self.captions)}

    def caption(self, row: int) -> str:
        """The text of a row of `text`."""
        return self.test.captions[int(self.captions[row])]

    def file(self, row: int) -> bytes:
        """The encoded image of a row of `image`."""
        return self.test.images.read(int(self.images[row]))


def embed_captioned(
    source: CaptionedSource, encoder: Encoder, skip_unusable: bool, excluded: Tensor | None = None
) -> Matched:
    """Open a test and embed it; every rank must call it.

    Args:
        source: of the test.
        encoder: the model.
        skip_unusable: go on without images that cannot be used.
        excluded: bool (all images,), those that are not to count.

    Raises:
        ValueError: images cannot be used.
    """
    test = on_all_ranks(source.open)
    image = encoder.images(test.images, test.name)
    image.check(test.images.keys, test.name, skip_unusable)
    text = encoder.texts(test.captions, test.name)
    if rank() != 0:
        none = test.image_of_caption[:0]
        return Matched(test, none, none, image.rows, text.rows, none, Tally(), {})
    keep = image.usable if excluded is None else image.usable & ~excluded
    images, row = keep.nonzero().flatten(), keep.cumsum(0) - 1
    of_kept = keep[test.image_of_caption]
    captions = of_kept.nonzero().flatten()
    owner = row[test.image_of_caption[captions]]
    rows, texts = _kept(image.rows, keep), _kept(text.rows, of_kept)
    dropped, facts = Tally(test.dropped + image.dropped), _facts(test, image, keep)
    return Matched(test, images, captions, rows, texts, owner, dropped, facts)


@dataclass(frozen=True)
class Labelled:
    """N images of a test and their classes.

    Attributes:
        test: what they are of.
        rows: float32 (N, D).
        labels: int64 (N,), numbers of `test.classes`.
        dropped: images of the test that cannot be used, by reason.
        facts: as of `Matched`.
    """

    test: LabelledImages
    rows: Tensor
    labels: Tensor
    dropped: Tally
    facts: Mapping[str, Any]

    def labels_as(self, classes: Sequence[str]) -> Tensor:
        """int64 (N,), the images' classes by their numbers in a training set's `classes`.

        Raises:
            ValueError: images are of classes that are not among them.
        """
        if self.test.classes == tuple(classes):
            return self.labels  # by number: of ImageNet's names two stand twice
        number = {name: place for place, name in enumerate(classes)}
        if len(number) < len(classes):
            raise ValueError(
                f"classes of the training set share names, and those of {self.test.name} are others, or in another "
                "order: give both sets the same classes"
            )
        if unknown := sorted({self.test.classes[label] for label in self.labels.unique().tolist()} - number.keys()):
            raise ValueError(
                f"{self.test.name} has images of {len(unknown)} classes that the training set, of {len(classes)}, has "
                f"not: {', '.join(unknown[:NAMED])}. Use sets whose classes have the same names"
            )
        return torch.tensor([number.get(name, -1) for name in self.test.classes])[self.labels]


def embed_labelled(source: LabelledSource, encoder: Encoder, skip_unusable: bool) -> Labelled:
    """As `embed_captioned`."""
    test = on_all_ranks(source.open)
    image = encoder.images(test.images, test.name)
    image.check(test.images.keys, test.name, skip_unusable)
    if rank() != 0:
        return Labelled(test, image.rows, test.labels[:0], Tally(), {})
    keep, dropped = image.usable, Tally(test.dropped + image.dropped)
    return Labelled(test, _kept(image.rows, keep), test.labels[keep], dropped, _facts(test, image, keep))


def _kept(rows: Tensor, keep: Tensor) -> Tensor:
    """The rows that count; no copy where all do: a million of them take gigabytes."""
    return rows if bool(keep.all()) else rows[keep]


def _facts(test: CaptionedImages | LabelledImages, image: Embedded, keep: Tensor) -> dict[str, Any]:
    excluded = int((image.usable & ~keep).sum())
    left_out = dict(test.left_out) | ({"excluded": excluded} if excluded else {})
    hashes = {"data_sha256": image.data_sha256, "split_sha256": test.digest(keep)}
    return {"data": test.name, **hashes, "left_out": left_out}
