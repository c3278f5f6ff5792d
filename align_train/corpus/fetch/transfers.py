"""One libcurl handle, which asks for one URL after the other."""

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import certifi
import pycurl  # type: ignore[import-untyped]  # has no types

from align_train.corpus.fetch.addresses import is_permitted
from align_train.corpus.fetch.responses import FAILURES, is_worth_a_retry, opt_out, status_of
from align_train.corpus.fetch.terms import Download, Limits, Permissions, failed
from align_train.corpus.fetch.urls import Request

K = TypeVar("K")
_STOP = 0  # from a write function: fewer bytes taken than given, which ends the transfer
_SKIPPED = 65_536  # bytes of an error's page that are read and thrown away, so that the connection can be used again
_BUFFER = 131_072  # bytes; libcurl's own 16,384 would call back eight times as often


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a request.

    Attributes:
        download: the result, if nothing follows.
        retry_after: None, or seconds that the server wants to be left alone before another attempt; 0 if it says
            nothing.
        location: where the server redirects to, or an empty string.
    """

    download: Download
    retry_after: float | None = None
    location: str = ""


class Transfer(Generic[K]):
    """A handle with its callbacks, and the request that it is busy with.

    Each address is judged when a connection to it is about to be opened, after the name was looked up. A connection
    that is used again was judged when it was opened. Redirects are left to the caller, who makes requests of them.
    Proxies of the environment are not used: the address judged would be the proxy's. Certificates are verified with
    certifi's list.

    Args:
        limits: of time and size, for each request.
        permissions: which addresses, which opt-outs.
        hold: told how many bytes more are in memory.
    """

    request: Request[K]

    def __init__(self, limits: Limits, permissions: Permissions, hold: Callable[[int], None]) -> None:
        self._limits, self._permissions, self._agents, self._hold = limits, permissions, permissions.agents, hold
        self._headers: list[bytes] = []
        self._body: list[bytes] = []
        self._size = self._skipped = 0
        self._refusal = ("", "")  # reason and detail of what this side refused
        self._socket: socket.socket | None = None
        self.handle = pycurl.Curl()
        for option, value in self._options().items():
            self.handle.setopt(option, value)

    def _options(self) -> dict[int, object]:
        return {
            pycurl.PROTOCOLS: pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS,
            pycurl.PROXY: "",
            pycurl.NOPROXY: "*",
            pycurl.CAINFO: certifi.where(),
            pycurl.SSL_VERIFYPEER: 1,
            pycurl.SSL_VERIFYHOST: 2,
            pycurl.USERAGENT: self._permissions.user_agent,
            pycurl.CONNECTTIMEOUT_MS: max(1, round(self._limits.connect_seconds * 1000)),
            pycurl.TIMEOUT_MS: max(1, round(self._limits.total_seconds * 1000)),
            pycurl.MAXFILESIZE_LARGE: self._limits.max_bytes,  # as announced; what comes is counted in _write
            pycurl.BUFFERSIZE: _BUFFER,
            pycurl.NOSIGNAL: 1,
            pycurl.OPENSOCKETFUNCTION: self._open,
            pycurl.HEADERFUNCTION: self._headers.append,
            pycurl.WRITEFUNCTION: self._write,
        }

    def begin(self, request: Request[K], addresses: Sequence[str]) -> None:
        """Makes the handle ready for a request to a host with these addresses."""
        self.request = request
        self._headers.clear()
        self._body, self._size, self._skipped, self._refusal = [], 0, 0, ("", "")
        self.handle.setopt(pycurl.URL, request.target)
        self.handle.setopt(pycurl.RESOLVE, _resolved(request, addresses))

    def finished(self, code: int, message: str) -> Answer:
        """What came of the request, given libcurl's error (0 for none) and its words for it.

        The content of a file that was fetched stays held; the bytes of one that was not are released.
        """
        self._close_twin()
        content, status = b"".join(self._body), self.handle.getinfo(pycurl.RESPONSE_CODE)
        self._body = []
        attempts = self.request.attempts
        if code == pycurl.E_OK and content and 200 <= status < 300:
            return Answer(Download(content, attempts=attempts))
        self._hold(-self._size)
        location = self.handle.getinfo_raw(pycurl.REDIRECT_URL)
        reason, detail, again = self._failure(code, message, status)
        retry_after = float(self.handle.getinfo(pycurl.RETRY_AFTER)) if again else None
        return Answer(failed(reason, detail, attempts), retry_after, (location or b"").decode(errors="replace"))

    def close(self) -> None:
        """Closes the handle, after it was removed from its multi handle."""
        self._close_twin()
        self.handle.close()

    def _failure(self, code: int, message: str, status: int) -> tuple[str, str, bool]:
        """Reason, detail, and whether another attempt may help."""
        if status >= 300:  # whatever came of its page
            return f"http_{status}", f"the server answered {status}", is_worth_a_retry(status)
        if code == pycurl.E_OK:
            return "empty", f"status {status} without content", False
        if self._refusal[0] and code in (pycurl.E_COULDNT_CONNECT, pycurl.E_WRITE_ERROR):
            return *self._refusal, False
        reason, again = FAILURES.get(code, (f"curl_{code}", False))
        if reason == "timeout" and not self.handle.getinfo(pycurl.REQUEST_SIZE):
            reason = "connect_timeout"
        return reason, message, again

    def _open(self, purpose: int, address: tuple[int, int, int, tuple[str, int]]) -> socket.socket | int:
        """Called by libcurl for a socket to connect to the address with."""
        family, kind, protocol, (host, *_) = address
        self._close_twin()
        if not is_permitted(host, self._permissions.networks):
            self._refusal = ("refused_address", f"{host} is neither public nor in a permitted network")
            return int(pycurl.SOCKET_BAD)
        self._refusal = ("", "")  # of another address of the same host
        try:
            self._socket = socket.socket(family, kind, protocol)
        except OSError as error:  # a machine without IPv6, or with too many files open
            self._refusal = ("connection", str(error))
            return int(pycurl.SOCKET_BAD)
        return self._socket

    def _close_twin(self) -> None:
        """pycurl duplicates the socket that it is given, and leaves the original to us."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _write(self, data: bytes) -> int | None:
        """Called by libcurl with a piece of the body."""
        if not self._body:
            if status_of(self._headers) >= 300:
                self._skipped += len(data)
                return None if self._skipped < _SKIPPED else _STOP
            if not self._permissions.ignore_opt_out and (line := opt_out(self._headers, self._agents)):
                self._refusal = ("opt_out", line)
                return _STOP
        self._size += len(data)
        self._hold(len(data))
        if self._size > self._limits.max_bytes:
            self._refusal = ("too_large", f"more than {self._limits.max_bytes} bytes")
            return _STOP
        self._body.append(data)
        return None


def _resolved(request: Request[Any], addresses: Sequence[str]) -> list[str]:
    """For CURLOPT_RESOLVE: the addresses of the host, which libcurl is to forget after a minute (the plus sign)."""
    if list(addresses) == [request.host]:
        return []  # nothing to look up
    numeric = (f"[{address}]" if ":" in address else address for address in addresses)
    return [f"+{request.host}:{request.port}:{','.join(numeric)}"]
