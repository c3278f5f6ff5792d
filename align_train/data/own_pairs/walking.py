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
        hidden: number of files and folders that are hidden, see `is_hidden`; these folders are not looked into.
        folders: names of the folders right below it.
        links: number of links to folders that are read in another place, and not followed.
    """

    images: list[str]
    others: list[str]
    hidden: int = 0
    folders: list[str] = field(default_factory=list)
    links: int = 0

    def told(self, folder: str, taken: frozenset[str] = frozenset()) -> list[str]:
        """A line that counts by their ending the others, less those that are taken, the hidden and links; or none."""
        endings = Counter(Path(name).suffix.lower() or "no ending" for name in self.others if name not in taken)
        counts = [f"{count:,} with {ending}" for ending, count in endings.most_common()]
        counts += [f"{self.hidden:,} hidden"] if self.hidden else []
        counts += [f"{self.links:,} links to folders that are read already"] if self.links else []
        total = endings.total() + self.hidden + self.links
        return [f"{folder}: not taken: {total:,} files ({', '.join(counts)})"] if counts else []


def contents(folder: str) -> Contents:
    """Walk through a folder and those in it; links to folders are followed, but no folder is read twice.

    Raises:
        OSError: it cannot be read.
    """
    found, top = Contents([], []), os.path.realpath(folder)
    hidden = links = 0
    folders, seen = list[str](), set[str]()
    for place, below, files in os.walk(folder, onerror=_raise, followlinks=True):
        seen.add(os.path.realpath(place))
        hidden += sum(map(is_hidden, (*below, *files)))
        shown = sorted(name for name in below if not is_hidden(name))
        below[:] = [name for name in shown if not _elsewhere(os.path.join(place, name), top, seen)]
        links += len(shown) - len(below)
        folders = folders or (below[:] if place == folder else [])
        for name in files:
            if not is_hidden(name):
                key = os.path.relpath(os.path.join(place, name), folder)
                (found.images if ending(name) in IMAGE_EXTENSIONS else found.others).append(key)
    return Contents(sorted(found.images), sorted(found.others), hidden, folders, links)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none of the user's own: its name begins with a dot, or macOS zips made it."""
    return name.startswith(".") or name == "__MACOSX"


def ending(name: str) -> str:
    """After the last dot, in lower case, without the dot."""
    return os.path.splitext(name)[1][1:].lower()


def stem(name: str) -> str:
    """All before the last dot, folders included: what an image and its text have in common."""
    return os.path.splitext(name)[0]


def _elsewhere(place: str, top: str, seen: set[str]) -> bool:
    """Whether a folder is a link to one that is, or will be, read in another place: below or above `top`, or seen."""
    real = os.path.realpath(place)
    if real in seen:
        return True
    return os.path.islink(place) and (
        f"{real}{os.sep}".startswith(f"{top}{os.sep}") or f"{top}{os.sep}".startswith(real.rstrip(os.sep) + os.sep)
    )


def _raise(error: OSError) -> None:
    raise error
