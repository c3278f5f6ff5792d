"""Labels as a source has them, to numbers of classes."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align_train.data.testsets.checks import check_there, listed, refuse


def numbered(
    source: object, keys: Sequence[str], labels: Sequence[Any], classes: Sequence[str] | None = None
) -> tuple[list[int], list[str]]:
    """Number of the class of each image, and the names of the classes.

    Integers count the classes from 0; without names of the classes, the integers that occur are the names, in their
    order. Texts are names of classes; without a list, those that occur, sorted.

    Args:
        source: names the set in messages.
        keys: names of the N images.
        labels: of each: integers, texts of integers, or texts.
        classes: their names, where they are known.

    Raises:
        ValueError: a text is not among the names, or two classes have the same name.
    """
    integers = [_integer(label) for label in labels]
    if all(integer is not None for integer in integers):
        numbers = [integer for integer in integers if integer is not None]
        if classes is not None:
            return numbers, list(classes)
        order = sorted(set(numbers))
        place = {number: index for index, number in enumerate(order)}
        return [place[number] for number in numbers], list(map(str, order))
    names = list(map(str, labels))
    classes = sorted(set(names)) if classes is None else list(classes)
    twice = [name for name, count in Counter(classes).items() if count > 1]
    refuse(source, twice, len(classes), "classes have the name of another, and labels are names", "Use numbers")
    place_of = {name: index for index, name in enumerate(classes)}
    outside = [f"{key} ({name})" for key, name in zip(keys, names, strict=True) if name not in place_of]
    remedy = f"The {len(classes):,} classes are {listed(classes)}: name the list that is meant"
    refuse(source, outside, len(names), "images have a label outside the class list", remedy)
    return [place_of[name] for name in names], classes


def read_classes(path: str) -> list[str]:
    """Names of classes, one a line, as in CLIP_benchmark's classnames.txt; the first line is class 0.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no text, or has no name, or an empty line between two.
    """
    check_there(path, False, "give a file with the name of a class on each line")
    try:
        lines = Path(path).read_text("utf-8").rstrip().splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text ({error}): write a name of a class on each line") from error
    if not lines:
        raise ValueError(f"{path} is empty: write a name of a class on each line")
    empty = [f"line {number}" for number, line in enumerate(lines, 1) if not line.strip()]
    refuse(path, empty, len(lines), "lines are empty", "Write a name of a class on each line")
    return [line.strip() for line in lines]


def _integer(label: Any) -> int | None:
    if isinstance(label, str):
        return int(label) if re.fullmatch(r"-?[0-9]+", label) else None
    return label if isinstance(label, int) else None
