"""Plans to batches: pairs are read, decoded, changed at random and tokenized."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import BertTokenizer
from xxhash import xxh3_64_digest

from align_train.batch import Batch
from align_train.corpus.images import Unusable
from align_train.data.batches import BatchPlan
from align_train.data.images import Augmentation, resized, training_pixels
from align_train.data.sources import Source
from align_train.data.storage.shards import OpenFiles, Place
from align_train.data.tokens import load_tokenizer, tokenize
from align_train.records import Preprocessing, Tally

log = logging.getLogger(__name__)
TOLD = 10  # pairs of each reason that a worker names in the log


@dataclass(frozen=True, slots=True)
class Example:
    """One decoded pair: uint8 pixels (H, W, 3), what was dropped on the way to it, and the bytes that it took.

    `image_hash` is of the encoded image.
    """

    key: str
    pixels: np.ndarray
    caption: str
    image_hash: bytes
    dropped: Tally = field(default_factory=Tally)
    bytes: int = 0


class PairReader(Dataset[Batch]):
    """A plan to a batch of augmented pairs. A pickled or copied reader opens its own files.

    A pair that cannot be used is counted by reason, and a spare stands in its place: batches stay full and equal on all
    ranks.

    Args:
        sources: what the plans' numbers of shards count.
        preprocessing: sizes, as the model has them.
        augmentation: random changes.
        seed: of captions and augmentation.
        keep: images kept in memory, decoded and resized, so that later epochs only augment them; each process keeps its
            own. One takes 3 * resize^2 bytes.
        scaled: read JPEG at 1/2, 1/4 or 1/8 where that still is as large as needed.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        preprocessing: Preprocessing,
        augmentation: Augmentation,
        seed: int = 0,
        keep: int = 0,
        scaled: bool = True,
    ) -> None:
        self.shards = [shard for source in sources for shard in source.shards]
        self._captions = [source.captions for source in sources for _ in source.shards]
        self.preprocessing, self.augmentation, self.seed, self.scaled = preprocessing, augmentation, seed, scaled
        self.reading = np.zeros(1, np.int64)  # number of the shard that is being read, from 1; 0 for none
        self._keep, self._told = keep, Tally()
        self._files, self._collate = OpenFiles(), Collate(preprocessing.max_tokens)
        self._kept: dict[tuple[str, int], tuple[np.ndarray, bytes]] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_kept": {}, "_files": OpenFiles(), "_collate": Collate(self.preprocessing.max_tokens)}

    def __getitem__(self, plan: BatchPlan) -> Batch:
        """The pairs of a plan.

        Raises:
            ValueError: too many cannot be used, about a third.
            OSError: a disk fails.
        """
        side = self.preprocessing.crop
        pixels = np.empty((len(plan), side, side, 3), np.uint8)
        spares = iter(plan.spares)
        examples = [self._example(plan, number, spares, pixels[number]) for number in range(len(plan))]
        return self._collate.batch(torch.from_numpy(pixels), examples, plan.dropped)

    def _example(self, plan: BatchPlan, number: int, spares: Iterator[Place], pixels: np.ndarray) -> Example:
        """Fill in the pixels of a pair, or of the next spare that can be used."""
        random = np.random.default_rng([self.seed, plan.first + number * plan.stride])
        dropped, candidate = Tally(), plan.places[number]
        while True:
            try:
                image, caption, size = self.pair(candidate, random)
                pixels[:] = self._pixels(image, candidate, random)  # at once, while they are in the CPU's cache
                return Example(candidate.key, pixels, caption, self._hash(image, candidate), dropped, size)
            except Unusable as problem:
                self._tell(problem)
                dropped[problem.reason] += 1
                reason = str(problem)
            found = next(spares, None)
            if found is None:
                raise ValueError(
                    f"{len(plan.spares)} pairs stood in for unusable ones among {len(plan)}, and there are no more; "
                    f"the last was {reason}: look at these shards with `align-train doctor`"
                )
            candidate = found

    def _tell(self, problem: Unusable) -> None:
        """Log the first of each reason; all are counted."""
        self._told[problem.reason] += 1
        if self._told[problem.reason] <= TOLD:
            log.warning("skipped %s", problem)
        if self._told[problem.reason] == TOLD:
            log.warning("further pairs with %s are counted, not told", problem.reason)

    def where(self, place: Place) -> str:
        """A pair's key and shard, for messages."""
        return f"{place.key} in {self.shards[place.shard]}"

    def pair(self, place: Place, random: np.random.Generator) -> tuple[bytes, str, int]:
        """Encoded image (empty for one that is kept), caption, and bytes that were read.

        Raises:
            Unusable: no caption; or shard_gone, truncated_shard since the shard was opened.
        """
        shard, where = self.shards[place.shard], self.where(place)
        self.reading[0] = place.shard + 1
        try:
            texts, image = shard.opened(lambda path: self._members(path, place, where))
        except FileNotFoundError as error:
            raise Unusable("shard_gone", f"{where} ({error})") from error
        finally:
            self.reading[0] = 0
        caption = self._captions[place.shard].choose(texts, random, where)
        return image, caption, len(image) + sum(map(len, texts.values()))

    def _members(self, path: Path, place: Place, where: str) -> tuple[dict[str, bytes], bytes]:
        texts = {kind: self._files.read(path, span, where) for kind, span in place.texts.items()}
        assert place.image is not None  # plans have no others
        known = self._name(place) in self._kept
        return texts, b"" if known else self._files.read(path, place.image, where)

    def _pixels(self, image: bytes, place: Place, random: np.random.Generator) -> np.ndarray:
        """Decoded and changed; what is decoded is kept while there is room."""
        where = self.where(place)
        if not self._keep:
            return training_pixels(image, self.preprocessing, self.augmentation, random, where, self.scaled)
        name = self._name(place)
        if name in self._kept:
            square, _ = self._kept[name]
        else:
            square = resized(image, self.preprocessing, where, self.scaled)
            if len(self._kept) < self._keep:
                self._kept[name] = square, hashed(image)
        return self.augmentation(square, self.preprocessing.crop, random)

    def _hash(self, image: bytes, place: Place) -> bytes:
        return hashed(image) if image else self._kept[self._name(place)][1]

    def _name(self, place: Place) -> tuple[str, int]:
        return self.shards[place.shard].address, place.row


def hashed(content: bytes) -> bytes:
    """Eight bytes that are equal where the contents are, and as good as never elsewhere (XXH3)."""
    return xxh3_64_digest(content)


class Collate:
    """Examples to a Batch: stacks pixels, tokenizes captions, adds up what was dropped."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._tokenizer: BertTokenizer | None = None

    def __call__(self, examples: Sequence[Example | Tally]) -> Batch | Tally:
        """A Batch of what could be used; a bare Tally if nothing could."""
        used = [example for example in examples if isinstance(example, Example)]
        unused = sum((example for example in examples if isinstance(example, Tally)), Tally())
        if not used:
            return unused
        return self.batch(torch.from_numpy(np.stack([example.pixels for example in used])), used, unused)

    def batch(self, pixels: Tensor, examples: Sequence[Example], dropped: Tally) -> Batch:
        """A Batch of examples and their pixels, uint8 (B, H, W, 3); `dropped` comes on top of what they count."""
        self._tokenizer = self._tokenizer or load_tokenizer(self.max_tokens)
        input_ids, mask = tokenize(self._tokenizer, [example.caption for example in examples])
        keys, size = tuple(example.key for example in examples), sum(example.bytes for example in examples)
        dropped = sum((example.dropped for example in examples), Tally(dropped))
        hashes = b"".join(example.image_hash + hashed(example.caption.encode()) for example in examples)
        identities = torch.from_numpy(np.frombuffer(hashes, np.int64).reshape(-1, 2).copy())
        return Batch(pixels.permute(0, 3, 1, 2), input_ids, mask, keys, mask.sum(1), identities, dropped, bytes=size)
