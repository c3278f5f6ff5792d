"""Host names to addresses, looked up in threads.

libcurl has a resolver of its own, but it looks up ten names at a time: a few dead name servers, of which old links
have many, hold up all the others. It also waits for them when it is closed.
"""

import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from threading import Thread
from typing import Generic, TypeVar

T = TypeVar("T")
Addresses = tuple[str, ...] | OSError | UnicodeError  # those of a host, or why there are none
_KEPT_SECONDS = 60.0  # libcurl's own default
_KEPT_NAMES = 10_000


class Names(Generic[T]):
    """Answers, and what waits for them. All but the look-ups themselves happens in the thread that calls.

    Args:
        threads: look-ups at a time; each thread starts when it is needed.
        seconds: after which a look-up counts as failed, with a TimeoutError.
        ring: called from another thread when `answered` has something.
    """

    def __init__(self, threads: int, seconds: float, ring: Callable[[], None]) -> None:
        self._most, self._seconds, self._ring = threads, seconds, ring
        self._questions: SimpleQueue[str] = SimpleQueue()
        self._answers: deque[tuple[str, Addresses]] = deque()
        self._known: dict[str, tuple[float, Addresses]] = {}  # until when
        self._waiting: dict[str, tuple[float, list[T]]] = {}  # until when; in the order of that
        self._threads: list[Thread] = []
        self._open = 0  # questions that a thread has, or will have
        self._closed = False

    def find(self, name: str, item: T) -> Addresses | None:
        """The answer if it is known; else None, and the item waits for it."""
        now = time.monotonic()
        until, answer = self._known.get(name, (now, ()))
        if until > now:
            return answer
        if name not in self._waiting:
            self._waiting[name] = now + self._seconds, []
            self._ask(name)
        self._waiting[name][1].append(item)
        return None

    def answered(self) -> Iterator[tuple[T, Addresses]]:
        """Every item whose answer has come, or whose time is over."""
        while self._answers:
            name, answer = self._answers.popleft()
            self._open -= 1
            self._keep(name, answer)
            for item in self._waiting.pop(name, (0.0, []))[1]:
                yield item, answer
        while (due := self.due()) is not None and due <= time.monotonic():
            name = next(iter(self._waiting))
            for item in self._waiting.pop(name)[1]:
                yield item, TimeoutError(f"no answer about {name} in {self._seconds} seconds")

    def due(self) -> float | None:
        """When, by time.monotonic, the time of the longest wait is over."""
        return next(iter(self._waiting.values()))[0] if self._waiting else None

    def close(self) -> None:
        """Ends the threads, but for those in the middle of a look-up, which end by themselves."""
        self._closed = True
        for _ in self._threads:
            self._questions.put("")
        until = time.monotonic() + 0.1
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _keep(self, name: str, answer: Addresses) -> None:
        if not is_passing(answer):
            self._known.pop(name, None)  # so that the oldest comes first
            self._known[name] = time.monotonic() + _KEPT_SECONDS, answer
        if len(self._known) > _KEPT_NAMES:
            del self._known[next(iter(self._known))]

    def _ask(self, name: str) -> None:
        self._open += 1
        self._questions.put(name)
        if len(self._threads) < min(self._open, self._most):
            self._threads.append(Thread(target=self._look_up, name="align_train look-ups", daemon=True))
            self._threads[-1].start()

    def _look_up(self) -> None:
        while (name := self._questions.get()) and not self._closed:
            try:
                found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
                answer: Addresses = tuple(dict.fromkeys(str(address[0]) for *_, address in found))
            except (OSError, UnicodeError) as error:  # the latter: a label of more than 63 letters
                answer = error
            self._answers.append((name, answer))
            self._ring()


def is_passing(answer: Addresses) -> bool:
    """Whether another look-up may find something: the name server failed, rather than said that there is nothing."""
    return isinstance(answer, OSError) and answer.errno in (socket.EAI_AGAIN, socket.EAI_SYSTEM, socket.EAI_MEMORY)
