"""One folder of images a class."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from align_train.data.storage.tars import IMAGE_EXTENSIONS
from align_train.data.testsets.checks import check_there, labelled
from align_train.data.testsets.files import ImageFiles
from align_train.data.testsets.sets import LabelledImages
from align_train.records import Tally


@dataclass(frozen=True)
class ClassFolders:
    """A folder with a folder for each class, as ImageNet's validation images are kept; folders in those belong to it.

    Classes are sorted by name, and so are the images of each. Hidden files and files without an image's ending (jpg,
    jpeg, png, webp, gif, bmp, tif, tiff, image, in small letters or capitals) are counted, not taken.

    Attributes:
        path: the folder of the classes.
        allow_empty: take classes without images for possible answers; else they are an error.
        name: of the set; by default the folder's name.
    """

    path: str
    allow_empty: bool = False
    name: str | None = None

    def open(self) -> LabelledImages:
        """The images by class.

        Raises:
            OSError: the folder cannot be read.
            ValueError: there is no image, one class only, or a class without images.
        """
        classes, left_out = self._classes()
        keys, labels = list[str](), list[int]()
        for label, name in enumerate(classes):
            found = sorted(_files(os.path.join(self.path, name), name, left_out))
            keys += found
            labels += [label] * len(found)
        files = ImageFiles(tuple(keys), tuple(os.path.join(self.path, key) for key in keys))
        name = self.name or Path(self.path).absolute().name
        return labelled(self.path, name, files, labels, classes, self.allow_empty, left_out=left_out)

    def _classes(self) -> tuple[list[str], Tally]:
        """Names of the folders, and what else lies beside them."""
        check_there(self.path, True, "give the folder that holds one folder for each class")
        with os.scandir(self.path) as entries:
            each = [(entry.name, entry.is_dir()) for entry in entries]
        left_out = Tally(_why(name) or "outside_classes" for name, folder in each if not folder)
        left_out.update("hidden_folder" for name, folder in each if folder and _hidden(name))
        return sorted(name for name, folder in each if folder and not _hidden(name)), left_out


def _files(folder: str, start: str, left_out: Tally) -> Iterator[str]:
    """The images in a folder and those below it, their names beginning with `start`; others are counted."""
    with os.scandir(folder) as entries:
        for entry in entries:
            name = f"{start}/{entry.name}"
            if entry.is_dir():
                if _hidden(entry.name):
                    left_out["hidden_folder"] += 1
                else:
                    yield from _files(entry.path, name, left_out)
            elif why := _why(entry.name):
                left_out[why] += 1
            else:
                yield name


def _why(name: str) -> str:
    """Why a file is no image of the set; empty where it is one."""
    if _hidden(name):
        return "hidden_file"
    return "" if Path(name).suffix[1:].lower() in IMAGE_EXTENSIONS else "no_image_file"


def _hidden(name: str) -> bool:
    return name.startswith(".")
