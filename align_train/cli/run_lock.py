"""RUN/.lock: one process at a time is at a run."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

_held = dict[Path, int]()  # the open lock of each run that this process is at


def is_held(folder: Path) -> bool:
    """Whether this process is at the run."""
    return folder.resolve() in _held


def hold(folder: Path, check_gone: Callable[[], None]) -> None:
    """Keep other processes, on other machines too, from this run: a record lock, which ends with the process.

    The file is opened once: were another opened and closed, the lock would be gone.

    Args:
        folder: the run folder.
        check_gone: raises unless whatever holds the lock does nothing any more; asked where something does.
    """
    if is_held(folder):
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # POSIX allows either for a lock that another process holds
        try:
            check_gone()
        except BaseException:
            os.close(file)
            raise
    except OSError:  # a file system without locks
        pass
    _held[folder.resolve()] = file


def release(folder: Path) -> None:
    """Let others take it, if this process holds it."""
    file = _held.pop(folder.resolve(), None)
    if file is not None:
        os.close(file)
