"""Shards to batches: datasets that PyTorch's DataLoader reads, and the collation."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import BertTokenizer

from align_train.batch import Batch
from align_train.corpus.images import Unusable
from align_train.data.images import Augmentation, pixels_of, resized
from align_train.data.order import Order
from align_train.data.shards import OpenShards, Shard
from align_train.data.tokens import load_tokenizer, tokenize
from align_train.records import Preprocessing, Tally

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Example:
    """One decoded pair: uint8 pixels (H, W, 3), and what was dropped on the way to it."""

    key: str
    pixels: np.ndarray
    caption: str
    dropped: Tally = field(default_factory=Tally)


class TrainingPairs(Dataset[Example]):
    """Augmented pairs by position in an endless order.

    A pair that cannot be used is counted by reason, and another of the same epoch, drawn from seed and position,
    stands in its place: batches stay full and equal on all ranks.

    Args:
        shards: what to read; a shard listed twice is seen twice an epoch.
        preprocessing: sizes, as the model has them.
        augmentation: random changes.
        seed: of order and augmentation.
        window: shards whose rows are mixed.
        keep: images kept in memory, decoded and resized, so that later epochs only augment them; a worker process
            keeps its own. One takes 3 * resize^2 bytes.
    """

    attempts = 20

    def __init__(
        self,
        shards: Sequence[Shard],
        preprocessing: Preprocessing,
        augmentation: Augmentation,
        seed: int = 0,
        window: int = 16,
        keep: int = 0,
    ) -> None:
        self.shards = list(shards)
        self.preprocessing = preprocessing
        self.augmentation = augmentation
        self.seed = seed
        self.order = Order([len(shard) for shard in self.shards], seed, window)
        self._open = OpenShards(max(64, 2 * window))
        self._keep = keep
        self._kept: dict[tuple[Path, int], tuple[str, Image.Image, str]] = {}

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> Example:
        random = np.random.default_rng([self.seed, position])
        epoch_start = position - position % len(self)
        dropped, candidate, reason = Tally(), position, ""
        for _ in range(self.attempts):
            place = self.order[candidate]
            try:
                return self._example(place.shard, place.row, random, dropped)
            except Unusable as problem:
                log.warning("skipped %s", problem)
                dropped[problem.reason] += 1
                reason = str(problem)
                candidate = epoch_start + int(random.integers(len(self)))
        raise ValueError(
            f"{self.attempts} pairs in a row could not be used ({dropped.described()}), the last was {reason}: "
            "check these shards, most of what they hold is broken"
        )

    def _example(self, shard: int, row: int, random: np.random.Generator, dropped: Tally) -> Example:
        key, image, caption = self._kept.get((self.shards[shard].path, row)) or self._resized(shard, row)
        pixels = np.array(self.augmentation(image, self.preprocessing.crop, random))
        return Example(key, pixels, caption, dropped)

    def _resized(self, shard: int, row: int) -> tuple[str, Image.Image, str]:
        """Key, decoded and resized image, and caption; kept in memory while there is room."""
        key, content, caption = self._open.read(self.shards[shard], row)
        path = self.shards[shard].path
        pair = key, resized(content, self.preprocessing, f"{key} in {path}"), caption
        if len(self._kept) < self._keep:
            self._kept[path, row] = pair
        return pair


class EvaluationPairs(Dataset[Example | Tally]):
    """Every pair once, in the order of the shards, centre-cropped; a Tally stands where one cannot be used."""

    def __init__(self, shards: Sequence[Shard], preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing
        self._open = OpenShards()
        self.places = [(shard, row) for shard in shards for row in range(len(shard))]
        if not self.places:
            raise ValueError(f"the {len(shards)} shards hold no pair: check that they are the right files")

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> Example | Tally:
        shard, row = self.places[number]
        try:
            key, image, caption = self._open.read(shard, row)
            return Example(key, pixels_of(image, self.preprocessing, where=f"{key} in {shard.path}"), caption)
        except Unusable as problem:
            log.warning("skipped %s", problem)
            return Tally({problem.reason: 1})


@dataclass(frozen=True)
class GlobalBatches(Sampler[list[int]]):
    """This rank's positions of each global batch, from step `start` to step `stop`.

    Step s covers positions s * batch_size to (s + 1) * batch_size whatever the number of ranks; each rank takes
    one contiguous part.

    Raises:
        ValueError: the global batch cannot be shared out evenly.
    """

    batch_size: int
    start: int
    stop: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.batch_size % self.world_size:
            raise ValueError(
                f"data.batch_size is {self.batch_size} over all ranks, but there are {self.world_size} ranks: "
                "make it a positive multiple of their number"
            )

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __iter__(self) -> Iterator[list[int]]:
        share = self.batch_size // self.world_size
        for step in range(self.start, self.stop):
            first = step * self.batch_size + self.rank * share
            yield list(range(first, first + share))


class Collate:
    """Examples to a Batch: stacks pixels, tokenizes captions, adds up what was dropped."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._tokenizer: BertTokenizer | None = None

    def __call__(self, examples: Sequence[Example | Tally]) -> Batch | Tally:
        """A Batch of what could be used; a bare Tally if nothing could."""
        dropped, used = Tally(), []
        for example in examples:
            if isinstance(example, Example):
                used.append(example)
                dropped.update(example.dropped)
            else:
                dropped.update(example)
        if not used:
            return dropped
        self._tokenizer = self._tokenizer or load_tokenizer(self.max_tokens)
        input_ids, mask = tokenize(self._tokenizer, [example.caption for example in used])
        pixels = torch.from_numpy(np.stack([example.pixels for example in used])).permute(0, 3, 1, 2)
        return Batch(pixels, input_ids, mask, tuple(example.key for example in used), dropped)


def evaluation_batches(
    shards: Sequence[Shard], preprocessing: Preprocessing, batch_size: int = 256, workers: int = 0
) -> DataLoader:
    """Batches of every pair of `shards` once, in their order; the last one may be short."""
    return DataLoader(
        EvaluationPairs(shards, preprocessing),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=Collate(preprocessing.max_tokens),
    )
