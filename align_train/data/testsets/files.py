"""Images that are files in folders."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from align_train.data.testsets.checks import refuse
from align_train.data.testsets.sets import digest, file_identity


@dataclass(frozen=True)
class ImageFiles:
    """N files.

    Attributes:
        keys: name of each in the set.
        paths: where each lies.
    """

    keys: tuple[str, ...]
    paths: tuple[str, ...]

    @property
    def identity(self) -> str:
        """Of the files' paths, sizes and times of writing."""
        return digest(map(file_identity, self.paths))

    def read(self, number: int) -> bytes:
        """The content of a file; OSError where it cannot be read."""
        with open(self.paths[number], "rb") as file:
            return file.read()

    def where(self, number: int) -> str:
        """Its path."""
        return self.paths[number]


def image_files(source: object, folder: str, places: Iterable[tuple[str, Sequence[str]]]) -> ImageFiles:
    """The files of images, each at the first of its places that has one; every folder is listed once.

    Args:
        source: names the set in messages.
        folder: below which all places are.
        places: key, and file names below the folder, of each image.

    Raises:
        ValueError: files are missing.
    """
    listing = _Listing()
    keys, paths, missing = list[str](), list[str](), list[str]()
    for key, names in places:
        candidates = [os.path.join(folder, name) for name in names]
        found = next((path for path in candidates if path in listing), None)
        keys.append(key)
        if found is None:
            missing.append(key)
        else:
            paths.append(found)
    remedy = f"Put them under {os.path.abspath(folder)}, or set images to the folder that has them"
    refuse(source, missing, len(keys), "image files are missing", remedy)
    return ImageFiles(tuple(keys), tuple(paths))


class _Listing:
    """Which files there are; a folder is read once and not asked for each of its files."""

    def __init__(self) -> None:
        self._names: dict[str, frozenset[str]] = {}

    def __contains__(self, path: str) -> bool:
        folder, name = os.path.split(path)
        if folder not in self._names:
            self._names[folder] = _file_names(folder or ".")
        return name in self._names[folder]


def _file_names(folder: str) -> frozenset[str]:
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries if entry.is_file())
    except (FileNotFoundError, NotADirectoryError):
        return frozenset()
