"""Some pairs of a source, read as training reads them: what they are like, and why some cannot be used."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from io import BytesIO
from typing import Any

import numpy as np
import simplejpeg  # type: ignore[import-untyped]  # has no types
from PIL import Image
from tqdm import tqdm

from align_train.corpus.images import FORMATS, Unusable
from align_train.corpus.shards import image_format
from align_train.data.crew import Crew
from align_train.data.images import Augmentation, training_pixels
from align_train.data.opening import Opened
from align_train.data.pairs import PairReader
from align_train.data.sources import Source
from align_train.data.storage.shards import Place, place_of
from align_train.data.tokens import load_tokenizer
from align_train.records import Preprocessing

_EDGES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # the last lengths of the bins of a histogram
_TOGETHER = 1000  # captions that are tokenized at a time


@dataclass(frozen=True)
class Sampling:
    """Which pairs are read, and how.

    Attributes:
        preprocessing: as the model has it.
        augmentation: random changes of images.
        scaled: as `Reading.scaled_decoding`.
        pairs: how many are read of each source.
        keep: the pixels of so many are kept.
        seed: of what is drawn.
        stall_seconds: until a pair that is not read is an error.
    """

    preprocessing: Preprocessing
    augmentation: Augmentation
    scaled: bool = True
    pairs: int = 512
    keep: int = 40
    seed: int = 1
    stall_seconds: float = 120.0


@dataclass(frozen=True)
class Seen:
    """A pair that was read; `lost` says why it cannot be used, and `where` where it is.

    Width and height are those of the file, pixels uint8 (crop, crop, 3) as the model sees them.
    """

    key: str
    where: str
    lost: str = ""
    caption: str = ""
    format: str = ""
    bytes: int = 0
    width: int = 0
    height: int = 0
    digest: str = ""
    pixels: np.ndarray | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Spread:
    """How a number is spread over n things; the quantiles are values that occur, 0 where there is none."""

    min: int
    median: int
    p95: int
    max: int
    mean: float

    @classmethod
    def of(cls, values: Sequence[int]) -> "Spread":
        """Of these values."""
        least, median, p95, most = np.quantile(values or [0], [0, 0.5, 0.95, 1], method="inverted_cdf").tolist()
        return cls(least, median, p95, most, mean=float(np.mean(values or [0])))


@dataclass(frozen=True)
class PairFacts:
    """Pairs that were read: how many are usable, the others by reason with an example each, and the usable images."""

    read: int
    usable: int
    unusable: Mapping[str, int]
    examples: Mapping[str, str]
    formats: Mapping[str, int]
    width: Spread
    height: Spread
    bytes: Spread


@dataclass(frozen=True)
class CaptionFacts:
    """Lengths of captions in words and in WordPiece tokens, [CLS] and [SEP] included.

    Attributes:
        words, tokens: of a caption.
        word_bins, token_bins: captions by length, as `5-6`.
        cut: share of the captions that are longer than max_tokens.
        unknown: share of [UNK] in the tokens but [CLS] and [SEP].
        frequent: the captions that come most often, at most ten, if they come more than once.
    """

    words: Spread
    word_bins: Mapping[str, int]
    tokens: Spread
    token_bins: Mapping[str, int]
    cut: float
    unknown: float
    frequent: Mapping[str, int]


def read_pairs(source: Source, opened: Mapping[int, Opened], sampling: Sampling) -> list[Seen]:
    """Pairs drawn from opened shards, which are known by their numbers in the source, in random order.

    Raises:
        TimeoutError: a pair is not read in time; it is named.
        OSError: a shard cannot be read any more.
    """
    pairs = [(number, row) for number, shard in opened.items() for row in shard.rows.tolist()]
    drawn = np.random.default_rng(sampling.seed).permutation(len(pairs))[: sampling.pairs].tolist()
    places = [place_of(number, opened[number].index, row) for number, row in (pairs[chosen] for chosen in drawn)]
    reader = PairReader([source], sampling.preprocessing, sampling.augmentation, scaled=sampling.scaled)
    crew, read = Crew(1), partial(_read, reader, sampling)
    coming = [crew.submit(read, place, number) for number, place in enumerate(places)]
    seen = []
    for place, future in zip(places, tqdm(coming, desc="read pairs", unit="pair", delay=3), strict=True):
        try:
            seen.append(future.result(sampling.stall_seconds))
        except TimeoutError:
            raise TimeoutError(
                f"{place.key} in {source.shards[place.shard]} was not read in {sampling.stall_seconds:g} seconds: "
                "check its disk, or allow more with data.reading.stall_seconds"
            ) from None
    return seen


def _read(reader: PairReader, sampling: Sampling, place: Place, number: int) -> Seen:
    where, random = reader.where(place), np.random.default_rng([sampling.seed, number])
    try:
        image, caption, _ = reader.pair(place, random)
        pixels = training_pixels(image, sampling.preprocessing, sampling.augmentation, random, where, sampling.scaled)
    except Unusable as problem:
        return Seen(place.key, str(problem).removeprefix(f"{problem.reason}: "), problem.reason)
    width, height = stored_size(image)
    return Seen(
        place.key,
        where,
        caption=caption,
        format=image_format(image) or "unknown",
        bytes=len(image),
        width=width,
        height=height,
        digest=sha256(image).hexdigest(),
        pixels=pixels if number < sampling.keep else None,
    )


def stored_size(image: bytes) -> tuple[int, int]:
    """Width and height by the header of an image that was decoded."""
    with suppress(ValueError):  # no JPEG
        height, width, *_ = simplejpeg.decode_jpeg_header(image)
        return width, height
    with Image.open(BytesIO(image), formats=FORMATS) as file:
        return file.size


def pair_facts(seen: Sequence[Seen]) -> PairFacts:
    """What images are like, and what cannot be used."""
    used = [pair for pair in seen if not pair.lost]
    lost = [pair for pair in seen if pair.lost]
    return PairFacts(
        read=len(seen),
        usable=len(used),
        unusable=dict(Counter(pair.lost for pair in lost).most_common()),
        examples={pair.lost: pair.where for pair in reversed(lost)},  # the first of each
        formats=dict(Counter(pair.format for pair in used).most_common()),
        width=Spread.of([pair.width for pair in used]),
        height=Spread.of([pair.height for pair in used]),
        bytes=Spread.of([pair.bytes for pair in used]),
    )


def caption_facts(captions: Sequence[str], max_tokens: int) -> CaptionFacts:
    """How long captions are, and whether the vocabulary is theirs."""
    return facts_of_counted(captions, *token_counts(captions), max_tokens)


def token_counts(captions: Sequence[str]) -> tuple[list[int], int]:
    """WordPiece tokens of each caption, [CLS] and [SEP] included, and how many [UNK] there are in all of them."""
    tokenizer, tokens, unknown = load_tokenizer(1_000_000), list[int](), 0  # a length that cuts nothing
    for first in range(0, len(captions), _TOGETHER):
        ids = tokenizer(list(captions[first : first + _TOGETHER]), padding=False)["input_ids"]
        tokens += map(len, ids)
        unknown += sum(row.count(tokenizer.unk_token_id) for row in ids)
    return tokens, unknown


def facts_of_counted(captions: Sequence[str], tokens: Sequence[int], unknown: int, max_tokens: int) -> CaptionFacts:
    """As `caption_facts`, of captions whose tokens were counted."""
    words = [len(caption.split()) for caption in captions]
    return CaptionFacts(
        words=Spread.of(words),
        word_bins=_bins(words),
        tokens=Spread.of(tokens),
        token_bins=_bins(tokens),
        cut=sum(length > max_tokens for length in tokens) / max(len(tokens), 1),
        unknown=unknown / max(sum(tokens) - 2 * len(tokens), 1),
        frequent={caption: count for caption, count in Counter(captions).most_common(10) if count > 1},
    )


def _bins(lengths: Sequence[int]) -> dict[str, int]:
    """Counts by bin, without the empty ones at either end."""
    counts = {}
    for before, last in zip((0, *_EDGES), _EDGES, strict=False):
        name = str(last) if last == before + 1 else f"{before + 1}-{last}"
        counts[name] = sum(before < length <= last for length in lengths)
    counts[f"over {_EDGES[-1]}"] = sum(length > _EDGES[-1] for length in lengths)
    full = [number for number, count in enumerate(counts.values()) if count]
    return dict(list(counts.items())[full[0] : full[-1] + 1]) if full else {}


def repeats(opened: Mapping[int, Opened], seen: Sequence[Seen]) -> dict[str, dict[str, Any]]:
    """Count and an example of what comes again: keys of one opened shard in another, captions and images of pairs."""
    used = [pair for pair in seen if not pair.lost]
    things = {
        "keys": [key for shard in opened.values() for key in dict.fromkeys(shard.index.keys)],
        "captions": [pair.caption for pair in used],
        "images": [pair.digest for pair in used],
    }
    where = {pair.digest: pair.where for pair in used}
    found: dict[str, dict[str, Any]] = {}
    for name, values in things.items():
        often = Counter(values).most_common(1)
        example = often[0][0] if often and often[0][1] > 1 else ""
        found[name] = {"count": len(values) - len(set(values)), "example": where.get(example, example)}
    return found
