"""What an exam is, and what it says."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from align_train.evaluation.encoder import Encoder
from align_train.records import Tally

TIES = "a wrong candidate as near as the right one, within float32 rounding, comes before it"


@dataclass(frozen=True)
class Value:
    """One number of an exam.

    Attributes:
        value: a share of 1, unless the name says otherwise.
        low, high: its 95 % bootstrap interval; None where there is none.
        chance: what a model gets that knows nothing; None where that says nothing.
    """

    value: float
    low: float | None = None
    high: float | None = None
    chance: float | None = None


@dataclass(frozen=True)
class Score:
    """What an exam says of a model.

    Attributes:
        kind: retrieval, zero_shot, neighbours, classifier, linear_probe or health.
        values: numbers by name, the most important first.
        counts: what they are of: images, captions, classes ...
        dropped: images that could not be used, by reason.
        facts: what was measured and how: data, its hashes, templates, settings; plain values.
    """

    kind: str
    values: Mapping[str, Value]
    counts: Mapping[str, int]
    dropped: Tally = field(default_factory=Tally)
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """A score, equal on all ranks, and on rank 0 what draws a picture of it into a file, where there is one to draw."""

    score: Score
    draw: Callable[[Path], Path] | None = None


def check_cut_offs(ks: object) -> None:
    """Raise ValueError unless these are whole numbers of at least 1."""
    if not isinstance(ks, Sequence) or not ks or not all(isinstance(k, int) and k >= 1 for k in ks):
        raise ValueError(f"ks is {ks!r}: give a list of whole numbers of at least 1, such as [1,5,10]")


@contextmanager
def naming(exam: str) -> Iterator[None]:
    """Say in errors that a user can cause which exam they are of."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"exam {exam}: {error}") from error
    except OSError as error:
        raise OSError(f"exam {exam}: {error}") from error


class Exam(Protocol):
    """Measures a model on some data."""

    def check(self) -> None:
        """Open the data, and see that the settings fit it; embeds nothing. Errors as `take`."""

    def take(self, encoder: Encoder) -> Outcome:
        """Embed and judge; every rank must call it.

        Raises:
            ValueError: the data is not what the exam needs, or images of it cannot be used.
            OSError: it cannot be read.
        """
