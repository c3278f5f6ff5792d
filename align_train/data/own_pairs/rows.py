"""What one's own data says, row by row, before anything of it is believed."""

from dataclasses import dataclass
from typing import Protocol

from align_train.corpus.images import Unusable


class Picture(Protocol):
    """An image that has not been read yet."""

    @property
    def name(self) -> str:
        """Its path or address as the data has it; empty where the data holds the file itself."""

    def read(self) -> bytes:
        """The encoded file.

        Raises:
            OSError: it is not there, or cannot be read.
        """


@dataclass(frozen=True, slots=True)
class Row:
    """An image and its captions, as found.

    Attributes:
        where: the row and its file, for messages: `row 17 of birds.csv`, rows counted from 1 without the header; of
            folders, the path.
        picture: None where the row names none.
        captions: as they stand there, none where it has none.
        label: its class, where the data has classes.
        problem: why the row cannot be used, where that shows before the image is read; the check counts it.
    """

    where: str
    picture: Picture | None
    captions: tuple[str, ...]
    label: str | None = None
    problem: Unusable | None = None
