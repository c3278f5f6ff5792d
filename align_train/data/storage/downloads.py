"""One file from a store to a local disk, whatever protocol it speaks; a store that falls silent is left."""

import asyncio
import errno
import time
from concurrent.futures import Future, wait
from pathlib import Path

from fsspec.callbacks import Callback  # type: ignore[import-untyped]
from fsspec.core import url_to_fs  # type: ignore[import-untyped]

from align_train.data.crew import Crew

NO_USE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE})  # of trying again
_PASSING = frozenset({408, 425, 429})  # statuses below 500 of a server that may answer later


class TooLarge(ValueError):
    """A file that the cache can never hold."""


def download(address: str, part: Path, stall_seconds: float, most: int) -> BaseException | None:
    """Download once; the error, if any. Never waits longer than `stall_seconds` for a byte."""
    progress = _Progress(most)
    future = _started(address, part, progress)
    try:
        while not future.done():
            left = progress.latest + stall_seconds - time.monotonic()
            if left <= 0:
                return TimeoutError("no byte came")
            wait([future], timeout=left)
    finally:
        progress.given_up = True
        future.cancel()
    error = future.exception()
    if error is None and progress.size is not None and (size := part.stat().st_size) != progress.size:
        return OSError(f"{size:,} of {progress.size:,} bytes came")
    return error


def may_pass(error: BaseException) -> bool:
    """Whether another attempt may do better."""
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | ValueError | ImportError):
        return False
    status = status_of(error)
    return getattr(error, "errno", None) not in NO_USE and not (400 <= status < 500 and status not in _PASSING)


def status_of(error: BaseException) -> int:
    """The HTTP status that an error of aiohttp (status) or gcsfs (code) carries, else 0."""
    status = str(getattr(error, "status", None) or getattr(error, "code", None))
    return int(status) if status.isdecimal() else 0


class _Progress(Callback):
    """Hears of every piece of a download; ends it where it grows too large, or was given up."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.latest, self.given_up = most, time.monotonic(), False

    def relative_update(self, inc: int = 1) -> None:
        """`inc` bytes have come."""
        self.value += inc
        if inc:
            self.latest = time.monotonic()
        if self.given_up:
            raise TimeoutError("given up")
        largest = max(self.value, self.size or 0)
        if largest > self.most:
            raise TooLarge(
                f"it has {largest / 1e9:.9g} GB and the cache may hold {self.most / 1e9:.9g} GB: raise its limit_gb"
            )


def _started(address: str, part: Path, progress: _Progress) -> Future[None]:
    """A download under way: in the event loop of fsspec, where `cancel` ends it, or in a thread of its own."""
    store, path = url_to_fs(address)  # of this process: fsspec keeps none over a fork
    if store.async_impl:
        download = store._get_file(path, str(part), callback=progress, **_options(address, store.kwargs))
        return asyncio.run_coroutine_threadsafe(download, store.loop)

    def run() -> None:
        try:
            store.get_file(path, str(part), callback=progress)
        finally:
            if progress.given_up:
                part.unlink(missing_ok=True)

    return Crew(1).submit(run)


def _options(address: str, kwargs: dict[str, dict[str, str]]) -> dict[str, object]:
    """What makes a protocol's download one stream that tells of every piece, however long it takes in all."""
    if address.startswith(("http://", "https://")):
        from aiohttp import ClientTimeout

        # aiohttp ends any answer after 300 s; and packed on the way, a file would not have the size announced
        headers = {**kwargs.get("headers", {}), "Accept-Encoding": "identity"}
        return {"timeout": ClientTimeout(total=None), "headers": headers}
    if address.startswith(("s3://", "s3a://")):
        return {"max_concurrency": 1}  # or s3fs tells of pieces of 50 MB only
    return {"concurrency": 1} if address.startswith(("gs://", "gcs://")) else {}
