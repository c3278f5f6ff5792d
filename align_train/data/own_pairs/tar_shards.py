"""Tar shards: `key.jpg` with `key.txt`, `key.json` or both."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from align_train.corpus.images import Unusable
from align_train.data.own_pairs.cells import is_empty, texts_of
from align_train.data.own_pairs.columns import LABEL_NAMES, SAMPLE, caption_names
from align_train.data.own_pairs.opened import OpenedPairs
from align_train.data.own_pairs.pictures import PictureInShard
from align_train.data.own_pairs.rows import Row
from align_train.data.own_pairs.text_files import lines_of
from align_train.data.own_pairs.walking import contents
from align_train.data.storage.shards import OpenFiles, Place, Shard, all_places, find_shards

_KINDS = ("txt", "json")


def open_tar_shards(path: str, captions: Sequence[str] | None, label: str | None) -> OpenedPairs:
    """The pairs of shards in their order; each line of `key.txt` is a caption.

    Args:
        path: a file, a folder of tars, a glob or a brace range.
        captions: fields of `key.json` that hold captions; None takes `key.txt`, or else the field of a usual name.
        label: the field of classes; None takes one of a usual name.

    Raises:
        OSError: there are no such shards, or one cannot be read.
        ValueError: a shard is no tar, or no captions are found.
    """
    shards = find_shards(path)
    members = _Members(shards)
    first = list(members.readable(islice(all_places(shards, _KINDS), SAMPLE)))
    if not first:
        raise ValueError(f"{path} has no pair, or none of the first {SAMPLE} can be read: see what is in its tars")
    fields = list(dict.fromkeys(name for _, found in first for name in found))
    for setting, names in (("caption_columns", captions or ()), ("label_column", [label] if label else [])):
        if lacking := [name for name in names if name not in fields]:
            there = ", ".join(fields) or "none"
            raise ValueError(
                f"{path}: no key.json of the first {SAMPLE} pairs has the field {lacking[0]} of pairs.{setting}; they "
                f"have {there}"
            )
    named = tuple(captions or caption_names(fields))
    texts = captions is None and any(lines for lines, _ in first)
    if not texts and not named:
        raise ValueError(
            f"{path} has no captions: neither key.txt nor a key.json with captions. The fields of the JSON are "
            f"{', '.join(fields) or 'none'}: set pairs.caption_columns=[NAME,...]"
        )
    label = label or next((name for name in LABEL_NAMES if name in fields), None)
    sources = [*(["lines of key.txt"] if texts else []), *(f"{name} of key.json" for name in named)]
    told = [
        f"{path}: {len(shards):,} shards; captions from {', or where there are none from '.join(sources[:2])}, classes "
        f"from {f'{label} of key.json' if label else 'nowhere'}; fields of key.json: {', '.join(fields) or 'none'}. "
        "Change with pairs.caption_columns=[NAME,...], pairs.label_column=NAME"
    ]
    if Path(path).is_dir():
        found = contents(path)
        left = [name for name in (*found.images, *found.others) if os.sep in name or not name.endswith(".tar")]
        told += replace(found, others=left).told(path)

    def rows() -> Iterator[Row]:
        for place in all_places(shards, _KINDS):
            picture = PictureInShard(shards[place.shard], place.image) if place.image else None
            try:
                lines, found = members.of(place)
                own = lines if captions is None and lines else texts_of(found, named)
            except Unusable as problem:
                yield Row(members.where(place), picture, (), problem=problem)
                continue
            known = found.get(label) if label else None
            yield Row(members.where(place), picture, own, None if is_empty(known) else str(known))

    return OpenedPairs(told, rows, total=_total(shards))


class _Members:
    """Reads what stands beside the images."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards, self._files = shards, OpenFiles()

    def where(self, place: Place) -> str:
        lost = ", of which the tar has lost the end" if place.lost == "truncated_shard" else ""
        return f"{place.key} in {self.shards[place.shard]}{lost}"

    def readable(self, places: Iterable[Place]) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
        """What `of` says of each place, less those where it cannot."""
        for place in places:
            with suppress(Unusable):
                yield self.of(place)

    def of(self, place: Place) -> tuple[tuple[str, ...], Mapping[str, Any]]:
        """The lines of `key.txt` and the fields of `key.json`, none where they are not there.

        Raises:
            Unusable: `unreadable_text` or `broken_json`.
            OSError: the tar cannot be read.
        """
        where, path = self.where(place), self.shards[place.shard].path
        try:
            texts = {kind: self._files.read(path, span, where) for kind, span in place.texts.items()}
            fields = json.loads(texts.get("json") or b"{}")
        except Unusable as error:
            raise OSError(str(error)) from error
        except (ValueError, RecursionError) as error:
            raise Unusable("broken_json", f"the JSON of {where} cannot be read ({error})") from error
        if not isinstance(fields, dict):
            raise Unusable("broken_json", f"the JSON of {where} is {type(fields).__name__}, and not an object")
        return lines_of(texts.get("txt", b""), f"the text of {where}"), fields


def _total(shards: Sequence[Shard]) -> int:
    """Pairs by the headers of all tars, as `all_places` has them."""
    total = 0
    for shard in shards:
        index = shard.index(_KINDS)
        total += len(index) + shard.lost(index)
    return total
