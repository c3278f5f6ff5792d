"""The folder of a job's run: the same at each of its starts, and never that of another job with its id."""

from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

from align_train.cli.attempts import Attempt, begin, read_attempts
from align_train.cli.jobs import Job
from align_train.processes import until_first_process

RUNS = Path("outputs/slurm")


def folder_of(job: Job) -> Path:
    """outputs/slurm/NAME-NUMBER, or with -2, -3 ... where that is a stranger's.

    A folder is the job's if all starts noted in it are of this job, and came before this one. The first process notes
    this start in it, and the others find it by that.
    """
    return until_first_process(lambda: last_folder(job, job.step), lambda: _made(job))


def last_folder(job: Job, step: int | None = None) -> Path | None:
    """The folder that this start of the job writes to, by any of its steps or by one; None where there is none."""
    for folder in _existing(job):
        for last in read_attempts(folder)[-1:]:
            if last.job == job.whose and last.turn[0] == job.restart and step in (None, last.turn[1]):
                return folder
    return None


def _made(job: Job) -> Path:
    existing = list(_existing(job))
    own = [folder for folder in existing if _is_own(read_attempts(folder), job)]
    folder = own[-1] if own else _candidate(job, len(existing) + 1)
    begin(folder, job)
    return folder


def _is_own(attempts: Sequence[Attempt], job: Job) -> bool:
    return bool(attempts) and all(each.job == job.whose and list(each.turn) < job.turn for each in attempts)


def _existing(job: Job) -> Iterator[Path]:
    for number in count(1):
        if not (folder := _candidate(job, number)).exists():
            return
        yield folder


def _candidate(job: Job, number: int) -> Path:
    name = f"{job.name}-{job.number}".replace("/", "_")
    return RUNS / (name if number == 1 else f"{name}-{number}")
