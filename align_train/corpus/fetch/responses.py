"""What a server's answer means: whether its owner opted out, and whether another attempt may help."""

import re
import zlib
from collections.abc import Collection, Iterable

import pycurl  # type: ignore[import-untyped]  # has no types

# The first four are img2dataset's default. `none` is Google's word for noindex and nofollow, `noml` the proposal of
# noml.info for content that may be searched but not learned from.
OPT_OUTS = frozenset(("noai", "noimageai", "noindex", "noimageindex", "none", "noml"))
# Directives with a value, which look like a directive for an agent: `max-snippet: 20`.
_VALUED = frozenset(("max-snippet", "max-image-preview", "max-video-preview", "unavailable_after"))

_STATUS = re.compile(rb"HTTP/[\d.]+ (\d{3})").match

# libcurl's errors: the reason by which they are counted, and whether to try again.
FAILURES = {
    pycurl.E_COULDNT_CONNECT: ("connection", True),
    pycurl.E_SEND_ERROR: ("connection", True),
    pycurl.E_RECV_ERROR: ("connection", True),
    pycurl.E_GOT_NOTHING: ("connection", True),
    pycurl.E_HTTP2: ("connection", True),
    92: ("connection", True),  # CURLE_HTTP2_STREAM, for which pycurl has no name
    pycurl.E_OPERATION_TIMEDOUT: ("timeout", True),
    pycurl.E_PARTIAL_FILE: ("truncated", True),
    pycurl.E_SSL_CONNECT_ERROR: ("tls", True),
    pycurl.E_PEER_FAILED_VERIFICATION: ("tls", False),
    pycurl.E_FILESIZE_EXCEEDED: ("too_large", False),
    pycurl.E_FTP_WEIRD_SERVER_REPLY: ("bad_response", False),
    pycurl.E_URL_MALFORMAT: ("bad_url", False),
    pycurl.E_UNSUPPORTED_PROTOCOL: ("bad_response", False),  # an answer without a status line
}


def status_of(headers: Iterable[bytes]) -> int:
    """The status of the last status line; there may be others before, such as 103 for early hints. 0 if none."""
    found = [match[1] for match in map(_STATUS, headers) if match]
    return int(found[-1]) if found else 0


def opt_out(headers: Iterable[bytes], agents: Collection[str]) -> str:
    """The first header line that keeps these agents from learning from the content, or an empty string.

    `X-Robots-Tag` (see OPT_OUTS) counts where it names no agent or one of `agents`; `tdm-reservation: 1` is the TDM
    Reservation Protocol of a W3C community group.
    """
    for line in headers:
        if line[:1] in b"xXtT":
            name, _, value = line.decode("latin-1").strip().lower().partition(":")
            if name == "x-robots-tag" and _disallows(value, agents):
                return f"{name}:{value}"
            if name == "tdm-reservation" and value.strip() == "1":
                return f"{name}:{value}"
    return ""


def _disallows(value: str, agents: Collection[str]) -> bool:
    """Directives are separated by commas; a name with a colon says for whom those after it are."""
    meant = True
    for part in value.split(","):
        name, colon, directive = part.partition(":")
        name = name.strip()
        if not colon:
            directive = name
        elif name in _VALUED or " " in name:  # no agent has a space in its name, but a date has
            continue
        else:
            meant = name in agents
        if meant and directive.strip() in OPT_OUTS:
            return True
    return False


def is_worth_a_retry(status: int) -> bool:
    """Whether an HTTP status may be another one soon: too many requests, or a fault of the server."""
    return status == 429 or 500 <= status < 600


def backoff(url: str, attempt: int, seconds: float) -> float:
    """Seconds to wait after attempt 1, 2 ...: doubled each time, spread by 0.5 to 1.5, always the same for a URL."""
    spread = zlib.crc32(f"{attempt} {url}".encode()) / 2**32
    return float(seconds * 2 ** (attempt - 1) * (0.5 + spread))
