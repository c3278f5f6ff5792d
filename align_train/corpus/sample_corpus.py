"""The shipped corpus of 11,058 pairs, and its split into parts: a pure function of the data, no random number."""

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pyarrow.parquet as pq

from align_train.records import Pair
from align_train.shipped import sample_corpus

HELD_OUT_SHARE = 0.1  # of the emoji concepts for test_unseen_concept, and of the clip art captions for validation

Parts = dict[tuple[str, str], list[Pair]]


def read_sample(path: Path | None = None) -> Iterator[Pair]:
    """Every pair of the sample, in the order of its file; metadata holds the columns that are known for that pair."""
    path = path or sample_corpus()
    if not path.is_file():
        raise FileNotFoundError(f"the sample corpus is missing at {path}: reinstall align-train, it ships this file")
    with pq.ParquetFile(path) as file:
        for rows in file.iter_batches(batch_size=1000):
            for row in rows.to_pylist():
                key, image, caption = row.pop("key"), row.pop("image"), row.pop("caption")
                yield Pair(key, image, caption, {name: value for name, value in row.items() if value is not None})


def unit_hash(data: bytes) -> float:
    """A number in [0, 1) that `data` alone fixes: the first eight bytes of its SHA-256 as a fraction of 2**64."""
    return int.from_bytes(sha256(data).digest()[:8], "big") / 2**64


def normalised(caption: str) -> str:
    """The caption as it is compared between parts: case-folded, each run of white space one space."""
    return " ".join(caption.casefold().split())


def sample_parts(path: Path | None = None) -> Parts:
    """The pairs of each (part, group); group is `clipart` or `emoji` in `train`, else empty.

    `test_unseen_rendering` is all of fluent3d; `test_unseen_concept` is its subset of held-out concepts, which no
    vendor shows in `train`; `validation` is a tenth of the clip art captions. `train` shares no caption and no image
    with `validation` or `test_unseen_concept`. Training pairs come in the order of their hashed keys, so that each
    shard mixes sources and subjects.
    """
    pairs = list(read_sample(path))
    clipart = [pair for pair in pairs if pair.metadata["source"] == "openclipart"]
    emoji = [pair for pair in pairs if pair.metadata["source"] in ("noto", "twemoji")]
    fluent = [pair for pair in pairs if pair.metadata["source"] == "fluent3d"]
    emoji_captions = {normalised(pair.caption) for pair in emoji}
    validation = [pair for pair in clipart if _for_validation(pair, emoji_captions)]
    unseen_captions = {normalised(pair.caption) for pair in emoji if _held_out_concept(pair)}
    held_captions = unseen_captions | {normalised(pair.caption) for pair in validation}
    # The same picture under another caption would show training what validation asks for.
    held_images = {pair.image for pair in validation}
    seen_clipart = [p for p in clipart if normalised(p.caption) not in held_captions and p.image not in held_images]
    return {
        ("train", "clipart"): _mixed(seen_clipart),
        ("train", "emoji"): _mixed([pair for pair in emoji if not _held_out_concept(pair)]),
        ("validation", ""): validation,
        ("test_unseen_rendering", ""): fluent,
        ("test_unseen_concept", ""): [pair for pair in fluent if _held_out_concept(pair)],
    }


def _held_out_concept(pair: Pair) -> bool:
    return unit_hash(pair.metadata["concept"].encode()) < HELD_OUT_SHARE


def _for_validation(pair: Pair, emoji_captions: set[str]) -> bool:
    """By caption, so that no caption is on both sides; a caption that emoji have too stays with the emoji."""
    caption = normalised(pair.caption)
    return unit_hash(caption.encode()) < HELD_OUT_SHARE and caption not in emoji_captions


def _mixed(pairs: list[Pair]) -> list[Pair]:
    return sorted(pairs, key=lambda pair: unit_hash(pair.key.encode()))
