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
