"""All tasks of a selection on one machine: shared out to processes, with one progress bar."""

import json
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tqdm import tqdm

from align_train.corpus.fetch.fetcher import Fetcher
from align_train.corpus.fetch.slices import read_rows, selected_files, selected_rows
from align_train.corpus.fetch.tasks import Columns, Task
from align_train.corpus.fetch.terms import Limits, Permissions
from align_train.corpus.images import ImageSettings
from align_train.files import atomic_write
from align_train.records import Tally

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FetchSettings:
    """How a selection is fetched.

    Attributes:
        limits: time, size and number of transfers of each process.
        permissions: what may be contacted.
        images: how images are stored.
        columns: names of the columns that matter.
        rows_per_task: rows of a slice; at most so many pairs go into a shard.
        tasks: `all`, one task `7`, a range `0-99`, or `2/16`, the third of sixteen equal parts counted from 0.
        processes: that work at the same time on this machine; None for as many as there are cores.
        retry_failed: fetch those rows of finished tasks again that failed.
    """

    limits: Limits = field(default_factory=Limits)
    permissions: Permissions = field(default_factory=Permissions)
    images: ImageSettings = field(default_factory=ImageSettings)
    columns: Columns = field(default_factory=Columns)
    rows_per_task: int = 10_000
    tasks: str = "all"
    processes: int | None = None
    retry_failed: bool = False

    def __post_init__(self) -> None:
        if self.rows_per_task < 1:
            raise ValueError(f"source.fetch.rows_per_task is {self.rows_per_task}; a task needs at least 1 row")
        if self.processes is not None and self.processes < 1:
            raise ValueError(f"source.fetch.processes is {self.processes}; give at least 1, or null for all cores")

    @property
    def fetcher(self) -> Fetcher:
        """What gets the images."""
        return Fetcher(self.limits, self.permissions, self.images)


@dataclass(frozen=True)
class Job:
    """The tasks of one selection.

    Attributes:
        selected: folder of the selected rows, parquet files.
        shards: folder that the shards go to.
        settings: how they are fetched.
    """

    selected: Path
    shards: Path
    settings: FetchSettings = field(default_factory=FetchSettings)

    @property
    def tasks(self) -> int:
        """Number of tasks."""
        return -(-selected_rows(self.selected) // self.settings.rows_per_task)

    def rows_of(self, index: int) -> int:
        """How many rows task number `index` has."""
        size = self.settings.rows_per_task
        return min(size, selected_rows(self.selected) - index * size)

    def finished(self, index: int) -> bool:
        """True if the shard and its sidecar are there."""
        return (self.shards / f"{index:05d}.parquet").is_file()

    def task(self, index: int) -> Task:
        """Task number `index`, with its rows read."""
        rows = read_rows(self.selected, index * self.settings.rows_per_task, self.rows_of(index))
        return Task(index, rows, self.shards, self.settings.fetcher, self.settings.columns)

    def wanted(self) -> list[int]:
        """Indices of the tasks that were asked for and have something left to do."""
        asked = chosen(self.settings.tasks, self.tasks)
        return [index for index in asked if self.settings.retry_failed or not self.finished(index)]

    def run(self, index: int, tell: Callable[[str], None] = lambda reason: None) -> bool:
        """Run a task, unless it is finished by now; False if another process is at it."""
        retry = self.settings.retry_failed
        return (self.finished(index) and not retry) or self.task(index).run(tell, retry)

    def begin(self, overwrite: bool) -> None:
        """Note in SHARDS/job.json what the shards are made of; ValueError if the folder holds those of another job."""
        identity, path = self._identity(), self.shards / "job.json"
        present = sorted(self.shards.glob("[0-9]*.*"))
        found = json.loads(path.read_text()) if path.is_file() else {} if present else identity
        if found != identity:
            if not overwrite:
                differs = ", ".join(key for key in identity if found.get(key) != identity[key])
                raise ValueError(
                    f"{self.shards} already holds shards of another job (other {differs}): set overwrite=true to "
                    "replace them, or name another folder"
                )
            for left in sorted(present, key=lambda left: left.suffix != ".parquet"):
                left.unlink()  # the sidecars first: without them no shard counts as finished
        self.shards.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(json.dumps(identity, indent=1).encode())

    def _identity(self) -> dict[str, Any]:
        files = [[path.name, path.stat().st_size] for path in selected_files(self.selected)]
        return {
            "selection": files,
            "rows_per_task": self.settings.rows_per_task,
            "columns": asdict(self.settings.columns),
            "images": asdict(self.settings.images),
        }


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
    processes = min(job.settings.processes or len(os.sched_getaffinity(0)), len(wanted))
    rows = sum(job.rows_of(index) for index in wanted)
    with tqdm(total=rows, desc=f"fetch, {len(wanted)} tasks", unit="row", smoothing=0.05, mininterval=0.5, delay=2) as bar:
        elsewhere = _follow([_Worker(job, wanted[number::processes]) for number in range(processes)], bar)
    if elsewhere:
        log.warning("%d tasks are being worked on by other processes, such as %05d", len(elsewhere), elsewhere[0])


def chosen(tasks: str, count: int) -> range:
    """The indices that `tasks` stands for, of `count` tasks; ValueError if it stands for none."""
    text = str(tasks)
    if text == "all":
        return range(count)
    if part := re.fullmatch(r"(\d+)/(\d+)", text):
        number, parts = int(part[1]), int(part[2])
        if number < parts:
            return range(number * count // parts, (number + 1) * count // parts)
    elif span := re.fullmatch(r"(\d+)(?:-(\d+))?", text):
        first, last = int(span[1]), int(span[2] or span[1])
        if first <= last < count:
            return range(first, last + 1)
    raise ValueError(
        f"source.fetch.tasks is {text!r}, and there are tasks 0 to {count - 1}: write all, one number, a range such "
        "as 0-9, or a part such as 2/16, counted from 0"
    )


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
                    bar.update(sum(news.values()))
                    bar.set_postfix_str(_progress(reasons))
        return elsewhere
    finally:
        for worker in workers:
            worker.process.terminate()
            worker.process.join()


def _received(worker: _Worker) -> Any:
    try:
        return worker.news.recv()
    except EOFError:
        worker.process.join()
        code = worker.process.exitcode
        return OSError(
            f"a process that fetches ended with exit code {code}; -9 means that it was killed, most often for want of "
            "memory: fewer processes (source.fetch.processes) or a smaller source.fetch.limits.ahead_bytes need less. "
            "The same command goes on where it stopped"
        )


def _progress(reasons: Tally) -> str:
    """Success rate, and the most frequent reasons for failure."""
    total, came = sum(reasons.values()), reasons[""]
    failures = Tally(reasons - Tally({"": came}))
    frequent = ", ".join(f"{reason} {count}" for reason, count in failures.most_common(3))
    return f"{100 * came / max(total, 1):.1f} % came" + (f"; {frequent}" if frequent else "")
