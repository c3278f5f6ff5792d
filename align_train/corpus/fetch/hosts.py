"""A queue that keeps back what goes to a busy host, without holding up the others."""

from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from align_train.corpus.fetch.urls import Request

K = TypeVar("K")


@dataclass(slots=True)
class _Host(Generic[K]):
    places: int = 0
    waiting: deque[Request[K]] = field(default_factory=deque)


class HostQueue(Generic[K]):
    """Requests in the order they came, at most `per_host` of one host between `take` and `release`.

    libcurl could limit connections to a host, but counts the wait for one as part of the transfer's time.
    """

    def __init__(self, per_host: int) -> None:
        self._per_host = per_host
        self._hosts: dict[str, _Host[K]] = {}
        self._ready: deque[Request[K]] = deque()  # each has a place at its host

    def put(self, request: Request[K]) -> None:
        """Adds a request."""
        host = self._hosts.setdefault(request.host, _Host())
        if host.places < self._per_host:
            host.places += 1
            self._ready.append(request)
        else:
            host.waiting.append(request)

    def take(self) -> Request[K] | None:
        """The next request whose host is free, or None."""
        return self._ready.popleft() if self._ready else None

    def release(self, name: str) -> None:
        """A request that was taken has left the host."""
        host = self._hosts[name]
        if host.waiting:
            self._ready.append(host.waiting.popleft())
        else:
            host.places -= 1
            if not host.places:
                del self._hosts[name]
