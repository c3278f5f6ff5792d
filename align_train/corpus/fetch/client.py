"""Downloads of many files over reused connections, while the caller works on those that have come."""

from collections.abc import Generator, Iterable
from contextlib import closing
from threading import Thread
from typing import TypeVar

from align_train.corpus.fetch.handover import Handover
from align_train.corpus.fetch.loop import Loop
from align_train.corpus.fetch.terms import Download, Limits, Permissions

__all__ = ["Client", "Download", "Limits", "Permissions"]
K = TypeVar("K")


class Client:
    """Fetches files over http and https; it holds nothing but its settings, and may be pickled and shared.

    Args:
        limits: of time, size and numbers.
        permissions: what may be contacted.
    """

    def __init__(self, limits: Limits | None = None, permissions: Permissions | None = None) -> None:
        self.limits, self.permissions = limits or Limits(), permissions or Permissions()

    def downloads(self, urls: Iterable[tuple[K, str]]) -> Generator[tuple[K, Download], None, None]:
        """Every (key, url) once, as each finishes, with what came of it; nothing that a server does is an error.

        A thread of its own downloads, and goes on until `ahead_bytes` are waiting, whether or not the caller is
        asking. It also draws from `urls`, which may be endless, a bounded number ahead; while `urls` makes it wait,
        no transfer moves. Close the iterator, or drop it, to end the thread and its connections.

        Raises:
            Exception: whatever `urls` raised, after the downloads that had finished.
        """
        handover: Handover[K] = Handover(self.limits.ahead_bytes)
        thread = Thread(target=self._run, args=(urls, handover), name="align_train downloads", daemon=True)
        thread.start()
        try:
            yield from handover.results()
        finally:
            handover.stop()
            thread.join()
            handover.close()

    def _run(self, urls: Iterable[tuple[K, str]], handover: Handover[K]) -> None:
        try:
            with closing(Loop(self.limits, self.permissions, handover)) as loop:
                loop.run(iter(urls))
        except BaseException as error:  # noqa: BLE001 - the consumer raises it
            handover.end(error)
        else:
            handover.end()
