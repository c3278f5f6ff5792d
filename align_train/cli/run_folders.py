"""The folder of a job's run: the same at each of its starts, and never that of another job with its id."""

import re
from collections.abc import Callable, Sequence
from itertools import count, takewhile
from pathlib import Path

from align_train.cli.attempts import Attempt, begin, read_attempts
from align_train.cli.jobs import Job
from align_train.processes import is_first_process, until_first_process

RUNS = Path("outputs/slurm")


def folder_of(job: Job, looks: bool = False) -> Path:
    """outputs/slurm/NAME-NUMBER, or with -2, -3 ... where that is a stranger's.

    A folder is the job's if all starts noted in it are of this job, and came before this one. The first process notes
    this start in it, and the others find it by that. What cannot be told from the job's own is the run of a job of the
    same id, name, user, cluster and folder that had fewer starts, if this job was killed before it noted its first.
    With `looks` nothing is noted.

    Raises:
        ValueError: another srun of the job is at the run, or this is not the first process, and no srun tells which
            start the first is of.
    """
    if looks:
        return _next(job)
    if _launched(job):
        return until_first_process(lambda: _begun(job), lambda: _made(job))
    if not is_first_process():
        raise ValueError(
            f"the processes of job {job.number} share no srun by which to agree: give hydra.run.dir=FOLDER"
        )
    return _made(job)


def last_folder(job: Job) -> Path | None:
    """The folder that this start of the job wrote to; None where it did not come to that."""
    return _newest(job, lambda attempts: list(attempts[-1].turn)[:1] == [job.restart])


def _launched(job: Job) -> bool:
    """Whether srun started this: without it two first starts of jobs with the same id look the same."""
    return bool(job.launch.strip(":"))


def _begun(job: Job) -> Path | None:
    turn = (job.turn, job.launch)
    return _newest(job, lambda attempts: (list(attempts[-1].turn), attempts[-1].launch) == turn)


def _made(job: Job) -> Path:
    folder = _next(job)
    begin(folder, job)
    return folder


def _next(job: Job) -> Path:
    folder = _newest(job, lambda attempts: all(list(each.turn) < job.turn for each in attempts))
    return folder or next(made for made in map(_named(job), count(1)) if not made.exists())


def _newest(job: Job, fits: Callable[[Sequence[Attempt]], bool]) -> Path | None:
    """Of the folders in which only this job's starts, or those of one like it, are noted, the last that fits."""
    existing = takewhile(Path.exists, map(_named(job), count(1)))
    for folder in reversed(list(existing)):
        attempts = read_attempts(folder)
        if attempts and all(each.job == job.whose for each in attempts) and fits(attempts):
            return folder
    return None


def _named(job: Job) -> Callable[[int], Path]:
    # what a file system or Hydra takes for something else is left out; Lightning quotes the name, but escapes nothing
    name = re.sub(r"[^\w.,+=@-]", "_", f"{job.name}-{job.number}")
    return lambda number: RUNS / (name if number == 1 else f"{name}-{number}")
