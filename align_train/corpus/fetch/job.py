"""The tasks of a selection: which there are, which are wanted, and whose folder it is."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from align_train.corpus.fetch.commit import alone, claimed, recover, room_in, task_files
from align_train.corpus.fetch.fetcher import Fetcher
from align_train.corpus.fetch.slices import read_rows, selected_files, selected_rows
from align_train.corpus.fetch.tasks import Columns, Task, is_finished
from align_train.corpus.fetch.terms import Limits, Permissions
from align_train.corpus.images import ImageSettings
from align_train.files import atomic_write


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
        processes: that work at the same time on this machine; None for twice as many as there are cores,
            since a process waits for the last slow links of its task.
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
            raise ValueError(
                f"source.fetch.processes is {self.processes}; give at least 1, or null for twice the cores"
            )

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

    @cached_property
    def rows(self) -> int:
        """Number of selected rows."""
        return selected_rows(self.selected)

    @property
    def tasks(self) -> int:
        """Number of tasks."""
        return -(-self.rows // self.settings.rows_per_task)

    def rows_of(self, index: int) -> int:
        """How many rows task number `index` has."""
        size = self.settings.rows_per_task
        return min(size, self.rows - index * size)

    def finished(self, index: int) -> bool:
        """True if the shard and its sidecar are there."""
        return is_finished(self.shards / f"{index:05d}")

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
        """Note in SHARDS/job.json what the shards are made of, and finish what a process left when it was killed.

        Raises:
            ValueError: the selection is not complete or empty, or the folder holds the shards of another job.
            OSError: the disk is full.
        """
        report = self.selected.parent / "funnel.json"  # written when the last file is selected
        if (self.selected / "identity.json").is_file() and not report.is_file():
            raise ValueError(
                f"the selection in {self.selected} is not complete: run the step `select` to its end first"
            )
        if not self.rows:
            raise ValueError(
                f"{self.selected} has no rows, the rules dropped them all: {self.selected.parent / 'funnel.md'} says "
                "which, choose others"
            )
        if not self._is_begun(overwrite):
            with room_in(self.shards), alone(self.shards) as idle:
                if not self._is_begun(overwrite):  # nor by a process that was alone before
                    self._clear(idle())
                    with atomic_write(self.shards / "job.json") as file:
                        file.write(json.dumps(self._identity(), indent=1).encode())
        for index in sorted({index for index, path in task_files(self.shards) if path.name.startswith(".")}):
            with claimed(self.shards / f"{index:05d}") as ours:
                if ours:
                    recover(self.shards / f"{index:05d}")

    def _is_begun(self, overwrite: bool) -> bool:
        """True if the folder has this job; ValueError if it has another that may not be replaced."""
        identity, path = self._identity(), self.shards / "job.json"
        found = json.loads(path.read_text()) if path.is_file() else {}
        if (path.is_file() or task_files(self.shards)) and found != identity and not overwrite:
            differs = ", ".join(key for key in identity if found.get(key) != identity[key])
            raise ValueError(
                f"{self.shards} already holds shards of another job (other {differs}): set overwrite=true to replace "
                "them, or name another folder"
            )
        return bool(found == identity)

    def _clear(self, idle: bool) -> None:
        """Remove the files of tasks, parquet first: without it, staged or not, no task counts as finished."""
        files = [path for _, path in task_files(self.shards)]
        if files and not idle:
            raise ValueError(f"other processes are fetching into {self.shards}: end them, or name another folder")
        for path in sorted(files, key=lambda path: ".parquet" not in path.name):
            path.unlink()

    def _identity(self) -> dict[str, Any]:
        files = [[path.name, path.stat().st_size] for path in selected_files(self.selected)]
        made_by = self.selected / "identity.json"  # of the step select
        return {
            "selection": files,
            "metadata and rules": json.loads(made_by.read_text()) if made_by.is_file() else None,
            "rows_per_task": self.settings.rows_per_task,
            "columns": asdict(self.settings.columns),
            "images": asdict(self.settings.images),
        }


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
