"""Results from the thread that downloads to the one that consumes, bounded in bytes."""

import socket
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from queue import SimpleQueue
from typing import Generic, TypeVar

from align_train.corpus.fetch.terms import Download

K = TypeVar("K")
OVERHEAD = 1000  # bytes that a result costs beside its content, so that failures are bounded too


class Handover(Generic[K]):
    """One producer, one consumer. Each counter has one writer, so that none needs a lock.

    Attributes:
        alarm: a socket that becomes readable when the producer should look again: there is room, or it is to stop.
        stopped: the consumer wants no more.
    """

    def __init__(self, ahead_bytes: int) -> None:
        self.alarm, self._bell = socket.socketpair()
        self.alarm.setblocking(False)
        self._bell.setblocking(False)
        self.stopped = False
        self._ahead = ahead_bytes
        self._results: SimpleQueue[deque[tuple[K, Download]] | BaseException | None] = SimpleQueue()
        self._held = 0  # bytes that ever came, less those given up; the producer's
        self._taken = 0  # bytes that ever left; the consumer's
        self._full = False

    def hold(self, count: int) -> None:
        """Producer: so many bytes more are in memory, or fewer if negative."""
        self._held += count

    def has_room(self) -> bool:
        """Producer: whether a download may start. If not, the alarm will ring when it may."""
        if self._held - self._taken < self._ahead:
            return True
        self._full = True  # before the second look: the consumer has made room by then, or sees this and rings
        return self._held - self._taken < self._ahead

    def put(self, results: deque[tuple[K, Download]]) -> None:
        """Producer: hands over results whose content is held already."""
        self._held += OVERHEAD * len(results)
        self._results.put(results)

    def end(self, error: BaseException | None = None) -> None:
        """Producer: nothing more comes; an error is raised in the consumer after the results before it."""
        self._results.put(error)

    def results(self) -> Iterator[tuple[K, Download]]:
        """Consumer: every result, waiting for the next where there is none."""
        while isinstance(batch := self._results.get(), deque):
            while batch:
                key, download = batch.popleft()
                self._taken += OVERHEAD + len(download.content)
                if self._full and self._held - self._taken < self._ahead:
                    self._full = False
                    self.ring()
                yield key, download
                del download  # or it would stay in memory while the next one is waited for
        if batch is not None:
            raise batch

    def stop(self) -> None:
        """Consumer: wants no more."""
        self.stopped = True
        self.ring()

    def silence(self) -> None:
        """Producer: takes note of the alarm."""
        with suppress(BlockingIOError):
            self.alarm.recv(4096)

    def close(self) -> None:
        """Consumer, when the producer is gone."""
        self.alarm.close()
        self._bell.close()

    def ring(self) -> None:
        """From any thread: wakes the producer."""
        with suppress(OSError):  # so many rings wait that none can be missed, or the handover is closed
            self._bell.send(b"\0")
