"""The files of a task: claimed by one process, staged, renamed, and put right after a crash at any moment.

NNNNN.tar, NNNNN.json and NNNNN.parquet are written under temporary names, flushed, staged as .NNNNN.ENDING.staged and
renamed, the parquet last both times: a task with its parquet is done. The staged parquet is the point of no return: if
that is found after a crash, the renaming is finished, else the task is begun anew.
"""

import errno
import fcntl
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Whole, staged, or on the way to being staged; the group is the number of the task.
_NAME = re.compile(r"\.{0,2}(\d{5,})\.(?:tar|json|parquet)(?:\.staged(?:\.\d+\.tmp)?)?")
_BEGINNING = 2**40  # a byte of FOLDER/.lock beyond all tasks


@contextmanager
def claimed(stem: Path) -> Iterator[bool]:
    """True if no other process on any machine is at this task; the claim ends with the block or the process.

    A lock on byte number NNNNN of FOLDER/.lock (POSIX record locks: they work over NFS, and the kernel drops them when
    a process dies, or closes the file once).
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    with (stem.parent / ".lock").open("a+b") as file:
        yield _locked(file.fileno(), int(stem.name), 1)


@contextmanager
def alone(folder: Path) -> Iterator[Callable[[], bool]]:
    """One process at a time, others wait. What it yields says whether none is at a task, and if so, keeps it so."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX, 1, _BEGINNING)
        yield lambda: _locked(file.fileno(), 0, _BEGINNING)


def _locked(file: int, first: int, count: int) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, count, first)
    except (BlockingIOError, PermissionError):  # POSIX allows either for a lock that another process holds
        return False
    return True


@contextmanager
def room_in(folder: Path) -> Iterator[None]:
    """Where the disk is full, an OSError that says so, instead of one that names neither file nor remedy."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(
            f"{folder} takes no more ({error.strerror}): make room on its disk. What was finished is whole, and the "
            "same command goes on where it stopped"
        ) from error


def task_files(folder: Path) -> list[tuple[int, Path]]:
    """Task and path of each file that is one of a task's: whole, staged, or left by a process that was killed."""
    named = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted((int(name[1]), path) for name, path in named if name)


def recover(stem: Path) -> None:
    """Finish the renaming of a task whose staged files are complete; remove what else an interrupted one left."""
    if staged(stem, "parquet").is_file():
        commit(stem)
    _sweep(stem)


@contextmanager
def swept(stem: Path) -> Iterator[None]:
    """If the body raises, what it staged goes, which may be what fills the disk; unless it is complete."""
    try:
        yield
    except BaseException:
        if not staged(stem, "parquet").is_file():
            _sweep(stem)
        raise


def _sweep(stem: Path) -> None:
    for number, path in task_files(stem.parent):
        if number == int(stem.name) and path.name.startswith("."):
            path.unlink()


def commit(stem: Path) -> None:
    """Give what is staged its name, the parquet when the other names are on the disk."""
    flush(stem.parent)
    for ending in ("tar", "json", "parquet"):
        if ending == "parquet":
            flush(stem.parent)
        if (path := staged(stem, ending)).is_file():
            path.replace(stem.with_name(f"{stem.name}.{ending}"))
    flush(stem.parent)


def staged(stem: Path, ending: str) -> Path:
    """Where a file of the task is while it is complete and not yet in its place."""
    return stem.with_name(f".{stem.name}.{ending}.staged")


def flush(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
