"""Which columns hold the images, the captions and the classes; guessed by their names, else by what is in them."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align_train.corpus.hf_dataset import CAPTION_NAMES
from align_train.corpus.images import Unusable
from align_train.data.own_pairs.cells import described, is_empty, is_text, listed_texts, texts_of
from align_train.data.own_pairs.class_folders import PROMPTS, about, named_class
from align_train.data.own_pairs.pictures import Links, holds_picture, picture_of
from align_train.data.own_pairs.rows import Row
from align_train.data.testsets.table import IMAGE_NAMES as PATH_NAMES

SAMPLE = 20  # rows that a guess looks at
IMAGE_NAMES = (*PATH_NAMES, "image_name", "img_path", "file", "photo", "picture", "jpg", "png")
LINK_NAMES = ("image_url", "img_url", "url", "image_link", "link")
FURTHER_CAPTION_NAMES = ("comment", "sentence", "prompt", "raw")
LABEL_NAMES = ("label", "class", "class_name", "category")
PART = "split"  # the column that may name the split of a row
PARTS = frozenset({"train", "restval", "validation", "val", "valid", "dev", "test"})
_NUMBER = re.compile(r"\s*[-+]?[\d.,]+(e[-+]?\d+)?\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Wanted:
    """What the user says about columns; None is guessed.

    Attributes:
        image: of paths, links or bytes.
        captions: one or several.
        label: of classes; guessed by name alone.
        templates: sentences that make captions of the label, whatever other columns there are.
    """

    image: str | None = None
    captions: tuple[str, ...] | None = None
    label: str | None = None
    templates: tuple[str, ...] = ()


@dataclass(frozen=True)
class Columns:
    """The columns that are taken.

    Attributes:
        image: of paths, links or bytes.
        captions: empty where templates make them of the label.
        label: of classes.
        templates: of captions.
        listed: those of `captions` whose cells are lists written as text.
        classes: names of the classes, where the label is their number.
    """

    image: str
    captions: tuple[str, ...]
    label: str | None
    templates: tuple[str, ...] = ()
    listed: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()

    @property
    def taken(self) -> list[str]:
        """All of them, each once."""
        return list(dict.fromkeys([self.image, *self.captions, *([self.label] if self.label else [])]))

    def row(self, cells: Mapping[str, Any], where: str, folder: Path, links: Links) -> Row:
        """The row of these cells; paths are relative to `folder`. ValueError where links are not allowed."""
        label = self._label(cells)
        try:
            captions = texts_of(cells, self.captions, self.listed)
            picture = picture_of(cells.get(self.image), folder, links)
        except Unusable as problem:
            return Row(where, None, (), label, problem)
        if not self.captions and label is not None:
            captions = about(named_class(label), self.templates)
        return Row(where, picture, captions, label)

    def _label(self, cells: Mapping[str, Any]) -> str | None:
        """The class of a row; none for a cell that is empty, or a number that stands for no class (-1)."""
        cell = None if self.label is None else cells.get(self.label)
        if is_empty(cell):
            return None
        if self.classes and isinstance(cell, int):
            return self.classes[cell] if 0 <= cell < len(self.classes) else None
        return str(cell)

    def told(self, names: Iterable[str]) -> str:
        """The line that says what is taken, of all columns, and how to change it."""
        captions = " and ".join(self.captions) or f"{len(self.templates)} templates about {self.label}"
        captions += f" (lists in brackets: {' and '.join(self.listed)})" if self.listed else ""
        label = f", classes from {self.label}" if self.label else ""
        others = ", ".join(name for name in names if name not in self.taken) or "none"
        return (
            f"columns: images from {self.image}, captions from {captions}{label}; not used: {others}. Change with "
            "pairs.image_column=NAME, pairs.caption_columns=[NAME,...], pairs.label_column=NAME"
            + (f". {PROMPTS}" if self.templates else "")
        )


def choose_columns(
    source: str,
    names: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    wanted: Wanted,
    shows: Callable[[Any], bool],
) -> Columns:
    """The columns that are wanted, else those of usual names, else those whose first values say what they are.

    Args:
        source: names the data in messages.
        names: all columns.
        rows: the first ones.
        wanted: what the user says.
        shows: whether a cell is an image.

    Raises:
        ValueError: a column that is wanted is not there or holds something else, the guess finds none or several, or
            there are templates but no classes for them.
    """
    cells = {name: [row[name] for row in rows if not is_empty(row.get(name))] for name in names}
    pictures = [name for name in names if _most(cells[name], shows)]
    image = _wanted(source, "image_column", wanted.image, names) or _image(source, names, pictures)
    _refuse_what_is_no_image(source, image, cells[image])
    label = _wanted(source, "label_column", wanted.label, names) or _label(names, image, wanted)
    if wanted.templates:
        if wanted.captions or label is None:
            remedy = "leave out pairs.caption_columns" if wanted.captions else "set pairs.label_column=NAME"
            raise ValueError(f"pairs.templates make captions of the classes of {source} alone: {remedy}")
        return Columns(image, (), label, wanted.templates)
    if wanted.captions:
        captions = tuple(_wanted(source, "caption_columns", name, names) or "" for name in wanted.captions)
        if wrong := [name for name in captions if cells[name] and not _most(cells[name], is_text)]:
            held = next(cell for cell in cells[wrong[0]] if not is_text(cell))
            raise ValueError(
                f"{source}: the column {wrong[0]} holds {described(held)}, and captions are texts or lists of texts: "
                "set pairs.caption_columns to another, or write them so"
            )
        return Columns(image, captions, label, listed=_listed(captions, cells))
    texts = [name for name in names if name not in (image, label)]
    texts = [name for name in texts if not cells[name] or _most(cells[name], is_text)]
    named = caption_names(texts)
    others = [name for name in texts if name not in pictures and cells[name] and not _most(cells[name], _is_number)]
    if named or len(others) == 1:
        captions = named or tuple(others)
        return Columns(image, captions, label, listed=_listed(captions, cells))
    problem = f"several columns that could be captions ({', '.join(others)})" if others else "no captions column"
    more = f", or pairs.templates to write captions about {label}" if label else ""
    raise ValueError(
        f"{source} has {problem}; its columns are {', '.join(names)}. Set pairs.caption_columns=[NAME,...]{more}"
    )


def caption_names(names: Iterable[str]) -> tuple[str, ...]:
    """Columns of the first usual name that there is, with those that count on: `caption`, `captions`, `caption_2`."""
    names = list(names)
    for known in dict.fromkeys(map(_stem, (*CAPTION_NAMES, *FURTHER_CAPTION_NAMES))):
        if found := tuple(name for name in names if _stem(name) == known):
            return found
    return ()


def _wanted(source: str, setting: str, name: str | None, names: Sequence[str]) -> str | None:
    if name is not None and name not in names:
        raise ValueError(f"{source} has no column {name}, which pairs.{setting} names; it has {', '.join(names)}")
    return name


def _image(source: str, names: Sequence[str], pictures: Sequence[str]) -> str:
    by_name = {name.lower(): name for name in names}
    described = [name for name in names if name.lower().endswith("_file_name")]  # as imagefolder allows
    named = [by_name[known] for known in IMAGE_NAMES if known in by_name] + described
    named += [by_name[known] for known in LINK_NAMES if known in by_name]
    if named:
        return next((name for name in named if name in pictures), named[0])
    if len(pictures) == 1:
        return pictures[0]
    found = f"{', '.join(pictures)} could all be" if pictures else "none is"
    raise ValueError(
        f"{source} has the columns {', '.join(names)}, of which {found} the images: set pairs.image_column=NAME"
    )


def _label(names: Sequence[str], image: str, wanted: Wanted) -> str | None:
    by_name = {name.lower(): name for name in names if name != image and name not in (wanted.captions or ())}
    return next((by_name[known] for known in LABEL_NAMES if known in by_name), None)


def _stem(name: str) -> str:
    return re.sub(r"[ _-]?\d+$", "", name.lower()).removesuffix("s")


def _most(cells: Sequence[Any], test: Callable[[Any], bool]) -> bool:
    """Whether over half of the cells pass; one file that is missing should not hide a column."""
    return 2 * sum(map(test, cells)) > len(cells)


def _listed(captions: Iterable[str], cells: Mapping[str, Sequence[Any]]) -> tuple[str, ...]:
    return tuple(name for name in captions if cells[name] and _most(cells[name], lambda cell: bool(listed_texts(cell))))


def _refuse_what_is_no_image(source: str, image: str, cells: Sequence[Any]) -> None:
    """ValueError for lists of images, arrays of pixels, and structs without bytes and path."""
    wrong = [cell for cell in cells if not holds_picture(cell)]
    if 2 * len(wrong) > len(cells):
        raise ValueError(
            f"{source}: the column {image} holds {described(wrong[0])}, and an image is a path, a link, the bytes of "
            "a file, or a struct with one of them: set pairs.image_column=NAME, or write one image a row"
        )


def _is_number(cell: object) -> bool:
    return isinstance(cell, str) and bool(_NUMBER.fullmatch(cell))
