"""All tasks of a selection on one machine: shared out to processes, with one progress bar."""

import logging
import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Sequence
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from typing import Any

from tqdm import tqdm

from align_train.corpus.fetch.job import Job
from align_train.records import Tally

log = logging.getLogger(__name__)


def run_job(job: Job, overwrite: bool = False) -> None:
    """Run the tasks that are not finished; several processes, on several machines too, may work at one folder.

    Raises:
        ValueError: the tasks do not exist, or the folder holds other shards.
        OSError: the disk is full, or a process was killed.
    """
    job.begin(overwrite)
    wanted = job.wanted()
    if not wanted:
        log.info("all tasks of %s are finished, nothing to do", job.shards)
        return
    processes = min(job.settings.processes or 2 * len(os.sched_getaffinity(0)), len(wanted))
    retry = job.settings.retry_failed  # how many rows failed, the tasks know
    rows = None if retry else sum(job.rows_of(index) for index in wanted)
    says = f"fetch, {len(wanted)} tasks"
    with tqdm(total=rows, desc=says, unit="row", smoothing=0.05, mininterval=0.5, delay=2) as bar:
        elsewhere = _follow([_Worker(job, wanted[number::processes]) for number in range(processes)], bar)
    if elsewhere:
        log.warning("%d tasks are being worked on by other processes, such as %05d", len(elsewhere), min(elsewhere))


class _Worker:
    """A process that runs tasks one after another, and tells through a pipe how it gets on."""

    def __init__(self, job: Job, tasks: Sequence[int]) -> None:
        context = get_context("spawn")  # the parent has threads
        self.news, told = context.Pipe(duplex=False)
        self.process = context.Process(target=_work, args=(job, tasks, told), daemon=True)
        self.process.start()
        told.close()


def _work(job: Job, tasks: Sequence[int], told: Connection) -> None:
    """In the process: run the tasks; send counts by reason, and at last the tasks that others are at, or an error."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process
    warnings.filterwarnings("ignore", module=r"PIL\.")  # what is odd in the files of others; broken ones are counted
    counts, clock, elsewhere = Tally(), time.monotonic(), []

    def tell(reason: str) -> None:
        nonlocal clock
        counts[reason] += 1
        if time.monotonic() - clock > 0.5:
            told.send(dict(counts))
            counts.clear()
            clock = time.monotonic()

    try:
        for index in tasks:
            if not job.run(index, tell):
                elsewhere.append(index)
        told.send(dict(counts))
        told.send(elsewhere)
    except Exception as error:  # noqa: BLE001 - raised again by the parent
        error.add_note(traceback.format_exc())
        told.send(error)


def _end_with_parent() -> None:
    """A parent that is killed cannot end its processes, so they watch it."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _follow(workers: Sequence[_Worker], bar: tqdm) -> list[int]:
    """Show the workers' progress until the last has ended; tasks that others are at. Raises what a worker raised."""
    reasons, elsewhere, running = Tally(), [], list(workers)
    try:
        while running:
            for ready in connection.wait([worker.news for worker in running]):
                worker = next(worker for worker in running if worker.news is ready)
                news = _received(worker)
                if isinstance(news, Exception):
                    raise news
                if isinstance(news, list):
                    elsewhere += news
                    running.remove(worker)
                else:
                    reasons.update(news)
                    bar.set_postfix_str(progress(reasons), refresh=False)
                    bar.update(sum(news.values()))
        return elsewhere
    finally:
        for worker in workers:
            worker.process.terminate()
            worker.process.join()
            worker.process.close()
            worker.news.close()


def _received(worker: _Worker) -> Any:
    try:
        return worker.news.recv()
    except (EOFError, OSError):  # the latter in the middle of a message
        worker.process.join()
        code = worker.process.exitcode
        return OSError(
            f"a process that fetches ended with exit code {code}; -9 means that it was killed, most often for want of "
            "memory: fewer processes (source.fetch.processes) or a smaller source.fetch.limits.ahead_bytes need less. "
            "The same command goes on where it stopped"
        )


def progress(reasons: Tally) -> str:
    """Success rate, and the most frequent reasons for failure."""
    total, came = sum(reasons.values()), reasons[""]
    failures = Tally(reasons - Tally({"": came}))
    frequent = ", ".join(f"{reason} {count}" for reason, count in failures.most_common(3))
    return f"{100 * came / max(total, 1):.1f} % came" + (f"; {frequent}" if frequent else "")
