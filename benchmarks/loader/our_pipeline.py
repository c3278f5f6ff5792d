"""Our batches over a folder of shards, on the core it is started on; and decoding alone, as the limit.

    python benchmarks/loader/our_pipeline.py FOLDER [--images 4096] [--what batches]

`batches`: as training reads them, all in this process. `scaled`: the same, and pixels scaled to floats here, as
open_clip's are (training does it on the device). `decoding`: simplejpeg's decode_jpeg of the same files, read into
memory before. Prints one JSON line.
"""

import argparse
import json
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import simplejpeg
import torch
from synthetic_shards import images_in

from align_train.batch import Batch
from align_train.data import (
    Augmentation,
    BatchPlans,
    Loader,
    Opener,
    Order,
    OrderSettings,
    PairReader,
    Reading,
    read_sources,
)
from align_train.records import Preprocessing

PACKAGES = ("torch", "simplejpeg", "opencv-python-headless", "transformers", "tokenizers")
BATCH, WARM_UP = 256, 2  # pairs, batches


def batches(folder: Path, batch_size: int = BATCH, workers: int = 0, use: str = "processes") -> Iterator[Batch]:
    """Training batches without end, at the paper's sizes and with its augmentation."""
    reading = Reading(use=use)
    sources = read_sources({"pairs": {"shards": str(folder)}}, reading.cache)
    plans = BatchPlans(Order(sources, OrderSettings(), Opener(sources)), batch_size, 0, 10**9)
    reader = PairReader(sources, Preprocessing(resize=346, crop=289), Augmentation())
    return iter(Loader(reader, plans, workers, reading))


def decoded(folder: Path, images: int) -> Iterator[int]:
    """One for each image decoded."""
    for content in images_in(folder, images + WARM_UP * BATCH):
        simplejpeg.decode_jpeg(content)
        yield 1


def _lengths(what: str, folder: Path, images: int) -> Iterator[int]:
    if what == "decoding":
        yield from decoded(folder, images)
        return
    for batch in batches(folder):
        if what == "scaled":
            batch.pixels.float().div_(127.5).sub_(1)
        yield len(batch)


def measured(what: str, folder: Path, images: int) -> dict[str, float]:
    """Images, seconds, CPU seconds of this process, and images a second, after two batches."""
    lengths = _lengths(what, folder, images)
    warm = 0
    while warm < WARM_UP * BATCH:
        warm += next(lengths)
    clock, cpu, seen = time.perf_counter(), time.process_time(), 0
    while seen < images:
        seen += next(lengths)
    seconds, cpu = time.perf_counter() - clock, time.process_time() - cpu
    return {"images": seen, "seconds": seconds, "cpu_seconds": cpu, "images_per_second": seen / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=4096, help="to measure, after the first two batches")
    parser.add_argument("--what", choices=("batches", "scaled", "decoding"), default="batches")
    given = parser.parse_args()
    torch.set_num_threads(1)
    figures = measured(given.what, given.folder, given.images)
    print(json.dumps({**figures, "versions": {name: version(name) for name in PACKAGES}}))


if __name__ == "__main__":
    main()
