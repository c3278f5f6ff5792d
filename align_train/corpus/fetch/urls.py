"""URLs as the metadata has them to what can be sent; and those of this machine to their content."""

import os
import re
import stat
from dataclasses import dataclass, field
from typing import Generic, TypeVar
from urllib.parse import quote, urlsplit
from urllib.request import url2pathname

from align_train.corpus.fetch.terms import Download, failed
from align_train.corpus.sample_corpus import shipped_image

K = TypeVar("K")
_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"[a-z0-9._:-]+")  # names and addresses, in lower case
_PRINTABLE = "".join(map(chr, range(0x21, 0x7F)))


class Unfetchable(ValueError):
    """A URL that no server can be asked for; `reason` is one of Download's."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(slots=True, eq=False)
class Request(Generic[K]):
    """A URL to fetch, and how far that has come.

    Attributes:
        key: the consumer's.
        url: as given.
        attempts: begun.
        redirects: followed in this attempt.
        target: what to ask for now, in ASCII: the URL, or where it redirects to.
        host: of the target, in lower case.
        port: of the target.
    """

    key: K
    url: str
    attempts: int = 1
    redirects: int = 0
    target: str = field(init=False)
    host: str = field(init=False)
    port: int = field(init=False)

    def __post_init__(self) -> None:
        self._aim(self.url)

    def redirect(self, location: str) -> None:
        """Goes on to another URL; Unfetchable as the first may be."""
        self.redirects += 1
        self._aim(location)

    def again(self) -> None:
        """Begins another attempt, from the first URL."""
        self.attempts, self.redirects = self.attempts + 1, 0
        self._aim(self.url)

    def _aim(self, url: str) -> None:
        """Percent-encodes spaces and letters beyond ASCII, as browsers do, and makes such a host IDNA."""
        if (kind := scheme(url)) not in _PORTS:
            raise Unfetchable("scheme", f"{kind}: is not permitted") if kind else Unfetchable("bad_url", "no scheme")
        try:
            parts = urlsplit(url.strip())
            self.host, port = parts.hostname or "", parts.port
            if not self.host.isascii():
                self.host = self.host.encode("idna").decode()
                parts = parts._replace(netloc=self.host if port is None else f"{self.host}:{port}")
            self.target = quote(parts.geturl(), safe=_PRINTABLE)
        except ValueError as error:
            raise Unfetchable("bad_url", str(error)) from error
        if not _HOST.fullmatch(self.host):
            raise Unfetchable("bad_url", f"{self.host!r} is no host")
        self.port = _PORTS[kind] if port is None else port


def scheme(url: str) -> str:
    """The part before the first colon in lower case, or an empty string."""
    return url.strip().partition(":")[0].lower() if ":" in url else ""


def read_local(url: str, max_bytes: int) -> Download:
    """The content of a package: URL, an image of the shipped sample, or of a file: URL."""
    if scheme(url) == "file":
        return _read_file(url, max_bytes)
    content = shipped_image(url.strip().partition(":")[2])
    return Download(content) if content else failed("missing_file", f"the package ships no {url}", 1)


def _read_file(url: str, max_bytes: int) -> Download:
    """The content of a file: URL of this machine; or `missing_file`, `too_large`, `empty`, `bad_url`."""
    try:
        parts = urlsplit(url.strip())
        path = url2pathname(parts.path)
        if parts.netloc not in ("", "localhost"):
            return failed("bad_url", f"a file on another machine, {parts.netloc}", 0)
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would never end
            return failed("missing_file", f"{path} is not a file", 1)
        with open(path, "rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        return failed("missing_file", str(error), 1)
    except ValueError as error:
        return failed("bad_url", str(error), 0)
    if len(content) > max_bytes:
        return failed("too_large", f"{path} has more than {max_bytes} bytes", 1)
    return Download(content) if content else failed("empty", f"{path} is empty", 1)
