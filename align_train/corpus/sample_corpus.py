"""The shipped corpus of 11,058 pairs, its split into parts and its metadata: pure functions, no random number.

`pairs.parquet` holds the images. The files beside it, one a part, are metadata in COYO's schema whose links,
`package:KEY`, `shipped_image` answers: a small COYO that needs no network. What they hold is decided here.
"""

import re
from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from align_train.corpus.coyo import SCHEMA
from align_train.corpus.phash import phash
from align_train.files import atomic_write
from align_train.records import Pair
from align_train.shipped import sample_corpus, vocabulary

HELD_OUT_SHARE = 0.1  # of the emoji concepts for test_unseen_concept, and of the clip art captions for validation
PACKAGE_URL = "package:"  # in the place of https://, followed by the key of the pair

SAMPLE_SCHEMA = pa.schema(
    [
        *SCHEMA,
        ("source", pa.string()),
        ("licence", pa.string()),
        ("concept", pa.string()),
        ("category", pa.string()),
        ("tags", pa.string()),
        ("keywords", pa.list_(pa.string())),
    ]
)

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


def shipped_image(key: str) -> bytes | None:
    """The encoded image behind the link `package:KEY`; None if the sample has no such pair, as a server says 404.

    The first call reads all images, 11 MB, and this process keeps them.

    Raises:
        FileNotFoundError: the package is not whole.
    """
    return _images().get(key)


@cache
def _images() -> dict[str, bytes]:
    return {pair.key: pair.image for pair in read_sample()}


def unit_hash(data: bytes) -> float:
    """A number in [0, 1) that `data` alone fixes: the first eight bytes of its SHA-256 as a fraction of 2**64."""
    return int.from_bytes(sha256(data).digest()[:8], "big") / 2**64


def normalised(caption: str) -> str:
    """The caption as it is compared between parts: case-folded, each run of white space one space."""
    return " ".join(caption.casefold().split())


def sample_parts(path: Path | None = None) -> Parts:
    """The pairs of each (part, group); group is `clipart` or `emoji` in `train`, else empty.

    `test_unseen_rendering` is all of fluent3d; `test_unseen_concept` is its subset of held-out concepts, which no
    vendor shows in `train`; `held_out_concepts` is what the two vendors of `train` draw for these, to fine-tune on;
    `validation` is a tenth of the clip art captions. `train` shares no caption and no image
    with `validation` or `test_unseen_concept`. Training pairs come in the order of their hashed keys, so that each
    shard mixes sources and subjects.
    """
    pairs = list(read_sample(path))
    clipart = [pair for pair in pairs if pair.metadata["source"] == "openclipart"]
    emoji = [pair for pair in pairs if pair.metadata["source"] in ("noto", "twemoji")]
    fluent = [pair for pair in pairs if pair.metadata["source"] == "fluent3d"]
    emoji_captions = {normalised(pair.caption) for pair in emoji}
    validation = [pair for pair in clipart if _for_validation(pair, emoji_captions)]
    unseen_captions = {normalised(pair.caption) for pair in emoji if is_held_out(pair)}
    held_captions = unseen_captions | {normalised(pair.caption) for pair in validation}
    # The same picture under another caption would show training what validation asks for.
    held_images = {pair.image for pair in validation}
    seen_clipart = [p for p in clipart if normalised(p.caption) not in held_captions and p.image not in held_images]
    return {
        ("train", "clipart"): _mixed(seen_clipart),
        ("train", "emoji"): _mixed([pair for pair in emoji if not is_held_out(pair)]),
        ("validation", ""): validation,
        ("test_unseen_rendering", ""): fluent,
        ("test_unseen_concept", ""): [pair for pair in fluent if is_held_out(pair)],
        ("held_out_concepts", ""): [pair for pair in emoji if is_held_out(pair)],
    }


def is_held_out(pair: Pair) -> bool:
    """Whether an emoji's concept is one of the tenth that `train` never shows."""
    return unit_hash(pair.metadata["concept"].encode()) < HELD_OUT_SHARE


def _for_validation(pair: Pair, emoji_captions: set[str]) -> bool:
    """By caption, so that no caption is on both sides; a caption that emoji have too stays with the emoji."""
    caption = normalised(pair.caption)
    return unit_hash(caption.encode()) < HELD_OUT_SHARE and caption not in emoji_captions


def _mixed(pairs: list[Pair]) -> list[Pair]:
    return sorted(pairs, key=lambda pair: unit_hash(pair.key.encode()))


def sample_metadata() -> dict[str, pa.Table]:
    """The metadata of each of `shipped.SAMPLE_PARTS`: columns of SAMPLE_SCHEMA, rows in the order of `sample_parts`.

    Null is what nobody has computed: GPT tokens, faces and the scores of CLIP, NSFW, watermark and aesthetics.
    Needs imagehash, which comes with `align-train[phash]`; takes about four seconds.
    """
    return {
        group or part: pa.Table.from_pylist([_row(pair) for pair in pairs], schema=SAMPLE_SCHEMA)
        for (part, group), pairs in sample_parts().items()
    }


def write_sample_metadata(folder: str | Path) -> None:
    """Writes the files that the package ships: FOLDER/PART.parquet for each part of `sample_metadata`."""
    for part, table in sample_metadata().items():
        with atomic_write(Path(folder) / f"{part}.parquet") as file:
            pq.write_table(table, file, compression="zstd")


def pair_id(key: str) -> int:
    """A positive int64 that the key alone fixes: the first eight bytes of its SHA-256 without the sign bit."""
    return int.from_bytes(sha256(key.encode()).digest()[:8], "big") & (2**63 - 1)


def text_counts(text: str) -> dict[str, int]:
    """The columns of COYO that follow from the text: characters, words and WordPiece tokens, no [CLS] and [SEP].

    Found from ten published rows of COYO, on all of which the three counts hold (tests/data/coyo_rows.json).
    """
    return {
        "text_length": len(text),
        "word_count": len(re.findall(r"\w+", text)),
        "num_tokens_bert": len(_tokenizer().encode(text, add_special_tokens=False).ids),
    }


@cache
def _tokenizer() -> Any:
    from tokenizers import BertWordPieceTokenizer

    return BertWordPieceTokenizer.from_file(str(vocabulary()), lowercase=True)


def _row(pair: Pair) -> dict[str, Any]:
    """What is known of the pair; a column that is not named becomes null."""
    return {
        **pair.metadata,  # width and height among them
        "id": pair_id(pair.key),
        "url": PACKAGE_URL + pair.key,
        "text": pair.caption,
        "image_phash": phash(pair.image),
        **text_counts(pair.caption),
    }
