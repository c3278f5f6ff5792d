"""Shards to the pairs that may be used: what is missing, broken or unwanted is counted before anything is decoded."""

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from align_train.corpus.select.row_filter import RowFilter
from align_train.data.crew import Crew
from align_train.data.metadata import PAIR, metadata_of
from align_train.data.sources import Quarantine, Source
from align_train.data.storage.tars import IMAGE, BrokenShard, Index
from align_train.records import Tally

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """A shard's index, the rows that may be used, in their order, and why the others may not."""

    index: Index
    rows: np.ndarray
    dropped: Tally


@dataclass(frozen=True)
class _Found:
    """As Opened, before the rules; metadata is what they look at, with the row of each pair as `_pair`."""

    index: Index
    rows: np.ndarray
    dropped: Tally
    metadata: pa.Table | None


class Opener:
    """Opens shards side by side, in threads.

    Args:
        sources: what there is to open; shards are numbered through all of them.
        stall_seconds: until a shard that does not answer is an error.
        max_quarantined: share of shards that may be broken.
        threads: shards that are opened at a time.
    """

    def __init__(
        self, sources: Sequence[Source], stall_seconds: float = 120.0, max_quarantined: float = 0.1, threads: int = 8
    ) -> None:
        self.shards = [shard for source in sources for shard in source.shards]
        self._source_of = [source for source in sources for _ in source.shards]
        self.quarantine = Quarantine(len(set(map(str, self.shards))), max_quarantined)
        self._stall_seconds, self._warned = stall_seconds, False
        self._given_up: set[int] = set()  # not tried again in this run: what one rank sees mended, another may not yet
        self._fetchers, self._readers = Crew(threads), Crew(threads)

    def open(self, numbers: Sequence[int]) -> dict[int, Opened]:
        """The shards of these numbers; one that is broken is quarantined and left out.

        Raises:
            TimeoutError: a shard does not answer; it is named.
            ValueError: a rule does not work on a shard, or too many are broken.
        """
        numbers = [number for number in dict.fromkeys(numbers) if number not in self._given_up]
        fetching = {number: self._fetchers.submit(self.shards[number].bring) for number in numbers}
        reading: dict[int, Future[_Found]] = {}
        shown = threading.current_thread() is threading.main_thread()  # not while training goes on
        for number in tqdm(numbers, "bring shards", unit="shard", delay=3, disable=not shown, leave=False):
            with self._quarantined(number):
                fetching[number].result()  # without a limit: the cache knows when a download stalls
                reading[number] = self._readers.submit(self._read, number)
        self._check_room(list(reading))
        found: dict[int, _Found] = {}
        for number, future in reading.items():
            with self._quarantined(number):
                found[number] = future.result(self._stall_seconds)
                self.quarantine.names.pop(str(self.shards[number]), None)  # it may be of before a resume
                if lost := found[number].dropped["truncated_shard"]:
                    reason = f"it ends too early: {lost} pairs are lost, those before are used"
                    self.quarantine.add(self.shards[number], reason)
        return dict(self._kept(found))

    @contextmanager
    def _quarantined(self, number: int) -> Iterator[None]:
        shard = self.shards[number]
        try:
            yield
        except TimeoutError as error:
            if str(error):  # of the cache
                raise
            raise TimeoutError(
                f"{shard} did not answer for {self._stall_seconds:g} seconds: check its disk or network, or allow "
                "more with data.reading.stall_seconds"
            ) from None
        except (BrokenShard, FileNotFoundError, PermissionError, IsADirectoryError) as error:
            self.quarantine.add(shard, str(error))
            self._given_up.add(number)
        except OSError as error:  # of the machine or the network: the next rank may not have it
            raise OSError(f"{shard} cannot be read now ({error}): mend that, and go on with resume=RUN") from error

    def _check_room(self, numbers: Sequence[int]) -> None:
        """Warn, once, of a cache that lets go of shards before they are read; ValueError if not one window fits."""
        remote = [shard for shard in (self.shards[number] for number in numbers) if shard.room]
        size = sum(shard.size for shard in remote)
        if remote and size > remote[0].room:
            raise ValueError(
                f"{len(remote)} shards of {size / 1e9:.3g} GB are read together, and the cache may hold "
                f"{remote[0].room / 1e9:.3g} GB: raise data.reading.cache.limit_gb, or lower data.order.shuffle_shards"
            )
        if not self._warned and remote and 2 * size > remote[0].room:
            self._warned = True
            log.warning(
                "%d shards take %.3g GB, and the cache may hold %.3g GB, less than two such windows: shards will be "
                "downloaded again and again. Raise data.reading.cache.limit_gb or lower data.order.shuffle_shards",
                len(remote),
                size / 1e9,
                remote[0].room / 1e9,
            )

    def _read(self, number: int) -> _Found:
        """The pairs that have what a pair needs, and what the rules look at."""
        shard, source = self.shards[number], self._source_of[number]
        index = shard.index(source.kinds)
        usable, dropped = np.ones(len(index), bool), Tally()
        if lost := shard.lost(index):
            dropped["truncated_shard"] = lost
        captioned = np.logical_or.reduce([index.has(kind) for kind in source.captions.kinds])
        reasons = {"duplicate_key": index.repeated, "no_image": ~index.has(IMAGE), "no_caption": ~captioned}
        for reason, unusable in reasons.items():
            if count := int((usable & unusable).sum()):
                dropped[reason] = count
            usable &= ~unusable
        rows = np.flatnonzero(usable)
        if not source.rules:
            return _Found(index, rows, dropped, None)
        metadata = metadata_of(shard, index, rows, source.plan.columns, dropped)
        return _Found(index, rows, dropped, metadata)

    def _kept(self, found: Mapping[int, _Found]) -> Iterator[tuple[int, Opened]]:
        """What the rules keep, source by source; DuckDB is used by one thread at a time."""
        filters: dict[str, RowFilter] = {}
        with ExitStack() as stack:
            for number, shard in found.items():
                source, rows = self._source_of[number], shard.rows
                if shard.metadata is not None:
                    if source.name not in filters:
                        filters[source.name] = stack.enter_context(RowFilter(source.plan))
                    kept, lost = filters[source.name].kept(shard.metadata)
                    rows = kept[PAIR].to_numpy()
                    shard.dropped.update(lost)
                yield number, Opened(shard.index, rows, shard.dropped)


@contextmanager
def counted_not_told() -> Iterator[None]:
    """Without a line in the log for every broken pair and shard, where a report or a later pass has them all."""
    room = logging.getLogger("align_train.data")
    before = room.level
    room.setLevel(logging.ERROR)
    try:
        yield
    finally:
        room.setLevel(before)
