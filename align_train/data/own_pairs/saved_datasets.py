"""Datasets of the library `datasets`: what save_to_disk wrote, or a repository of the Hugging Face hub."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from align_train.data.own_pairs.columns import PART, PARTS, SAMPLE, Columns, Wanted, choose_columns
from align_train.data.own_pairs.opened import OpenedPairs
from align_train.data.own_pairs.pictures import ALLOW, Links, is_link, looks_like_picture
from align_train.data.own_pairs.rows import Row

SAVED = ("state.json", "dataset_dict.json")  # one of them is in each folder of save_to_disk
VALIDATION = ("validation", "val", "valid", "dev")


def open_dataset(path: str, split: str | None, validation: str | None, wanted: Wanted, links: Links) -> OpenedPairs:
    """The rows of a split; what lies on the hub is streamed.

    Args:
        path: a folder that save_to_disk wrote, a hub id, or another folder that `load_dataset` reads.
        split: None for train, or for the only one.
        validation: a split, or the folder of a second dataset; None for a split that is called so, if there is one.
        wanted: columns.
        links: whether links may be followed.

    Raises:
        OSError: files cannot be read.
        ValueError: there is no such dataset, split or column, or images are links that may not be followed.
    """
    splits = _splits(path)
    parts = _parts(splits)
    names = parts or list(splits)
    trained = split or ("train" if parts or "train" in names or len(names) > 1 else names[0])
    held_out = validation or next((name for name in VALIDATION if name in names and name != trained), None)
    second = validation is not None and validation not in names and Path(validation).is_dir()
    for name in (trained, *([held_out] if held_out and not second else [])):
        if name not in names and not parts:
            raise ValueError(f"{path} has no split {name}: its splits are {', '.join(names)}")

    def rows(name: str, columns: Wanted) -> _Rows:
        return _Rows(
            path, next(iter(splits.values())) if parts else splits[name], columns, links, name if parts else None
        )

    left = ", ".join(name for name in names if name not in (trained, held_out)) or "none"
    how = f"rows whose column {PART} is" if parts else "the split"
    told = [
        f"{path}: trains on {how} {trained}, validates on {held_out or 'none of them'}; not used: {left}. Change "
        "with pairs.split=NAME, pairs.validation=NAME"
    ]
    data = rows(trained, wanted)
    opened = OpenedPairs([*told, data.columns.told(data.names)], data.read, total=data.total)
    if held_out is None:
        return opened
    same = Wanted(data.columns.image, data.columns.captions or None, data.columns.label, data.columns.templates)
    if not second:
        return replace(opened, validation=rows(held_out, same).read)
    other = open_dataset(held_out, None, None, same, links)
    return replace(opened, told=[*opened.told, *(f"validation: {line}" for line in other.told)], validation=other.train)


def _parts(splits: Mapping[str, Any]) -> list[str]:
    """Splits that a column of a dataset's only split names, as nlphuji/flickr30k has them; none for other datasets.

    The first rows need not have all of them.
    """
    rows = next(iter(splits.values()))
    if len(splits) > 1 or PART not in (rows.features or {}):
        return []
    first = {row[PART] for row in islice(rows.select_columns([PART]), 5 * SAMPLE)}
    return sorted(first) if first and first <= PARTS else []


class _Rows:
    """One split, images left as they are encoded."""

    def __init__(self, path: str, rows: Any, wanted: Wanted, links: Links, part: str | None) -> None:
        from datasets import ClassLabel, Image

        self.path, self.links, self.part, self.features = path, links, part, rows.features or {}
        for name, feature in self.features.items():
            if isinstance(feature, Image):
                rows = rows.cast_column(name, Image(decode=False))
        first: list[Mapping[str, Any]] = list(islice(rows, SAMPLE))
        self.names = list(self.features) or list(first[0] if first else {})
        self.columns: Columns = choose_columns(
            path, self.names, first, wanted, partial(looks_like_picture, folder=Path())
        )
        linked = sum(is_link(row.get(self.columns.image)) for row in first)
        if linked and not links.allowed:
            raise ValueError(
                f"{linked} of the first {len(first)} rows of {path} are links (column {self.columns.image}): {ALLOW}"
            )
        self.rows = rows.select_columns([*self.columns.taken, *([PART] if part else [])])
        label = self.features.get(self.columns.label)
        if isinstance(label, ClassLabel):
            self.columns = replace(self.columns, classes=tuple(label.names))
        self.total = None if part else len(rows) if hasattr(rows, "__len__") else _announced(rows)

    def read(self) -> Iterator[Row]:
        """The rows from the first one."""
        for number, cells in enumerate(self.rows, 1):
            if not self.part or cells[PART] == self.part or (self.part == "train" and cells[PART] == "restval"):
                yield self.columns.row(cells, f"row {number} of {self.path}", Path(), self.links)


def _splits(path: str) -> dict[str, Any]:
    """The splits by name; a dataset without splits is called train."""
    from datasets import Dataset, load_dataset, load_from_disk

    if any((Path(path) / name).is_file() for name in SAVED):
        saved = load_from_disk(path)
        return {str(saved.split or "train"): saved} if isinstance(saved, Dataset) else dict(saved)
    try:
        return {str(name): rows for name, rows in load_dataset(path, streaming=True).items()}
    except Exception as error:  # the library's own, and those of others: there is no common class
        raise ValueError(
            f"{path} could not be opened as a dataset of the Hugging Face hub or a folder ({type(error).__name__}: "
            f"{error}): correct pairs.path, or set pairs.format"
        ) from error


def _announced(rows: Any) -> int | None:
    """The rows of a stream, if its repository says how many there are."""
    known = (rows.info.splits or {}).get(str(rows.split)) if rows.split else None
    return known.num_examples or None if known else None
