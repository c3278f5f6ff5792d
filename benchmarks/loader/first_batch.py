"""Seconds from a list of shards to the first batch, each time in a fresh process, with the sidecars and without.

    python benchmarks/loader/first_batch.py WORK [--shards 10000] [--pairs 100] [--rounds 3]

WORK gets two folders of hard links to one shard of `--pairs` pairs: as many names as shards, but one tar to write. The
file's bytes lie in memory, as they do where another rank has read them; on a cold network drive opening costs more.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

from synthetic_shards import make_shards
from tqdm import tqdm

BATCH = 256  # pairs


def make_links(one: Path, folder: Path, count: int, endings: tuple[str, ...]) -> None:
    """`count` names of the files of one shard."""
    folder.mkdir()
    for number in tqdm(range(count), desc=folder.name, unit="shard"):
        for ending in endings:
            os.link(one / f"00000.{ending}", folder / f"{number:05d}.{ending}")


def first_batch(folder: Path, workers: int) -> dict[str, float]:
    """Seconds to a batch without imports and with them, in this process, which must have imported nothing of ours."""
    clock = time.perf_counter()
    from our_pipeline import batches

    imported = time.perf_counter()
    batch = next(batches(folder, BATCH, workers))
    assert len(batch) == BATCH
    done = time.perf_counter()
    return {"without": done - imported, "with": done - clock}


def measured(folder: Path, workers: int) -> dict[str, float]:
    """The figures of a fresh process."""
    command = [sys.executable, __file__, str(folder), "--measure", "--workers", str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--pairs", type=int, default=100, help="in each shard, at most 1,000")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument(
        "--measure", action="store_true", help="measure WORK, a folder of shards, once, in this process"
    )
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(first_batch(given.work, given.workers)))
        return
    work = given.work.absolute()
    one = work / f"one_{given.pairs}"
    if not one.is_dir():
        make_shards(one, given.pairs)
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, load before {os.getloadavg()[0]:.1f}")
    print(
        f"{given.shards} shards of {given.pairs} pairs, batch {BATCH}, {given.workers} workers, {given.rounds} rounds\n"
    )
    print("| | seconds to the first batch, median (min to max) | with imports |\n|---|---|---|")
    for name, endings in {"with sidecars": ("tar", "parquet", "json"), "without sidecars": ("tar",)}.items():
        folder = work / f"{name.replace(' ', '_')}_{given.shards}_of_{given.pairs}"
        if not folder.is_dir():
            make_links(one, folder, given.shards, endings)
        rounds = [measured(folder, given.workers) for _ in range(given.rounds)]
        seconds = [figures["without"] for figures in rounds]
        spread = f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
        print(f"| {name} | {spread} | {statistics.median(figures['with'] for figures in rounds):.2f} |", flush=True)


if __name__ == "__main__":
    main()
