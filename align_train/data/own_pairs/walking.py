"""What lies below a folder."""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from align_train.data.storage.tars import IMAGE_EXTENSIONS


@dataclass(frozen=True)
class Contents:
    """Files below a folder, their paths relative to it and sorted.

    Attributes:
        images: files with an image's ending (jpg, jpeg, png, webp, gif, bmp, tif, tiff, image), in any case.
        others: all other files.
        hidden: number of files and folders whose names begin with a dot; these folders are not looked into.
        folders: names of the folders right below it.
    """

    images: list[str]
    others: list[str]
    hidden: int = 0
    folders: list[str] = field(default_factory=list)

    def told(self, folder: str, taken: frozenset[str] = frozenset()) -> list[str]:
        """A line that counts by their ending the others, less those that are taken, and the hidden; or no line."""
        endings = Counter(Path(name).suffix.lower() or "no ending" for name in self.others if name not in taken)
        counts = [f"{count:,} with {ending}" for ending, count in endings.most_common()]
        counts += [f"{self.hidden:,} hidden"] if self.hidden else []
        total = endings.total() + self.hidden
        return [f"{folder}: not taken: {total:,} files ({', '.join(counts)})"] if counts else []


def contents(folder: str) -> Contents:
    """Walk through a folder and those in it, links to folders included.

    Raises:
        OSError: it cannot be read.
    """
    images, others, hidden, folders = list[str](), list[str](), 0, list[str]()
    for place, below, files in os.walk(folder, onerror=_raise, followlinks=True):
        hidden += sum(name.startswith(".") for name in (*below, *files))
        below[:] = sorted(name for name in below if not name.startswith("."))
        folders = folders or (below[:] if place == folder else [])
        for name in files:
            if not name.startswith("."):
                key = os.path.relpath(os.path.join(place, name), folder)
                (images if Path(name).suffix[1:].lower() in IMAGE_EXTENSIONS else others).append(key)
    return Contents(sorted(images), sorted(others), hidden, folders)


def _raise(error: OSError) -> None:
    raise error
