"""Threads for work that may never come back, such as reading from a disk that has gone."""

import atexit
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, ParamSpec, TypeVar
from weakref import WeakSet

P = ParamSpec("P")
T = TypeVar("T")
Job = tuple[Future[Any], Callable[[], Any]]

LAST_SECONDS = 10.0  # that a process waits at its end for work that is being done


class Crew:
    """As ThreadPoolExecutor, whose threads a process waits for at its end; these it leaves behind where they hang.

    Args:
        threads: that work at a time; they are started when there is work.
    """

    def __init__(self, threads: int) -> None:
        self._wanted = threads
        self._started: list[threading.Thread] = []
        self._work: SimpleQueue[Job | None] = SimpleQueue()
        _CREWS.add(self)

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> "Future[T]":
        """Call the function in a thread, soon."""
        future: Future[T] = Future()
        self._work.put((future, partial(function, *args, **kwargs)))
        if len(self._started) < self._wanted:
            thread = threading.Thread(target=_serve, args=(self._work,), daemon=True)
            self._started.append(thread)
            _THREADS.add(thread)
            thread.start()
        return future

    def close(self) -> None:
        """Let the threads end when their work is done."""
        for _ in self._started:
            self._work.put(None)
        self._started = []

    def dismiss(self) -> None:
        """Forget the work that is not begun, and let the threads end."""
        with suppress(Empty):
            while self._started and (job := self._work.get_nowait()) is not None:
                job[0].cancel()
        self.close()

    def __del__(self) -> None:
        self.dismiss()


_CREWS: WeakSet[Crew] = WeakSet()
_THREADS: WeakSet[threading.Thread] = WeakSet()


@atexit.register
def _end() -> None:
    """Threads in the middle of C++ abort a process that ends without them."""
    for crew in list(_CREWS):
        crew.dismiss()
    end = time.monotonic() + LAST_SECONDS
    for thread in list(_THREADS):
        thread.join(max(0.0, end - time.monotonic()))


def _serve(work: "SimpleQueue[Job | None]") -> None:
    while (job := work.get()) is not None:
        future, call = job
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 # whoever waits for the result gets it
            future.set_exception(error)
        del future, call, job  # not to be kept until the next one comes
