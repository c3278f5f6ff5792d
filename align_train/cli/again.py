"""Whether a SLURM job whose run has ended is to be queued again: `python -m align_train.cli.again STATUS [overrides]`.

For slurm/*.sbatch, which asks Slurm to do so. Exits with 0 for yes, 1 for no, and says why, at the end of the log.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from align_train.cli.attempts import DONE, Attempt, failures, read_attempts, told_failures
from align_train.cli.jobs import Job
from align_train.cli.resuming import AUTO, FOLDER, value_of
from align_train.cli.run_folders import last_folder
from align_train.signals import Wish

KILLED_BY_USR1 = 138  # before the program could note it


def main(arguments: Sequence[str] | None = None) -> None:
    """Say it."""
    status, *overrides = sys.argv[1:] if arguments is None else arguments
    job = Job.current()
    if job is None or not status.isdecimal():
        sys.exit("usage, in a SLURM job: python -m align_train.cli.again STATUS [overrides of the run]")
    folder = folder_of_run(overrides, job)
    attempts = read_attempts(folder) if folder else []
    yes, why = verdict([each for each in attempts if each.job == job.whose], int(status), job)
    print(f"again: {'yes' if yes else 'no'}, {why}" + (f"; run folder {folder}" if folder else ""))
    sys.exit(not yes)


def folder_of_run(overrides: Sequence[str], job: Job) -> Path | None:
    """Where the run of this job writes; None where that was not settled."""
    resumed = value_of(overrides, "resume")
    named = value_of(overrides, FOLDER) or (resumed if resumed not in (None, "null", AUTO) else None)
    return Path(named) if named else last_folder(job)


def verdict(attempts: Sequence[Attempt], status: int, job: Job) -> tuple[bool, str]:
    """Whether to go on, and why, by the starts of this job and the exit status of the last."""
    if status == KILLED_BY_USR1:
        return True, "SIGUSR1 came before training"
    if not attempts or attempts[-1].turn[0] != job.restart:
        return False, "the run did not begin: the reason stands above"
    last, failed = attempts[-1], failures(attempts)
    if not last.failed:
        # after an END, a scancel would have ended the script too that asks here: room was to be made
        told = "the run is done" if last.how == DONE else f"stopped{_where(last)} ({last.how})"
        return last.how in (Wish.REQUEUE.name, Wish.END.name), told
    if last.for_good:
        return False, f"it would fail again: {last.how}"
    if len(failed) >= (last.most_failures or 1):
        return False, f"{told_failures(failed)}: mend that, and submit with resume=FOLDER"
    return True, f"failure {len(failed)} of at most {last.most_failures}{_where(last)}: {last.told()}"


def _where(attempt: Attempt) -> str:
    return " before training" if attempt.reached is None else f" at step {attempt.reached}"


if __name__ == "__main__":
    main()
