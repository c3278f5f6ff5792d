"""Selections of links, the job that fetches them quickly from this machine, and what its folder then holds."""

import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from metadata import parquet

from align_train.corpus.fetch import FetchSettings, Job, Limits, Permissions
from align_train.corpus.images import ImageSettings

QUICK = Limits(connect_seconds=5, total_seconds=5, retries=1, backoff_seconds=0.01)
LOCAL = Permissions(networks=("127.0.0.1/32",))
SMALL = ImageSettings(size=16)


def job_of(folder: Path, urls: Sequence[str] = (), **settings: Any) -> Job:
    """FOLDER/selected with a row for each URL, if there are any, to FOLDER/shards; three rows a task."""
    if urls:
        parquet(folder / "selected" / "00000.parquet", [{"url": url} for url in urls])
    given = {"limits": QUICK, "permissions": LOCAL, "images": SMALL, "rows_per_task": 3, **settings}
    return Job(folder / "selected", folder / "shards", FetchSettings(**given))


def run_here(job: Job, overwrite: bool = False) -> Job:
    """As `run_job`, without processes of its own, which take a second to start."""
    job.begin(overwrite)
    for index in job.wanted():
        assert job.run(index)
    return job


def members(tar: Path) -> dict[str, bytes]:
    """Name and content of each member, in their order."""
    with tarfile.open(tar) as opened:
        return {member.name: opened.extractfile(member).read() for member in opened}  # type: ignore[union-attr]


def state(job: Job) -> dict[str, Any]:
    """What the shards are: every file with its content, but for the seconds it took and what tells the job."""
    return {
        path.name: _content(path) for path in sorted(job.shards.iterdir()) if path.name not in (".lock", "job.json")
    }


def _content(path: Path) -> Any:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    if path.suffix == ".json":
        counts: Mapping[str, Any] = json.loads(path.read_text())
        return {name: value for name, value in counts.items() if name != "seconds"}
    return path.read_bytes()
