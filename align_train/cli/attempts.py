"""RUN/attempts.json: each start of a run, how far it came, and how it ended."""

import json
import logging
import os
import socket
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from textwrap import shorten

from align_train.cli import run_lock
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
        return shorten(self.how, 400, placeholder=" ...") or "killed"


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
    """Note the start of this process, and keep others from the run from here on; nothing if that is done already.

    Raises:
        ValueError: another process is at this run. Nothing is noted.
    """
    whose, turn, launch = (job.whose, job.turn, job.launch) if job else ({}, [0, 0], "")
    known = run_lock.is_held(folder)
    run_lock.hold(folder, lambda: _check_gone(folder, job))
    attempts = read_attempts(folder)
    if known and any(_is_own(each) and list(each.turn) == turn for each in attempts):
        return
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
    with ExitStack() as stack:
        stack.callback(run_lock.release, folder)
        begin(folder, job)
        _change(folder, most_failures=most_failures)
        try:
            check_failures(read_attempts(folder)[:-1], job, most_failures)
            yield
        except BaseException as error:
            how, for_good = _judged(error, folder)
            _end_failed(folder, how, for_good)
            raise
        _change(folder, ended=_now(), how=DONE)


def end_unsettled(folder: Path, why: str) -> None:
    """Note that what `begin` had noted came to an end before there were settings."""
    if run_lock.is_held(folder):
        _end_failed(folder, f"no settings, {why}", for_good=True)
        run_lock.release(folder)


def note_killed(folder: Path, job: Job, how: str) -> None:
    """Note a start that was killed before it could be noted."""
    begin(folder, job)
    _change(folder, ended=_now(), how=how)
    run_lock.release(folder)


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
    reasons = Counter(each.told() for each in failed)
    told = "; ".join(reason + (f", {count} times" if count > 1 else "") for reason, count in reasons.items())
    attempts = "1 attempt" if len(failed) == 1 else f"{len(failed)} attempts in a row"
    return f"{attempts} ended {where} ({told})"


def write_attempts(folder: Path, attempts: Sequence[Attempt]) -> None:
    """Replace the record."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "attempts.json") as file:
        file.write((json.dumps([asdict(each) for each in attempts], indent=1) + "\n").encode())


def _change(folder: Path, **changes: object) -> None:
    """Change what is noted of this start, which another may have come after: see `_check_gone`."""
    attempts = read_attempts(folder)
    own = [number for number, each in enumerate(attempts) if _is_own(each)]
    if not own:
        raise ValueError(f"{folder / 'attempts.json'} no longer has this start: leave it where it is while a run is on")
    attempts[own[-1]] = replace(attempts[own[-1]], **changes)  # type: ignore[arg-type] # names of its fields
    write_attempts(folder, attempts)


def _is_own(attempt: Attempt) -> bool:
    return (attempt.host, attempt.process, attempt.ended) == (socket.gethostname(), os.getpid(), None)


def _end_failed(folder: Path, how: str, for_good: bool) -> None:
    """Note the end by an error, which stays the one that is shown where that cannot be noted: a disk is full."""
    try:
        _change(folder, ended=_now(), how=how, for_good=for_good)
    except (OSError, ValueError) as error:
        log.warning("how this start ended is not noted in %s: %s", folder, error)


def _judged(error: BaseException, folder: Path) -> tuple[str, bool]:
    """How an attempt ended, and whether it would end so again: what a user wrote is wrong before the first step.

    A file that is missing is a wrong path where the run never trained; afterwards, a disk that is away for a while.
    """
    if isinstance(error, KeyboardInterrupt):
        return Wish.INTERRUPT.name, False
    if isinstance(error, SystemExit):
        wishes = [each.name for each in Wish if each and each.status == error.code]
        return (wishes[0] if wishes else f"exit status {error.code}"), False
    if isinstance(cause := error.__cause__, Exception) and type(error).__name__ == "InstantiationException":
        error = cause
    trained = [each.reached is not None for each in read_attempts(folder)]
    lasting = FileNotFoundError if not any(trained) else ()
    passing = isinstance(error, OSError | RuntimeError) and not isinstance(error, lasting)
    for_good = isinstance(error, FloatingPointError) or not (passing or trained[-1])
    return f"{type(error).__name__}: {str(error).rstrip()}", for_good


def _steps_file(folder: Path) -> Path:
    return folder / "steps.txt"


def _steps(folder: Path) -> tuple[int | None, int | None]:
    """The steps that `engine.Heartbeat` notes, of the attempt that goes on; None before training begins."""
    try:
        first, reached = map(int, _steps_file(folder).read_text().split())
    except (FileNotFoundError, ValueError):  # it is not synced: after a loss of power it may hold anything
        return None, None
    return first, reached


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _check_gone(folder: Path, job: Job | None) -> None:
    """Raise ValueError unless what holds the lock is an earlier start of a job that Slurm has since queued again.

    That is on a node that does not answer, and does nothing any more; another srun of the same start is at work. Who
    holds the lock has not ended, and only later starts of the same job passed it over: so the last of those that have
    not ended tells. Those before the holder were killed.
    """
    last = [each for each in read_attempts(folder) if each.ended is None][-1:]
    if job and last and last[0].job == job.whose and last[0].turn[0] < job.restart:
        return
    where = f", begun on {last[0].host} at {last[0].began} UTC" if last else ""
    raise ValueError(f"another process is at the run in {folder}{where}: end it, or name another folder")
