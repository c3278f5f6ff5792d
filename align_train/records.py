"""The noun that flows through corpus and data: one image with its caption. No torch here."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Pair:
    """One image and its caption, as found.

    Attributes:
        key: name of the pair, unique in its source; becomes the name of its files in a shard.
        image: the encoded file (JPEG, PNG, WebP ...), never decoded pixels.
        caption: text as the source has it.
        metadata: everything else that is known; JSON-serialisable values.
    """

    key: str
    image: bytes
    caption: str
    metadata: dict[str, Any] = field(default_factory=dict)


class Tally(Counter[str]):
    """Counts of what was not used, by reason: `Tally({"corrupt_image": 2})`. Nothing is dropped in silence."""

    def described(self) -> str:
        """One line for a log: `corrupt_image 2, empty_caption 1`, or `none`."""
        return ", ".join(f"{reason} {count}" for reason, count in sorted(self.items())) or "none"


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How a pair becomes model input: part of the model, since an export must repeat it.

    Attributes:
        resize: pixels a side; images are resized to this square, aspect ratio not kept (ALIGN paper, section 5).
        crop: pixels a side of the random (training) or central (evaluation) crop; at most `resize`.
        antialias: False is the reference's plain bilinear; True is Pillow's, which the exported processor uses.
        max_tokens: longest caption in WordPiece tokens, [CLS] and [SEP] included.
    """

    resize: int = 346
    crop: int = 289
    antialias: bool = False
    max_tokens: int = 64

    def __post_init__(self) -> None:
        if not 1 <= self.crop <= self.resize:
            raise ValueError(
                f"model.preprocessing.crop is {self.crop} pixels, but the image is resized to {self.resize}: "
                f"choose a crop of 1 to {self.resize}"
            )
        if self.max_tokens < 3:
            raise ValueError(
                f"model.preprocessing.max_tokens is {self.max_tokens}; [CLS], one word and [SEP] need at least 3"
            )
