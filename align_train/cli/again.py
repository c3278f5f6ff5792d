"""Whether a SLURM job whose run has ended is to be queued again: `python -m align_train.cli.again STATUS [overrides]`.

For slurm/*.sbatch, which asks Slurm to do so. Exits with 0 for yes, 1 for no, and says why, at the end of the log.
"""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from align_train.cli.attempts import DONE, Attempt, failures, idle, note_killed, read_attempts, told_failures
from align_train.cli.jobs import Job
from align_train.cli.resuming import AUTO, FOLDER, has_checkpoint, quoted, value_of
from align_train.cli.run_folders import folder_of, last_folder
from align_train.signals import Wish

KILLED_BY_USR1 = 138  # before the program could note it
MOST_IDLE = 10  # starts in a row that came no further, most of them told to end: preempted at once, or out of time
MOST_KILLED = 3  # such starts in a row, where no start came to know recovery.failures
SAME_WORDS = "submit the same words again"


def main(arguments: Sequence[str] | None = None) -> None:
    """Say it."""
    status, *overrides = sys.argv[1:] if arguments is None else arguments
    job = Job.current()
    if job is None or not status.isdecimal():
        sys.exit("usage, in a SLURM job: python -m align_train.cli.again STATUS [overrides of the run]")
    folder = folder_of_run(overrides, job)
    attempts = starts_of(job, folder)
    if int(status) == KILLED_BY_USR1 and not _noted(attempts, job):
        folder = folder or folder_of(job, looks=True)
        note_killed(folder, job, "killed by SIGUSR1 as it began")
        attempts = starts_of(job, folder)
    advice = how_to_go_on(folder)
    yes, why = verdict(attempts, int(status), job, advice)
    if yes and not may_be_queued(job):
        yes, why = False, f"{why}; --no-requeue, or this cluster, forbids to queue it again: {advice}"
    told = f"again: {'yes' if yes else 'no'}, {why}" + (f"; run folder {folder}" if folder else "")
    print(told + (f"; if Slurm does not queue it: {advice}" if yes else ""))
    sys.exit(0 if yes else 1)


def how_to_go_on(folder: Path | None) -> str:
    """What to submit where Slurm is not to queue the job again."""
    if folder and has_checkpoint(folder):
        return f"submit with resume={quoted(folder.absolute())}"
    return SAME_WORDS


def may_be_queued(job: Job) -> bool:
    """Whether Slurm would queue the job again; True where it cannot be asked, as in most containers."""
    command = ["scontrol", "show", "job", "--oneliner", job.number]
    try:
        said = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=30, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return True
    return re.search(r"\bRequeue=0\b", said) is None


def folder_of_run(overrides: Sequence[str], job: Job) -> Path | None:
    """Where the run of this job writes; None where that was not settled."""
    resumed = value_of(overrides, "resume")
    named = value_of(overrides, FOLDER) if resumed in (None, AUTO) else resumed
    return Path(named) if named else last_folder(job)


def starts_of(job: Job, folder: Path | None) -> list[Attempt]:
    """The starts of this job that are noted in a folder."""
    return [each for each in read_attempts(folder) if each.job == job.whose] if folder else []


def verdict(attempts: Sequence[Attempt], status: int, job: Job, advice: str = SAME_WORDS) -> tuple[bool, str]:
    """Whether to go on, and why, by the starts of this job and the exit status of the last."""
    if not _noted(attempts, job):
        return False, "the run did not begin: the reason stands above"
    last, failed = attempts[-1], failures(attempts)
    if not last.failed:
        # after an END, a scancel would have ended the script too that asks here: room was to be made
        told = "the run is done" if last.how == DONE else f"stopped{_where(last)} ({last.how})"
        if (starts := idle(attempts)) >= MOST_IDLE:
            mend = f"give more time, or mend what takes it, and {advice}"
            return False, f"{told}: {starts} starts in a row came no further; {mend}"
        return last.how in (Wish.REQUEUE.name, Wish.END.name), told
    if last.for_good:
        return False, f"it would fail again: {last.how}"
    known = [each.most_failures for each in attempts if each.most_failures]
    most = known[-1] if known else MOST_KILLED if status == KILLED_BY_USR1 else 1
    if len(failed) >= most:
        return False, f"{told_failures(failed)}: mend that, and {advice}"
    return True, f"failure {len(failed)} of at most {most}{_where(last)}: {last.told()}"


def _noted(attempts: Sequence[Attempt], job: Job) -> bool:
    return bool(attempts) and attempts[-1].turn[0] == job.restart


def _where(attempt: Attempt) -> str:
    return " before training" if attempt.reached is None else f" at step {attempt.reached}"


if __name__ == "__main__":
    main()
