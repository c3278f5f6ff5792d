"""Threads for work that may never come back, such as reading from a disk that has gone."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Crew:
    """As ThreadPoolExecutor, whose threads a process waits for at its end; these it leaves behind.

    Args:
        threads: that work at a time; they are started when there is work.
    """

    def __init__(self, threads: int) -> None:
        self._wanted = threads
        self._started: list[threading.Thread] = []
        self._work: SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None] = SimpleQueue()

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> "Future[T]":
        """Call the function in a thread, soon."""
        future: Future[T] = Future()
        self._work.put((future, function, args))
        if len(self._started) < self._wanted:
            thread = threading.Thread(target=_serve, args=(self._work,), daemon=True)
            self._started.append(thread)
            thread.start()
        return future

    def close(self) -> None:
        """Let the threads end when their work is done."""
        for _ in self._started:
            self._work.put(None)
        self._started = []

    def __del__(self) -> None:
        self.close()


def _serve(work: "SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None]") -> None:
    while (job := work.get()) is not None:
        future, function, args = job
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(function(*args))
        except BaseException as error:  # noqa: BLE001 # whoever waits for the result gets it
            future.set_exception(error)
        del future, function, args, job  # not to be kept until the next one comes
