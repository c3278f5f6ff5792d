"""Karpathy's JSON of COCO, Flickr30k and Flickr8k, or one's own in that form."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from align_train.data.own_pairs.opened import OpenedPairs
from align_train.data.own_pairs.pictures import PictureFile
from align_train.data.own_pairs.rows import Row

_FORM = 'write {"images": [{"filename": ..., "split": "train", "sentences": [{"raw": ...}]}]}'


def open_karpathy(path: str, images: str | None, split: str | None, validation: str | None) -> OpenedPairs:
    """The images of a split with all their captions.

    Args:
        path: the JSON file.
        images: folder of `filepath`/`filename`, or of all files without folders; None for that of the JSON file.
        split: None for train, with COCO's restval as is the custom.
        validation: a split; None for val, if there is one.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such JSON, or has no such split.
    """
    entries, folder = _entries(path), Path(images) if images else Path(path).parent
    counts = Counter(entry["split"] for entry in entries)
    trained = (split,) if split else ("train", *(["restval"] if counts["restval"] else []))
    held_out = validation or ("val" if counts["val"] and "val" not in trained else None)
    for name in (trained[0], *([held_out] if held_out else [])):
        if not counts[name]:
            there = ", ".join(f"{name} ({count:,})" for name, count in counts.items())
            raise ValueError(f"{path} has no image in the split {name}: its splits are {there}")
    custom = " (restval is part of train, as is the custom for COCO)" if "restval" in trained[1:] else ""
    left = ", ".join(name for name in counts if name not in (*trained, held_out)) or "none"
    told = [
        f"{path}: trains on the split {' and '.join(trained)}{custom}, validates on {held_out or 'none of them'}; not "
        f"used: {left}. Change with pairs.split=NAME, pairs.validation=NAME"
    ]

    def rows(splits: Sequence[str]) -> Iterator[Row]:
        for number, entry in enumerate(entries, 1):
            if entry["split"] in splits:
                yield _row(entry, f"image {number} of {Path(path).name}", folder)

    return OpenedPairs(
        told,
        lambda: rows(trained),
        (lambda: rows((held_out,))) if held_out else None,
        sum(counts[name] for name in trained),
    )


def _row(entry: Mapping[str, Any], where: str, folder: Path) -> Row:
    sentences = entry.get("sentences")
    listed = sentences if isinstance(sentences, list) else []
    captions = tuple(each["raw"] for each in listed if isinstance(each, dict) and isinstance(each.get("raw"), str))
    file = entry.get("filename")
    if not isinstance(file, str) or not file:
        return Row(where, None, captions)
    place = folder / str(entry.get("filepath") or "") / file
    return Row(where, PictureFile(place if place.exists() else _without_folder(place, folder / file)), captions)


def _without_folder(place: Path, flat: Path) -> Path:
    """Where all images lie in one folder; the first place if it is not there either, for messages."""
    return flat if flat.exists() else place


def _entries(path: str) -> list[dict[str, Any]]:
    with open(path, "rb") as file:
        try:
            document = json.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no JSON ({error}): {_FORM}") from error
    entries = document.get("images") if isinstance(document, dict) else None
    if isinstance(document, dict) and "annotations" in document:
        raise ValueError(
            f"{path} has captions apart from images, as COCO's own files: give Karpathy's dataset_coco.json, or {_FORM}"
        )
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} has no list of images: {_FORM}, or one object a line in a .jsonl")
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or not isinstance(entry.get("split"), str):
            raise ValueError(f"{path}: image {number} has no split: {_FORM}")
    return entries
