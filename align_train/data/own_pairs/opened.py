"""Pairs that are ready to be read."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from align_train.data.own_pairs.rows import Row


@dataclass(frozen=True)
class OpenedPairs:
    """What was found, before it is checked.

    Attributes:
        told: lines for the user: what was taken for what, and how to change it.
        train: reads the rows from the first one, each time that it is called. Reading raises OSError or ValueError
            where a file as a whole cannot be read; of images only pictures do.
        validation: likewise; None where there is none.
        total: rows of `train`; None where that is not known before they are read.
    """

    told: list[str]
    train: Callable[[], Iterator[Row]]
    validation: Callable[[], Iterator[Row]] | None = None
    total: int | None = None
