"""How many decoding processes the sample run should have: images/s of `align-train train` by data.workers.

    python benchmarks/workers.py [--workers 0 1 2] [--steps 120] [--rounds 3]

Settings take turns, so that a machine that drifts treats them alike; medians over rounds. Needs the sample's shards
(`align-train prepare`) in shards/sample of the folder it runs in.
"""

import argparse
import csv
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path


def measure(workers: int, steps: int) -> tuple[float, float]:
    """Images/s and share of waiting of the later half of a short run."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"max_steps={steps}", f"data.workers={workers}", f"hydra.run.dir={folder}", "data.validation=null"]
        command = [sys.executable, "-m", "align_train", "train", *settings, "exams=none", "export=false"]
        subprocess.run(command, check=True, capture_output=True)
        with (Path(folder) / "metrics.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["images_per_second"]]
    later = rows[len(rows) // 2 :]
    return tuple(
        statistics.median(float(row[name]) for row in later) for name in ("images_per_second", "data_wait_share")
    )


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    seen: dict[int, list[tuple[float, float]]] = {workers: [] for workers in options.workers}
    for number in range(options.rounds):
        for workers, found in seen.items():
            found.append(measure(workers, options.steps))
            print(f"round {number + 1}, workers {workers}: {found[-1][0]:.0f} images/s", file=sys.stderr)
    print(f"{date.today()}, {platform.machine()}, {options.rounds} rounds of {options.steps} steps\n")
    print("| workers | images/s (median, min to max) | waiting for data |\n|---|---|---|")
    for workers, found in seen.items():
        speeds, waits = zip(*found, strict=True)
        spread = f"{statistics.median(speeds):.0f} ({min(speeds):.0f} to {max(speeds):.0f})"
        print(f"| {workers} | {spread} | {100 * statistics.median(waits):.0f} % |")


if __name__ == "__main__":
    main()
