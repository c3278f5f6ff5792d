"""Local copies of remote files: a bounded folder that threads, processes and nodes share."""

import errno
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import BinaryIO
from uuid import uuid4

from align_train.data.storage.addresses import check_protocol, is_remote, local_path, shown
from align_train.data.storage.downloads import NO_USE, TooLarge, download, may_pass, status_of

_LEDGER = ".align-train-cache"  # holds the bytes of all copies, so that no download has to scan the folder
_COPY = re.compile(r"[0-9a-f]{20}-.*")
_SCRATCH = re.compile(r"\.[0-9a-f]{20}-.*\.(part|lock)")
_SCRATCH_SECONDS = 86_400  # after which what a killed process left goes, if nobody asked for its file again
_NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP})


FOLDER = "~/.cache/align_train/shards"


class Absent(FileNotFoundError):
    """The store says that it has no such file."""


class Cache:
    """A folder with copies of remote files. The copies not used for longest go when there are too many.

    Only complete copies count: files that are being downloaded come on top of the limit. A copy may go as soon as
    others are asked for, so open it at once; who has it open can read on. Files that the cache did not write are
    never touched. A file and its sidecar (the same address but for the ending) get names that differ in the ending.

    Args:
        folder: where copies lie, made when it is needed. Its file system must have file locks (`flock`).
        limit_gb: size of all copies, in 1e9 bytes.
        stall_seconds: how long a download may go without a byte. Each attempt has its share of it.
        attempts: how often a download is begun, with growing pauses, before its error counts.
    """

    def __init__(
        self, folder: str | Path = FOLDER, limit_gb: float = 100.0, stall_seconds: float = 120.0, attempts: int = 3
    ) -> None:
        for name, value in (("limit_gb", limit_gb), ("stall_seconds", stall_seconds), ("attempts", attempts)):
            if not value > 0:
                raise ValueError(f"data.reading.cache.{name} is {value}: give a number over 0")
        self.folder, self.limit = Path(folder).expanduser(), int(limit_gb * 1e9)
        self.stall_seconds, self.attempts = stall_seconds, attempts
        self._absent: set[str] = set()

    def path(self, address: str) -> Path:
        """The local file of an address: itself where it is local, else its copy, downloaded if need be.

        Raises:
            FileNotFoundError, PermissionError: the store has no such file, or refuses it.
            TimeoutError: no byte came for `stall_seconds`.
            OSError: the last attempt failed otherwise, or the folder's disk cannot take the file.
            ValueError: the file is larger than the limit, or its protocol cannot be read.
        """
        if not is_remote(address):
            return Path(local_path(address))
        copy = self.folder / copy_name(address)
        if not _touched(copy):
            self.folder.mkdir(parents=True, exist_ok=True)
            with _alone(copy.with_name(f".{copy.name}.lock")) as lock:
                if not _touched(copy):  # another caller may have brought it meanwhile
                    self._bring(address, copy, lock)
        return copy

    def optional(self, address: str) -> Path | None:
        """As `path`; None where there is no such file, which a store is asked once per process."""
        if address in self._absent:
            return None
        try:
            path = self.path(address)
        except Absent:
            self._absent.add(address)
            return None
        return path if is_remote(address) or path.exists() else None

    def _bring(self, address: str, copy: Path, lock: BinaryIO) -> None:
        """Download a file, in several attempts, and keep it. The lock file says what to clean if we are killed."""
        check_protocol(address)
        left = _noted(lock)
        if _SCRATCH.fullmatch(left):
            copy.with_name(left).unlink(missing_ok=True)
        for attempt in range(self.attempts):
            time.sleep(self._pause(attempt))
            # a name of its own: whatever hangs in an earlier attempt cannot write into this one
            part = copy.with_name(f".{copy.name}.{uuid4().hex[:8]}.part")
            _note(lock, part.name)
            try:
                error = download(address, part, self.stall_seconds / self.attempts, self.limit)
                if error is None:
                    return self._keep(part, copy)
            finally:
                part.unlink(missing_ok=True)
            if attempt + 1 == self.attempts or not may_pass(error):
                raise self._named(error, address, attempt + 1)

    def _pause(self, attempt: int) -> float:
        """Seconds before an attempt: 0, then about 2 and 8 for a stall of 120, not the same for all who wait."""
        return self.stall_seconds / 60 * 4.0 ** (attempt - 1) * Random().uniform(0.5, 1.5) if attempt else 0.0

    def _keep(self, part: Path, copy: Path) -> None:
        """Give a download its name, and make room for it before."""
        with part.open("rb+") as file:
            os.fsync(file.fileno())
            size = os.fstat(file.fileno()).st_size
        with _locked(self.folder / _LEDGER) as ledger:
            noted = _noted(ledger)
            held = int(noted) if noted.isdecimal() else self.limit  # unknown: count
            if held + size > self.limit:
                held = self._make_room(size)
            _note(ledger, str(held + size))
            part.replace(copy)

    def _make_room(self, size: int) -> int:
        """Remove the oldest copies until `size` bytes fit, with a tenth of the limit to spare; bytes that stay."""
        copies: list[tuple[float, int, str]] = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # downloads end meanwhile
                    if _COPY.fullmatch(entry.name):
                        copies.append((entry.stat().st_mtime, entry.stat().st_size, entry.path))
                    elif _SCRATCH.fullmatch(entry.name) and entry.stat().st_mtime < time.time() - _SCRATCH_SECONDS:
                        os.unlink(entry.path)
        held = sum(size for _, size, _ in copies)
        if held + size <= self.limit:
            return held
        for _, gone, path in sorted(copies):
            if held + size <= 0.9 * self.limit:
                break
            with suppress(FileNotFoundError):
                os.unlink(path)
            held -= gone
        return held

    def _named(self, error: BaseException, address: str, attempts: int) -> Exception:
        """What a caller gets to see of a failed download; without the secrets of its address."""
        where, text = shown(address), shown(f"{type(error).__name__}: {error}")
        status = status_of(error)
        if isinstance(error, FileNotFoundError) or status in (404, 410):
            return Absent(f"{where}: there is no such file")
        if isinstance(error, PermissionError) or status in (401, 403, 407):
            return PermissionError(
                f"{where}: access is refused ({text}): check the credentials in the environment, and the name: stores "
                "also answer so for a missing file of a folder that you may not list"
            )
        if isinstance(error, TimeoutError):
            host = "/".join(where.split("/")[:3])
            return TimeoutError(
                f"{where}: no byte came from {host} for {self.stall_seconds:g} s, in {attempts} attempts: check the "
                "network and the server, or raise data.reading.stall_seconds"
            )
        if isinstance(error, TooLarge):
            return ValueError(f"{where}: {error}")
        if isinstance(error, OSError) and error.errno in NO_USE:
            return OSError(error.errno, f"{where} cannot be copied to {self.folder}: {text}")
        tries = f"attempt {attempts} of {self.attempts}"
        return OSError(f"{where} cannot be downloaded ({text}; {tries}): check the name and the network")


def copy_name(address: str) -> str:
    """The file name of an address's copy: a hash, and the end of the address for people and tools.

    Two addresses that differ in the ending alone have the same hash.
    """
    body, mark, query = address.partition("?")
    stem, dot, ending = body.rpartition(".")
    if not re.fullmatch(r"[A-Za-z0-9]{1,16}", ending) or not dot:
        stem, dot, ending = body, "", ""
    digest = hashlib.sha256(f"{stem}{mark}{query}".encode()).hexdigest()
    readable = re.sub(r"[^A-Za-z0-9._-]", "_", shown(stem).rpartition("/")[2])
    return f"{digest[:20]}-{readable[-80:]}{dot}{ending}"


def _touched(copy: Path) -> bool:
    """Whether there is a copy; its time of last use is now."""
    try:
        os.utime(copy)
    except FileNotFoundError:
        return False
    except PermissionError:
        return True  # another user's, which may be read all the same
    return True


@contextmanager
def _alone(path: Path) -> Iterator[BinaryIO]:
    """A lock file, this caller's alone, which goes with the body. What it holds is of a caller that was killed."""
    while True:
        with _locked(path) as file:
            if not _is_at(file, path):
                continue  # its last owner removed it while this caller waited
            try:
                yield file
            finally:
                path.unlink(missing_ok=True)
            return


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """An open file that no other thread, process or node has locked; `flock` tells threads apart, `lockf` does not."""
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            message = f"{path.parent} is on a file system without file locks: put the cache on a local disk"
            raise OSError(error.errno, message) from error
        try:
            yield file
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough: a child forked meanwhile holds it too


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _noted(file: BinaryIO) -> str:
    return os.pread(file.fileno(), 512, 0).decode("ascii", "replace")


def _note(file: BinaryIO, text: str) -> None:
    """Replace what a file opened for appending holds."""
    os.ftruncate(file.fileno(), 0)
    os.write(file.fileno(), text.encode("ascii"))
