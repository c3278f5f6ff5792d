"""RUN/attempts.json: each start of a run, how far it came, and how it ended."""

import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from textwrap import shorten

from align_train.cli.jobs import Job
from align_train.files import atomic_write
from align_train.processes import is_first_process
from align_train.signals import Wish

DONE = "done"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Attempt:
    """One start of a run.

    Attributes:
        began: UTC, as are all times here.
        host: of the first process.
        process: number of it.
        job: `Job.whose`; empty outside of SLURM.
        turn: `Job.turn`.
        launch: `Job.launch`.
        first_step: updates that it began from; None if training did not begin.
        reached: updates that it came to.
        ended: None while it goes on, and for ever if it was killed.
        how: `done`, the name of a `Wish`, or an error; empty if it was killed.
        for_good: the same command would fail again.
        most_failures: `recovery.failures`, once it is known.
    """

    began: str
    host: str
    process: int
    job: Mapping[str, str] = field(default_factory=dict)
    turn: Sequence[int] = (0, 0)
    launch: str = ""
    first_step: int | None = None
    reached: int | None = None
    ended: str | None = None
    how: str = ""
    for_good: bool = False
    most_failures: int | None = None

    @property
    def failed(self) -> bool:
        """True if neither it came to its end, nor was told to end."""
        return self.how != DONE and self.how not in Wish.__members__

    def told(self) -> str:
        """How it ended, in few words."""
        return shorten(self.how, 200, placeholder=" ...") or "killed"


def read_attempts(folder: Path) -> list[Attempt]:
    """All starts of the run, oldest first, the last one as far as it has come by now.

    Raises:
        ValueError: the record is damaged.
    """
    file = folder / "attempts.json"
    if not file.is_file():
        return []
    try:
        attempts = [Attempt(**record) for record in json.loads(file.read_text())]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}): take it away, then the attempts are counted anew") from error
    if attempts and attempts[-1].ended is None:
        first, reached = _steps(folder)
        attempts[-1] = replace(attempts[-1], first_step=first, reached=reached)
    return attempts


def begin(folder: Path, job: Job | None) -> None:
    """Note the start of this process."""
    whose, turn, launch = (job.whose, job.turn, job.launch) if job else ({}, [0, 0], "")
    attempts = read_attempts(folder)
    _steps_file(folder).unlink(missing_ok=True)
    write_attempts(folder, [*attempts, Attempt(_now(), socket.gethostname(), os.getpid(), whose, turn, launch)])


@contextmanager
def attempt(folder: Path, job: Job | None, most_failures: int) -> Iterator[None]:
    """Note on the first process when the run begins, unless `begin` has, and how it ends.

    Raises:
        ValueError: another process is at this run, or the job has failed too often where it stands.
    """
    if not is_first_process():
        yield
        return
    with _alone(folder, job):
        here = (socket.gethostname(), os.getpid(), job.turn if job else [0, 0], None)
        last = [(each.host, each.process, list(each.turn), each.ended) for each in read_attempts(folder)[-1:]]
        if here not in last:
            begin(folder, job)
        _change(folder, most_failures=most_failures)
        try:
            check_failures(read_attempts(folder)[:-1], job, most_failures)
            yield
        except BaseException as error:
            how, for_good = _judged(error, trained=_steps(folder)[0] is not None)
            _end_failed(folder, how, for_good)
            raise
        _change(folder, ended=_now(), how=DONE)


def end_unsettled(folder: Path, why: str) -> None:
    """Note that what `begin` had noted came to an end before there were settings."""
    last = read_attempts(folder)[-1:]
    if is_first_process() and last and last[0].ended is None and last[0].process == os.getpid():
        _end_failed(folder, f"no settings, {why}", for_good=True)


def note_killed(folder: Path, job: Job, how: str) -> None:
    """Note a start that was killed before it could be noted."""
    begin(folder, job)
    _change(folder, ended=_now(), how=how)


def failures(attempts: Sequence[Attempt]) -> list[Attempt]:
    """Those that failed since the run last came further than before, together with the one that then did."""
    return [each for each in attempts[max(0, _last_gain(attempts)) :] if each.failed]


def idle(attempts: Sequence[Attempt]) -> int:
    """How many starts there were, however they ended, since the last that came further than those before it."""
    return len(attempts) - 1 - _last_gain(attempts)


def _last_gain(attempts: Sequence[Attempt]) -> int:
    """Which attempt was the last to come further than all before it; -1 where training never began."""
    furthest, found = -1, -1
    for number, each in enumerate(attempts):
        if each.reached is not None and each.reached > furthest:
            furthest, found = each.reached, number
    return found


def check_failures(attempts: Sequence[Attempt], job: Job | None, most: int) -> None:
    """Raise ValueError where a job that Slurm itself has queued again has failed too often."""
    failed = failures([each for each in attempts if job and each.job == job.whose])
    if len(failed) >= most:
        raise ValueError(f"{told_failures(failed)}; after recovery.failures={most} of them a job is not tried again")


def told_failures(failed: Sequence[Attempt]) -> str:
    """Where and how attempts failed."""
    step = max((each.reached for each in failed if each.reached is not None), default=None)
    where = "before training began" if step is None else f"at step {step} or before"
    return f"{len(failed)} attempts in a row ended {where} ({'; '.join(each.told() for each in failed)})"


def write_attempts(folder: Path, attempts: Sequence[Attempt]) -> None:
    """Replace the record."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "attempts.json") as file:
        file.write((json.dumps([asdict(each) for each in attempts], indent=1) + "\n").encode())


def _change(folder: Path, **changes: object) -> None:
    *before, last = read_attempts(folder)
    write_attempts(folder, [*before, replace(last, **changes)])  # type: ignore[arg-type] # names of its fields


def _end_failed(folder: Path, how: str, for_good: bool) -> None:
    """Note the end by an error, which stays the one that is shown where that cannot be noted: a disk is full."""
    try:
        _change(folder, ended=_now(), how=how, for_good=for_good)
    except (OSError, ValueError) as error:
        log.warning("how this start ended is not noted in %s: %s", folder, error)


def _judged(error: BaseException, trained: bool) -> tuple[str, bool]:
    """How an attempt ended, and whether it would end so again: what a user wrote is wrong before the first step."""
    if isinstance(error, KeyboardInterrupt):
        return Wish.INTERRUPT.name, False
    if isinstance(error, SystemExit):
        wishes = [each.name for each in Wish if each and each.status == error.code]
        return (wishes[0] if wishes else f"exit status {error.code}"), False
    if isinstance(cause := error.__cause__, Exception) and type(error).__name__ == "InstantiationException":
        error = cause
    for_good = isinstance(error, FloatingPointError) or (not trained and not isinstance(error, OSError | RuntimeError))
    return f"{type(error).__name__}: {str(error).rstrip()}", for_good


def _steps_file(folder: Path) -> Path:
    return folder / "steps.txt"


def _steps(folder: Path) -> tuple[int | None, int | None]:
    """The steps that `engine.Heartbeat` notes, of the attempt that goes on; None before training begins."""
    file = _steps_file(folder)
    numbers = [int(number) for number in file.read_text().split()] if file.is_file() else []
    return (numbers[0], numbers[1]) if numbers else (None, None)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextmanager
def _alone(folder: Path, job: Job | None) -> Iterator[None]:
    """Keep other processes, on other machines too, from this run: a record lock, which ends with the process.

    A job that was queued again may still find the lock of a node that does not answer; that node does nothing any more.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # POSIX allows either for a lock that another process holds
            last = read_attempts(folder)[-1:]
            if not (job and last and last[0].job == job.whose):
                where = f", begun on {last[0].host} at {last[0].began} UTC" if last else ""
                raise ValueError(
                    f"another process is at the run in {folder}{where}: end it, or name another folder"
                ) from None
        except OSError:  # a file system without locks
            pass
        yield
