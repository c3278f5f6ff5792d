"""Every pair once, in the order of the shards, centre-cropped: for validation and exams."""

import logging
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import TypeVar

from align_train.batch import Batch
from align_train.corpus.images import Unusable
from align_train.data.captions import Captions
from align_train.data.crew import Crew
from align_train.data.images import pixels_of
from align_train.data.pairs import Collate, Example, hashed
from align_train.data.storage.shards import PairFiles, Place, Shard, all_places
from align_train.records import Preprocessing, Tally

log = logging.getLogger(__name__)
T = TypeVar("T")


class EvaluationBatches:
    """Batches of every pair of `shards` once; the last one may be short, and a Tally stands where none can be used.

    A thread reads the next batch while one is used.

    Args:
        shards: what to read.
        preprocessing: as the model has it.
        batch_size: pairs a batch.
        captions: where captions come from; of several fields, the most probable.
        stall_seconds: without an answer, until a source is given up.

    Raises:
        ValueError: the shards hold no pair.
        TimeoutError: a source stalls.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        preprocessing: Preprocessing,
        batch_size: int = 256,
        captions: Captions | None = None,
        stall_seconds: float = 120.0,
    ) -> None:
        captions = captions or Captions()
        self.batch_size, self._stall_seconds, self._preprocessing = batch_size, stall_seconds, preprocessing
        self._files, self._collate = PairFiles(shards, captions), Collate(preprocessing.max_tokens)
        self._crew = Crew(1)
        self._reading = ", ".join(map(str, shards[:3]))
        places = self._crew.submit(lambda: list(all_places(shards, captions.kinds)))
        self.places = self._in_time(places, stall_seconds * max(len(shards), 1))
        if not self.places:
            raise ValueError(f"the {len(shards)} shards hold no pair: check that they are the right files")

    def __len__(self) -> int:
        return math.ceil(len(self.places) / self.batch_size)

    def __iter__(self) -> Iterator[Batch | Tally]:
        parts = [self.places[first : first + self.batch_size] for first in range(0, len(self.places), self.batch_size)]
        coming = self._crew.submit(self._batch, parts[0])
        for following in [*parts[1:], None]:
            batch = self._in_time(coming, self._stall_seconds)
            if following:
                coming = self._crew.submit(self._batch, following)
            yield batch

    def _in_time(self, future: "Future[T]", seconds: float) -> T:
        try:
            return future.result(seconds)
        except TimeoutError as error:
            if str(error):
                raise
            raise TimeoutError(
                f"no answer from {self._reading or 'the shards'} for {seconds:g} seconds: check its disk or network"
            ) from None

    def _batch(self, places: Sequence[Place]) -> Batch | Tally:
        return self._collate([self._example(place) for place in places])

    def _example(self, place: Place) -> Example | Tally:
        self._reading = where = self._files.where(place)
        try:
            image, caption = self._files.read(place)
            return Example(place.key, pixels_of(image, self._preprocessing, where), caption, hashed(image))
        except Unusable as problem:
            log.warning("skipped %s", problem)
            return Tally({problem.reason: 1})
