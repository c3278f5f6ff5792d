"""Resident memory of the loader alone after each of five epochs over a folder of shards.

    python benchmarks/loader/memory.py FOLDER [--workers 2] [--epochs 5] [--batch 256]

RSS is the sum over the process and its workers, and counts a page once for each of them. Own memory is the PSS of what
is no file: pages that the workers share are shared out among them, and libraries, whose share depends on what else the
machine runs, are left out. Needs Linux.
"""

import argparse
import os
import platform
from collections.abc import Iterable
from datetime import date
from multiprocessing import active_children
from pathlib import Path

from our_pipeline import batches
from synthetic_shards import pairs_in


def resident(processes: Iterable[int]) -> tuple[float, float]:
    """RSS and own memory of processes together, in MB."""
    rss = own = 0
    for process in processes:
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]:
            name, size, _ = line.split()
            rss += int(size) if name == "Rss:" else 0
            own += int(size) if name in ("Pss_Anon:", "Pss_Shmem:") else 0
    return rss / 1024, own / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=256)
    given = parser.parse_args()
    steps = pairs_in(given.folder) // given.batch
    if not steps:
        parser.error(f"{given.folder} holds less than one batch of {given.batch} pairs")
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, load before {os.getloadavg()[0]:.1f}")
    print(f"{given.workers} workers, batches of {given.batch}, {steps} an epoch\n")
    print("| epoch | RSS, MB | since epoch 1 | own memory, MB | since epoch 1 |\n|---|---|---|---|---|")
    stream = batches(given.folder, given.batch, given.workers)
    first: tuple[float, float] = (0, 0)
    for epoch in range(1, given.epochs + 1):
        for _ in range(steps):
            next(stream)
        rss, own = resident([os.getpid(), *(child.pid for child in active_children())])
        first = first if epoch > 1 else (rss, own)
        grown = [f"{100 * (now / then - 1):+.1f} %" for now, then in zip((rss, own), first, strict=True)]
        print(f"| {epoch} | {rss:.0f} | {grown[0]} | {own:.0f} | {grown[1]} |", flush=True)


if __name__ == "__main__":
    main()
