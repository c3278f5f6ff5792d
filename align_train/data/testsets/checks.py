"""What every test set must be, whoever reads it; what is wrong is told with names and counts before any work."""

import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from align_train.data.testsets.sets import CaptionedImages, Images, LabelledImages
from align_train.records import Tally

log = logging.getLogger(__name__)
SHOWN = 5  # names in a message
HALF_A_CHARACTER = re.compile("[\ud800-\udfff]")  # of a JSON's pair, or a byte of a file name that is no UTF-8


def listed(names: Sequence[object]) -> str:
    """The first five names, and how many more there are."""
    more = len(names) - SHOWN
    return ", ".join(map(str, names[:SHOWN])) + (f" and {more:,} more" if more > 0 else "")


def check_there(path: str | Path, folder: bool, remedy: str) -> None:
    """A FileNotFoundError where there is no such file, or folder, with where it was looked for."""
    if not (Path(path).is_dir() if folder else Path(path).is_file()):
        kind = "folder" if folder else "file"
        raise FileNotFoundError(f"there is no {kind} {path}, looked for at {Path(path).absolute()}: {remedy}")


def refuse(source: object, names: Sequence[object], total: int, problem: str, remedy: str) -> None:
    """A ValueError if there are names: `SOURCE: 2 of 10 PROBLEM: a, b. REMEDY`."""
    if names:
        raise ValueError(f"{source}: {len(names):,} of {total:,} {problem}: {listed(names)}. {remedy}")


def captioned(
    source: object,
    name: str,
    images: Images,
    captions: Sequence[Sequence[str]],
    dropped: Tally | None = None,
    left_out: Tally | None = None,
) -> CaptionedImages:
    """A set of N images from the captions of each, without white space at their ends.

    Raises:
        ValueError: no image, two of one name, one without captions, or an empty caption; a name or caption that UTF-8
            cannot write.
    """
    dropped, left_out, keys = dropped or Tally(), left_out or Tally(), images.keys
    _some(source, keys, dropped + left_out)
    _writable(source, "image names", keys, "Rename them")
    _unique(source, keys)
    _writable(source, "captions", [text for texts in captions for text in texts], "Write the characters as UTF-8 does")
    stripped = [[text.strip() for text in texts] for texts in captions]
    total = len(keys)
    bare = [key for key, texts in zip(keys, stripped, strict=True) if not texts]
    refuse(source, bare, total, "images have no caption", "Write one for each, or take them out")
    empty = [key for key, texts in zip(keys, stripped, strict=True) if not all(texts)]
    refuse(source, empty, total, "images have an empty caption", "Write it, or take it out")
    _tell(source, total, dropped, left_out)
    owners = torch.tensor([number for number, texts in enumerate(stripped) for _ in texts])
    return CaptionedImages(name, images, [text for texts in stripped for text in texts], owners, dropped, left_out)


def labelled(
    source: object,
    name: str,
    images: Images,
    labels: Sequence[int],
    classes: Sequence[str],
    allow_empty: bool = False,
    dropped: Tally | None = None,
    left_out: Tally | None = None,
) -> LabelledImages:
    """A set of N images from the number of the class of each.

    Raises:
        ValueError: no image, two of one name, a name that UTF-8 cannot write, a label that is no class's, one class
            only, or, unless `allow_empty`, classes without images.
    """
    dropped, left_out = dropped or Tally(), left_out or Tally()
    _some(source, images.keys, dropped + left_out)
    _writable(source, "class names", classes, "Rename them")
    _writable(source, "image names", images.keys, "Rename them")
    _unique(source, images.keys)
    outside = [
        f"{key} ({label})" for key, label in zip(images.keys, labels, strict=True) if not 0 <= label < len(classes)
    ]
    remedy = f"The {len(classes):,} classes are numbered 0 to {len(classes) - 1:,}: name the list that is meant"
    refuse(source, outside, len(labels), "images have a label outside the class list", remedy)
    if len(set(labels)) < 2:
        raise ValueError(
            f"{source}: all {len(labels):,} images are of one class, {classes[labels[0]]!r}, so there is nothing to "
            "tell apart: name a set of two classes or more"
        )
    present = set(labels)
    empty = [each for number, each in enumerate(classes) if number not in present]
    remedy = "Add images, take the classes out, or set allow_empty=true to keep them as wrong answers"
    refuse(source, [] if allow_empty else empty, len(classes), "classes have no image", remedy)
    _tell(source, len(labels), dropped, left_out)
    return LabelledImages(name, images, torch.tensor(labels), tuple(classes), dropped, left_out)


def _some(source: object, keys: Sequence[str], others: Counter[str]) -> None:
    if not keys:
        why = f" ({Tally(others).described()})" if others else ""
        raise ValueError(f"{source}: there is no image that could be used{why}: check that it is the set that is meant")


def _unique(source: object, keys: Sequence[str]) -> None:
    twice = [key for key, count in Counter(keys).items() if count > 1]
    refuse(source, twice, len(set(keys)), "image names come more than once", "Name each image once")


def _writable(source: object, things: str, texts: Sequence[str], remedy: str) -> None:
    wrong = [ascii(text) for text in texts if HALF_A_CHARACTER.search(text)]
    refuse(source, wrong, len(texts), f"{things} are not UTF-8", remedy)


def _tell(source: object, total: int, dropped: Tally, left_out: Tally) -> None:
    if dropped:
        log.warning("%s: cannot use %s; %s images remain", source, dropped.described(), f"{total:,}")
    if left_out:
        log.info("%s: not of the set: %s; %s images are", source, left_out.described(), f"{total:,}")
