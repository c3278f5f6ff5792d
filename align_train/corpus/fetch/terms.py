"""What downloads may cost, what they may contact, and what comes of each."""

from dataclasses import dataclass

from align_train import __version__
from align_train.corpus.fetch.addresses import network

TOKEN = "align_train"  # the name by which a server can address its X-Robots-Tag to this package


@dataclass(frozen=True)
class Limits:
    """Bounds of time and size. All numbers are positive, but for the counts of redirects and retries and the back-off.

    Attributes:
        connect_seconds: for looking up the name, and then for connecting with the TLS handshake.
        total_seconds: of one attempt, from connecting to the last byte; a redirect begins it anew.
        max_bytes: of one file.
        redirects: followed for one file.
        retries: further attempts after 429, 5xx, failed connections, failed name servers and truncated bodies, and one
            after a time-out. None after 404 and other 4xx, and none where the name has no address.
        backoff_seconds: before the first retry, doubled for each further one, times 0.5 to 1.5 as the URL decides.
            A longer Retry-After is waited for, but never longer than `total_seconds`.
        connections: open at a time, idle ones included; and names looked up at a time.
        per_host: open to one host at a time.
        ahead_bytes: downloaded, or being downloaded, and not yet taken by the consumer; above it no download starts.
            Those under way still end, so at worst `connections` files of `max_bytes` come on top.
        window: URLs drawn beyond the oldest that is not finished: bounds what waits, where results are wanted in order.
    """

    connect_seconds: float = 5.0
    total_seconds: float = 10.0
    max_bytes: int = 20_000_000
    redirects: int = 5
    retries: int = 2
    backoff_seconds: float = 0.5
    connections: int = 128
    per_host: int = 16
    ahead_bytes: int = 256_000_000
    window: int = 10_000

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 0 or (value == 0 and name not in ("redirects", "retries", "backoff_seconds")):
                raise ValueError(f"{name} of the downloads is {value}: it must be greater")


@dataclass(frozen=True)
class Permissions:
    """What may be contacted: http and https at public addresses, and whatever is added here.

    Attributes:
        networks: private networks that are allowed too, such as ("127.0.0.0/8",): for a mirror of one's own.
        files: allow file: URLs; never as the target of a redirect.
        ignore_opt_out: take images whose owners' response headers say that they are not for machine learning.
        user_agent: sent with each request. Its first word, up to a slash, and `align_train` are the names under which
            an X-Robots-Tag may address these downloads.
    """

    networks: tuple[str, ...] = ()
    files: bool = False
    ignore_opt_out: bool = False
    user_agent: str = f"{TOKEN}/{__version__} (opt-out token: {TOKEN})"

    def __post_init__(self) -> None:
        for name in self.networks:
            network(name)
        if not (self.user_agent.isascii() and self.user_agent.isprintable() and self.user_agent.strip()):
            raise ValueError(f"user_agent {self.user_agent!r} must be one line of ASCII that names the program")

    @property
    def agents(self) -> frozenset[str]:
        """The names, in lower case, under which an X-Robots-Tag means these downloads; `*` means everyone."""
        return frozenset(("*", TOKEN, self.user_agent.split()[0].partition("/")[0].lower()))


@dataclass(frozen=True, slots=True)
class Download:
    """What came of one URL.

    Attributes:
        content: the file; empty if it was not fetched.
        reason: empty if it was fetched, else one of

            - `http_404`, `http_503` ...: the status of the last answer
            - `timeout`, `connect_timeout`, `connection`, `dns`, `tls`: the network or the server
            - `refused_address`: not public, and not in a permitted network
            - `opt_out`: the owner's headers reserve it
            - `too_large`, `too_many_redirects`, `truncated`, `empty`, `bad_response`: the answer
            - `bad_url`, `scheme`, `missing_file`: the URL; `scheme` also where a redirect leaves http and https
            - `curl_` and a number: another of libcurl's errors
        detail: one line about the reason, for people.
        attempts: how often it was tried; 0 if the URL was refused before.
    """

    content: bytes = b""
    reason: str = ""
    detail: str = ""
    attempts: int = 1


def failed(reason: str, detail: str, attempts: int) -> Download:
    """A download without content; of the detail, which a server may have worded, 200 characters in one line stay."""
    line = " ".join(detail.encode(errors="replace").decode().split())
    return Download(b"", reason, line[:200], attempts)
