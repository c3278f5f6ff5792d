"""The loop that drives all transfers: sockets, timers, names, redirects, retries and the hand-over, in one thread."""

import time
from collections import deque
from collections.abc import Iterator
from heapq import heappop, heappush
from itertools import count
from selectors import EVENT_READ, EVENT_WRITE, DefaultSelector
from typing import Generic, TypeVar

import pycurl  # type: ignore[import-untyped]  # has no types

from align_train.corpus.fetch.handover import Handover
from align_train.corpus.fetch.hosts import HostQueue
from align_train.corpus.fetch.names import Addresses, Names, is_passing
from align_train.corpus.fetch.responses import backoff
from align_train.corpus.fetch.terms import Download, Limits, Permissions, failed
from align_train.corpus.fetch.transfers import Answer, Transfer
from align_train.corpus.fetch.urls import Request, Unfetchable, read_local, scheme

K = TypeVar("K")
_Numbered = tuple[int, K]  # which of the drawn URLs it is, and the consumer's key
LOOK_AHEAD = 8  # URLs drawn and not finished, in multiples of the connections: while hosts are busy, others are found
_STEPS = 256  # URLs drawn or started before the sockets have their turn again


class Loop(Generic[K]):
    """Downloads until the URLs end or the consumer stops it; `run` once, then `close`.

    libcurl says which sockets it waits for and when it wants to be called (its "multi socket" interface); a selector
    does the waiting, so that a turn costs the same however many transfers are open.
    """

    def __init__(self, limits: Limits, permissions: Permissions, handover: Handover[K]) -> None:
        self._limits, self._permissions, self._handover = limits, permissions, handover
        self._urls: Iterator[tuple[K, str]] | None = None
        self._queue: HostQueue[_Numbered[K]] = HostQueue(limits.per_host)
        self._names: Names[Request[_Numbered[K]]] = Names(limits.connections, limits.connect_seconds, handover.ring)
        self._retries: list[
            tuple[float, int, Request[_Numbered[K]]]
        ] = []  # a heap: when, and a number that settles ties
        self._number = count()
        self._drawn = 0  # URLs drawn so far
        self._unfinished: dict[int, None] = {}  # numbers of those that are not delivered, the oldest first
        self._begun = 0  # taken from the queue and not ended
        self._results: deque[tuple[K, Download]] = deque()
        self._free: list[Transfer[_Numbered[K]]] = []
        self._active: dict[object, Transfer[_Numbered[K]]] = {}
        self._wake_at: float | None = None  # when libcurl wants to be called, by time.monotonic
        self._selector = DefaultSelector()
        self._selector.register(handover.alarm, EVENT_READ)
        self._multi = pycurl.CurlMulti()
        self._multi.setopt(pycurl.M_SOCKETFUNCTION, self._watch)
        self._multi.setopt(pycurl.M_TIMERFUNCTION, self._set_timer)
        self._multi.setopt(pycurl.M_MAXCONNECTS, limits.connections)
        self._multi.setopt(pycurl.M_MAX_TOTAL_CONNECTIONS, limits.connections)  # idle ones make way for new ones

    def run(self, urls: Iterator[tuple[K, str]]) -> None:
        """Downloads them all."""
        self._urls = urls
        while not self._handover.stopped:
            has_more = self._start()
            if self._results:
                self._handover.put(self._results)
                self._results = deque()
            if self._urls is None and not self._unfinished:
                return
            self._wait(0.0 if has_more else self._patience())
            self._collect()

    def close(self) -> None:
        """Ends what is under way and closes every connection."""
        for transfer in self._active.values():
            self._multi.remove_handle(transfer.handle)
        for transfer in (*self._active.values(), *self._free):
            transfer.close()
        self._multi.close()
        self._selector.close()
        self._names.close()

    def _start(self) -> bool:
        """Begins requests while there is room; whether it stopped only to let the sockets have their turn."""
        while self._retries and self._retries[0][0] <= time.monotonic():
            self._queue.put(heappop(self._retries)[2])
        for _ in range(_STEPS):
            if self._begun >= self._limits.connections or not self._handover.has_room():
                return False
            if request := self._queue.take():
                self._begin(request)
            elif self._urls is not None and self._may_draw():
                self._draw(self._urls)
            else:
                return False
        return True

    def _draw(self, urls: Iterator[tuple[K, str]]) -> None:
        """Takes a URL into the queue, or delivers it at once where no network is needed."""
        try:
            key, url = next(urls)
        except StopIteration:
            self._urls = None
            return
        number, self._drawn = self._drawn, self._drawn + 1
        self._unfinished[number] = None
        if scheme(url) == "package" or (self._permissions.files and scheme(url) == "file"):
            download = read_local(url, self._limits.max_bytes)
            self._handover.hold(len(download.content))
            self._deliver((number, key), download)
            return
        try:
            self._queue.put(Request((number, key), url))
        except Unfetchable as error:
            self._deliver((number, key), failed(error.reason, str(error), 0))

    def _may_draw(self) -> bool:
        oldest = next(iter(self._unfinished), self._drawn)
        return (
            len(self._unfinished) < LOOK_AHEAD * self._limits.connections and self._drawn - oldest < self._limits.window
        )

    def _begin(self, request: Request[_Numbered[K]]) -> None:
        self._begun += 1
        if (answer := self._names.find(request.host, request)) is not None:
            self._connect(request, answer)

    def _connect(self, request: Request[_Numbered[K]], found: Addresses) -> None:
        """Begins the transfer, or ends the request where its name has no address."""
        if isinstance(found, tuple):
            transfer = self._free.pop() if self._free else self._new()
            transfer.begin(request, found)
            self._active[transfer.handle] = transfer
            self._multi.add_handle(transfer.handle)
            return
        is_late = isinstance(found, TimeoutError)
        download = failed("connect_timeout" if is_late else "dns", str(found), request.attempts)
        self._end(request, Answer(download, 0.0 if is_late or is_passing(found) else None))

    def _new(self) -> Transfer[_Numbered[K]]:
        return Transfer(self._limits, self._permissions, self._handover.hold)

    def _patience(self) -> float | None:
        """Seconds until something is due, None if nothing is: libcurl's timer, a retry, the end of a look-up."""
        times = (self._wake_at, self._retries[0][0] if self._retries else None, self._names.due())
        due = min((at for at in times if at is not None), default=None)
        return None if due is None else max(0.0, due - time.monotonic())

    def _wait(self, seconds: float | None) -> None:
        for key, mask in self._selector.select(seconds):
            if key.fileobj is self._handover.alarm:
                self._handover.silence()
            else:
                reads, writes = mask & EVENT_READ, mask & EVENT_WRITE
                ready = (pycurl.CSELECT_IN if reads else 0) | (pycurl.CSELECT_OUT if writes else 0)
                self._multi.socket_action(key.fd, ready)
        if self._wake_at is not None and self._wake_at <= time.monotonic():
            self._wake_at = None
            self._multi.socket_action(pycurl.SOCKET_TIMEOUT, 0)

    def _collect(self) -> None:
        """Ends the transfers that libcurl has finished, and begins those whose names have been found."""
        waiting = 1
        while waiting:
            waiting, succeeded, failed = self._multi.info_read()
            for handle, code, message in (*((handle, pycurl.E_OK, "") for handle in succeeded), *failed):
                transfer = self._active.pop(handle)
                self._multi.remove_handle(handle)
                self._end(transfer.request, transfer.finished(code, message))
                self._free.append(transfer)
        for request, found in self._names.answered():
            self._connect(request, found)

    def _end(self, request: Request[_Numbered[K]], answer: Answer) -> None:
        """Delivers, or follows the redirect, or waits for another attempt."""
        self._begun -= 1
        self._queue.release(request.host)
        if answer.location:
            self._follow(request, answer.location)
        elif answer.retry_after is None or request.attempts > self._retries_after(answer.download.reason):
            self._deliver(request.key, answer.download)
        else:
            wait = backoff(request.url, request.attempts, self._limits.backoff_seconds)
            wait = max(wait, min(answer.retry_after, self._limits.total_seconds))
            request.again()
            heappush(self._retries, (time.monotonic() + wait, next(self._number), request))

    def _retries_after(self, reason: str) -> int:
        """A host that let one time-out pass rarely answers at the third attempt, and the others wait for it."""
        return min(1, self._limits.retries) if reason in ("timeout", "connect_timeout") else self._limits.retries

    def _follow(self, request: Request[_Numbered[K]], location: str) -> None:
        if request.redirects >= self._limits.redirects:
            detail = f"more than {self._limits.redirects}"
            self._deliver(request.key, failed("too_many_redirects", detail, request.attempts))
            return
        try:
            request.redirect(location)
        except Unfetchable as error:
            self._deliver(request.key, failed(error.reason, f"redirect: {error}", request.attempts))
        else:
            self._queue.put(request)

    def _deliver(self, key: _Numbered[K], download: Download) -> None:
        del self._unfinished[key[0]]
        self._results.append((key[1], download))

    def _watch(self, what: int, fd: int, multi: object, data: object) -> None:
        """Called by libcurl: watch this socket for this."""
        mask = (EVENT_READ if what & pycurl.POLL_IN else 0) | (EVENT_WRITE if what & pycurl.POLL_OUT else 0)
        known = fd in self._selector.get_map()
        if what == pycurl.POLL_REMOVE or not mask:
            if known:
                self._selector.unregister(fd)
        elif known:
            self._selector.modify(fd, mask)
        else:
            self._selector.register(fd, mask)

    def _set_timer(self, milliseconds: int) -> None:
        """Called by libcurl: call again after so long; -1 for never."""
        self._wake_at = None if milliseconds < 0 else time.monotonic() + milliseconds / 1000
