"""Threads or processes as workers: images/s of training batches, by how many there are.

    python benchmarks/loader/workers.py FOLDER [--workers 1 2] [--images 4096] [--rounds 3]

FOLDER has shards (benchmarks/loader/synthetic_shards.py makes them). Each measurement is a fresh process on all cores;
settings take turns, medians over rounds. The consumer only counts; in training it is busy, and threads share its
interpreter.
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


def speed(folder: Path, workers: int, use: str, images: int) -> float:
    """Images a second after the first two batches of each worker; in this process."""
    import torch
    from our_pipeline import BATCH, batches

    torch.set_num_threads(1)
    found = batches(folder, workers=workers, use=use)
    for _ in range(2 * max(workers, 1)):
        next(found)
    clock, seen = time.perf_counter(), 0
    while seen < images:
        next(found)
        seen += BATCH
    return seen / (time.perf_counter() - clock)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(speed(given.folder, given.workers[0], given.measure, given.images)))
        return
    settings = [("threads", 0), *((use, number) for number in given.workers for use in ("threads", "processes"))]
    found: dict[tuple[str, int], list[float]] = {setting: [] for setting in settings}
    for number in range(given.rounds):
        for (use, workers), speeds in found.items():
            options = ["--workers", str(workers), "--images", str(given.images), "--measure", use]
            command = [sys.executable, __file__, str(given.folder), *options]
            speeds.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
            print(f"round {number + 1}, {workers} {use}: {speeds[-1]:.0f} images/s", file=sys.stderr)
    rounds = f"{given.rounds} rounds of {given.images} images"
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, {rounds}\n")
    print("| workers | images/s, median (min to max) |\n|---|---|")
    for (use, workers), speeds in found.items():
        name = f"{workers} {use}" if workers else "none: read as asked for"
        print(f"| {name} | {statistics.median(speeds):.0f} ({min(speeds):.0f} to {max(speeds):.0f}) |")


if __name__ == "__main__":
    main()
