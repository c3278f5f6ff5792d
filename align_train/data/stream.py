"""The stream of pairs to batches, shared out over ranks and workers."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from align_train.batch import Batch
from align_train.corpus.images import Unusable
from align_train.corpus.stream import START, CoyoStream, Position
from align_train.data.images import Augmentation, training_pixels
from align_train.data.pairs import Collate, Example, hashed
from align_train.records import Pair, Preprocessing, Tally

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Share:
    """This rank's part of the stream.

    Attributes:
        rank: number of this rank.
        ranks: how many there are.
        workers: processes of each rank that read, at least 1; each has a part of the stream of its own.
        taken: batches that this rank has used before.
        positions: where each part goes on; a part that is not there begins.
    """

    rank: int = 0
    ranks: int = 1
    workers: int = 1
    taken: int = 0
    positions: Mapping[int, Position] = field(default_factory=dict)

    @property
    def parts(self) -> int:
        """Parts of the stream, over all ranks."""
        return self.ranks * self.workers

    def part(self, worker: int) -> int:
        """The part that this process reads: workers take turns, and the turn goes on where it was."""
        return self.rank * self.workers + (worker + self.taken) % self.workers


class StreamedBatches(IterableDataset[Batch]):
    """Full batches of augmented pairs, without end; each says where its part of the stream goes on.

    Args:
        stream: yields pairs.
        share: which of them are for this rank.
        preprocessing: as the model has it.
        augmentation: random changes of images.
        batch_size: pairs a batch on this rank.
    """

    def __init__(
        self,
        stream: CoyoStream,
        share: Share,
        preprocessing: Preprocessing,
        augmentation: Augmentation,
        batch_size: int,
    ) -> None:
        self.stream, self.share, self.batch_size = stream, share, batch_size
        self.preprocessing, self.augmentation = preprocessing, augmentation
        self._collate = Collate(preprocessing.max_tokens)

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        part = self.share.part(worker.id if worker else 0)
        examples: list[Example] = []
        dropped = Tally()
        start = self.share.positions.get(part, START)
        with closing(self.stream.items(start, part, self.share.parts)) as items:
            for item in items:
                dropped.update(item.dropped)
                if item.pair is None:
                    continue
                try:
                    examples.append(self._example(item.pair, [self.stream.seed, part, *item.after]))
                except Unusable as problem:
                    log.warning("skipped %s", problem)
                    dropped[problem.reason] += 1
                    continue
                if len(examples) == self.batch_size:
                    batch = self._collate(examples)
                    assert isinstance(batch, Batch)
                    yield replace(batch, dropped=dropped, position=(part, *item.after))
                    examples, dropped = [], Tally()

    def _example(self, pair: Pair, seed: Sequence[int]) -> Example:
        random = np.random.default_rng(seed)
        pixels = training_pixels(pair.image, self.preprocessing, self.augmentation, random, pair.metadata["url"])
        return Example(pair.key, pixels, pair.caption, hashed(pair.image), bytes=len(pair.image))
