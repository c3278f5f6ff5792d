"""What a job has fetched so far, from the sidecars of its finished tasks."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from align_train.records import Tally


@dataclass(frozen=True)
class Summary:
    """Counts over the finished tasks.

    Attributes:
        tasks: number of tasks in all.
        finished: number of finished ones.
        rows: rows of the finished tasks.
        pairs: images that came.
        bytes: of their tars.
        seconds: that the tasks took, added up over processes.
        failed: rows that failed, by reason.
        hosts: the hosts with most failures, with their numbers.
    """

    tasks: int
    finished: int
    rows: int
    pairs: int
    bytes: int
    seconds: float
    failed: Tally
    hosts: Sequence[tuple[str, int]]

    def described(self) -> str:
        """One line for a log."""
        share = f"{100 * self.pairs / self.rows:.1f} %" if self.rows else "0 %"
        rate = f", {self.pairs / self.seconds:,.0f} a second and process" if self.seconds else ""
        size = f"{self.pairs:,} of {self.rows:,} images ({share}), {self.bytes / 1e6:,.1f} MB{rate}"
        return f"{self.finished:,} of {self.tasks:,} tasks; {size}; failed: {self.failed.described()}"

    def table(self) -> str:
        """Reasons and hosts, for people."""
        lines = [self.described()]
        lines += [
            f"  {reason:<24} {count:>12,}  {100 * count / self.rows:5.1f} %"
            for reason, count in self.failed.most_common()
        ]
        if self.hosts:
            lines.append("  most failures: " + ", ".join(f"{host} {count:,}" for host, count in self.hosts))
        return "\n".join(lines)


def summarise(shards: Path, tasks: int, url_column: str = "url") -> Summary:
    """Read the sidecars of SHARDS; ValueError naming one that is broken."""
    rows = pairs = size = finished = 0
    seconds, failed, hosts = 0.0, Tally(), Tally()
    for sidecar in sorted(shards.glob("[0-9]*.parquet")):
        try:
            table = pq.read_table(sidecar, columns=["reason", url_column], partitioning=None)
            counts = json.loads(sidecar.with_suffix(".json").read_text())
            size, seconds = size + counts["bytes"], seconds + counts["seconds"]
        except (OSError, ValueError, KeyError) as error:
            says = " ".join(str(error).split())
            raise ValueError(f"{sidecar} or its .json is broken ({says}): remove both, and fetch again") from error
        lost = table.filter(pc.not_equal(table["reason"], ""))
        failed.update(lost["reason"].to_pylist())
        urls = filter(None, lost[url_column].to_pylist())
        hosts.update(host for url in urls if (host := str(url).partition("://")[2].partition("/")[0]))
        finished += 1
        rows, pairs = rows + table.num_rows, pairs + table.num_rows - lost.num_rows
    return Summary(tasks, finished, rows, pairs, size, seconds, failed, hosts.most_common(5))
