"""Batches ahead of their use: read by processes or threads, in the order of their plans, and brought to the device."""

import copy
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice
from time import perf_counter

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from align_train import signals
from align_train.batch import Batch, StepBatch
from align_train.data.batches import BatchPlan, BatchPlans
from align_train.data.crew import Crew
from align_train.data.pairs import PairReader
from align_train.data.storage.cache import Cache

WORKERS = ("processes", "threads")


@dataclass(frozen=True)
class Reading:
    """How pairs are read.

    Attributes:
        use: `processes` or `threads` as workers.
        prefetch: (micro-)batches that each worker reads ahead; all together at least what a step takes.
        keep_decoded: images that each worker keeps in memory, decoded and resized; 3 x resize^2 bytes each.
        scaled_decoding: read JPEG at 1/2, 1/4 or 1/8 where that still is as large as needed.
        stall_seconds: without an answer, until a source is given up and named.
        max_quarantined: share of shards that may be broken before the run stops.
        cache: where copies of remote shards lie.

    Raises:
        ValueError: a value out of range.
    """

    use: str = "processes"
    prefetch: int = 4
    keep_decoded: int = 0
    scaled_decoding: bool = True
    stall_seconds: float = 120.0
    max_quarantined: float = 0.1
    cache: Cache = field(default_factory=Cache)

    def __post_init__(self) -> None:
        if self.use not in WORKERS:
            raise ValueError(f"data.reading.use is {self.use!r}: choose {' or '.join(WORKERS)}")
        if self.prefetch < 1:
            raise ValueError(f"data.reading.prefetch is {self.prefetch}: a worker reads at least 1 batch ahead")
        if self.keep_decoded < 0:
            raise ValueError(f"data.reading.keep_decoded is {self.keep_decoded}: give 0 or a number of images")
        if not self.stall_seconds > 0:
            raise ValueError(f"data.reading.stall_seconds is {self.stall_seconds}: give a time over 0")
        if not 0 <= self.max_quarantined <= 1:
            raise ValueError(f"data.reading.max_quarantined is {self.max_quarantined}: give a share from 0 to 1")


class Loader:
    """Batches of the plans, in their order.

    It has no length: Lightning would count the batches of before a resume in, and end the round early.

    Without workers, one thread reads each batch when it is asked for, so that a source that stalls is named even then.

    Args:
        reader: reads a plan.
        plans: what to read.
        workers: processes or threads that read.
        reading: how.
        device: batches are brought there while the one before is used, unless a step takes several; None leaves them
            where they are.
    """

    def __init__(
        self,
        reader: PairReader,
        plans: BatchPlans,
        workers: int,
        reading: Reading,
        device: torch.device | None = None,
    ) -> None:
        self.reader, self.plans, self.workers, self.reading = reader, plans, workers, reading
        self.device = device if device is not None and device.type == "cuda" else None
        # which shard each worker is reading, in memory that all see
        self._at_work = torch.zeros(max(workers, 1), dtype=torch.int64).share_memory_()

    def __iter__(self) -> Iterator[Batch]:
        read = self._processes() if self.workers and self.reading.use == "processes" else self._threads()
        return on_device(read, self.device) if self.device and self.plans.parts == 1 else read

    def _threads(self) -> Iterator[Batch]:
        crew = Crew(max(self.workers, 1))
        idle = deque(self._reader(worker) for worker in range(max(self.workers, 1)))

        def read(plan: BatchPlan) -> Batch:
            reader = idle.popleft()  # there are as many readers as threads
            try:
                batch = reader[plan]
            finally:
                idle.append(reader)
            return batch.pin_memory() if self.device else batch

        waiting: deque[Future[Batch]] = deque()
        plans = iter(self.plans)
        ahead = self.workers * self._prefetch
        try:
            while True:
                for plan in islice(plans, ahead + 1 - len(waiting)):
                    waiting.append(crew.submit(read, plan))
                if not waiting:
                    return
                try:
                    yield waiting.popleft().result(self.reading.stall_seconds)
                except TimeoutError as error:
                    raise error if str(error) else self._stalled() from None
        finally:
            crew.dismiss()

    def _processes(self) -> Iterator[Batch]:
        loader = DataLoader(
            self.reader,
            sampler=self.plans,
            batch_size=None,  # the reader makes batches
            num_workers=self.workers,
            collate_fn=_as_it_is,  # type: ignore[arg-type] # with batch_size=None it gets what the reader made
            pin_memory=self.device is not None,
            prefetch_factor=self._prefetch,
            timeout=self.reading.stall_seconds,
            worker_init_fn=_Begin(self._at_work),
        )
        batches = iter(loader)
        try:
            while (batch := next(batches, None)) is not None:
                yield batch
        except RuntimeError as error:
            raise self._stalled() if "timed out" in str(error) else error from None
        finally:
            batches._shutdown_workers()  # type: ignore[attr-defined] # after an error they would wait to be collected

    @property
    def _prefetch(self) -> int:
        """Batches that each worker reads ahead: all together at least what the next step takes."""
        return max(self.reading.prefetch, -(-self.plans.parts // max(self.workers, 1)))

    def _reader(self, worker: int) -> PairReader:
        reader = copy.copy(self.reader)
        reader.reading = self._at_work.numpy()[worker : worker + 1]
        return reader

    def awaited(self) -> str:
        """What a batch that does not come is waited for."""
        shards = [str(self.reader.shards[number - 1]) for number in self._at_work.tolist() if number]
        named = ", ".join(dict.fromkeys(shards))
        return f"no answer from {named}" if shards else "opening of shards, or decoding, takes too long"

    def _stalled(self) -> TimeoutError:
        return TimeoutError(
            f"no batch for {self.reading.stall_seconds:g} seconds: {self.awaited()}. Check its disk or network, or "
            "allow more with data.reading.stall_seconds"
        )


class Steps:
    """Micro-batches put together to what each step takes. It has no length either.

    Args:
        batches: micro-batches, of all steps in turn.
        parts: how many make a step.

    Attributes:
        waited: seconds spent in fetching so far; it only grows.
        asked: `perf_counter` when the fetching began that goes on now, or that failed; None while nothing is fetched.
    """

    def __init__(self, batches: Iterable[Batch], parts: int = 1) -> None:
        self.batches, self.parts = batches, parts
        self.waited = 0.0
        self.asked: float | None = None

    def __iter__(self) -> Iterator[StepBatch]:
        coming = iter(self.batches)
        while parts := self._fetched(coming):
            yield StepBatch(parts)

    def awaited(self) -> str:
        """What a step that does not come is waited for, as far as it is known; another thread may ask."""
        if isinstance(self.batches, Loader):
            return self.batches.awaited()
        return "links are being fetched" if isinstance(self.batches, DataLoader) else "its source does not answer"

    def _fetched(self, coming: Iterator[Batch]) -> list[Batch]:
        self.asked = asked = perf_counter()
        parts = list(islice(coming, self.parts))
        self.waited += perf_counter() - asked
        self.asked = None
        return parts


def on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches on a GPU, each copied from page-locked memory while the one before it is used."""
    stream = torch.cuda.Stream(device)

    def moved() -> Batch | None:
        batch = next(batches, None)
        if batch is None:
            return None
        with torch.cuda.stream(stream):
            return batch.to(device, non_blocking=True)

    coming = moved()
    while coming is not None:
        torch.cuda.current_stream(device).wait_stream(stream)
        batch = coming
        for tensor in batch.tensors():
            tensor.record_stream(torch.cuda.current_stream(device))  # its memory is not reused before it was used
        coming = moved()
        yield batch


class _Begin:
    """Tells a worker process where to note what it reads, and to leave signals to a process that listens.

    A class, since it must be pickled where processes spawn.
    """

    def __init__(self, at_work: Tensor) -> None:
        self._at_work, self._heard = at_work, signals.is_listening()

    def __call__(self, worker: int) -> None:
        if self._heard:
            signals.work_to_the_end()
        info = get_worker_info()
        assert info is not None
        info.dataset.reading = self._at_work.numpy()[worker : worker + 1]  # type: ignore[attr-defined]


def _as_it_is(batch: Batch) -> Batch:
    return batch
