"""The sample corpus as a test that needs no file but the package's."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from align_train.corpus.sample_corpus import is_held_out, sample_parts
from align_train.data.testsets.checks import captioned
from align_train.data.testsets.sets import CaptionedImages, digest
from align_train.records import Pair

CONCEPTS: dict[str, Callable[[Pair], bool]] = {
    "all": lambda pair: True,
    "seen": lambda pair: not is_held_out(pair),
    "held_out": is_held_out,
}


@dataclass(frozen=True)
class PairImages:
    """The images of pairs in memory.

    Attributes:
        pairs: whose keys name the images.
    """

    pairs: tuple[Pair, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        """Those of the pairs."""
        return tuple(pair.key for pair in self.pairs)

    @property
    def identity(self) -> str:
        """Of the keys: what ships in the package does not change."""
        return digest(["sample corpus", *self.keys])

    def read(self, number: int) -> bytes:
        """The bytes of an image."""
        return self.pairs[number].image

    def where(self, number: int) -> str:
        """Its key."""
        return f"{self.pairs[number].key} of the sample corpus"


@dataclass(frozen=True)
class SamplePart:
    """Emoji of the shipped corpus, one caption each.

    Attributes:
        part: test_unseen_rendering, whose vendor is never trained on, or held_out_concepts.
        concepts: all, seen (in training, from other vendors) or held_out.
        name: of the set; by default the part and the concepts.

    Raises:
        ValueError: there is no such part, or the concepts are none of these.
    """

    part: str = "test_unseen_rendering"
    concepts: str = "all"
    name: str | None = None

    def __post_init__(self) -> None:
        emoji = ("test_unseen_rendering", "held_out_concepts")
        if self.part not in emoji or self.concepts not in CONCEPTS:
            raise ValueError(
                f"part is {self.part!r} and concepts {self.concepts!r}: choose {' or '.join(emoji)}, and one of "
                f"{', '.join(CONCEPTS)}"
            )

    def open(self) -> CaptionedImages:
        """The pairs in the corpus's order.

        Raises:
            ValueError: the part has none of these concepts.
            FileNotFoundError: the package is not whole.
        """
        pairs = tuple(pair for pair in _parts()[self.part, ""] if CONCEPTS[self.concepts](pair))
        name = self.name or f"sample {self.part}, {self.concepts} concepts"
        return captioned(name, name, PairImages(pairs), [[pair.caption] for pair in pairs])


@cache
def _parts() -> dict[tuple[str, str], list[Pair]]:
    return sample_parts()
