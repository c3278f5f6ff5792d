"""open_clip's own training pipeline over a folder of shards, on the core it is started on; run by the peer's Python.

    PEER/bin/python open_clip_pipeline.py FOLDER --pairs N [--images 4096] [--transform train] [--tokenizer FOLDER]

`get_wds_dataset` as its training calls it: no resampling, batches of 256, all in this process (0 workers). The
transforms are its own: `train` is RandomResizedCrop, bicubic, with its default augmentation; `squash` is the cheapest
that it has, one bilinear resize to the square without a crop. The tokenizer is its SimpleTokenizer, or its HFTokenizer
over a folder. Prints one JSON line.
"""

import argparse
import cProfile
import importlib
import json
import pstats
import sys
import time
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import library as operators

PACKAGES = ("open_clip_torch", "torch", "torchvision", "pillow", "webdataset", "transformers")
BATCH, CROP, WARM_UP = 256, 289, 2  # pairs, pixels, batches


def import_torchvision() -> object | None:
    """Stubs of torchvision's C++ operators where its own do not load, as beside a CPU build of torch, else None.

    The pipeline uses none of them: its images are Pillow's. The stubs go when the library does.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = operators.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        importlib.import_module("torchvision")
        return library
    return None


def loader(folder: Path, pairs: int, transform: str, tokenizer: str | None):
    """Its batches of one epoch."""
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
    from open_clip.transform import image_transform
    from open_clip_train.data import get_wds_dataset

    transforms = {
        "train": {"is_train": True},
        "squash": {"is_train": False, "resize_mode": "squash", "interpolation": "bilinear"},
    }
    last = max(int(path.stem) for path in folder.glob("*.tar"))
    settings = SimpleNamespace(
        train_data=f"{folder}/{{00000..{last:05d}}}.tar", train_num_samples=pairs, train_data_upsampling_factors=None,
        dataset_resampled=False, batch_size=BATCH, workers=0, world_size=1, seed=0,
    )  # fmt: skip
    words = HFTokenizer(tokenizer, context_length=64) if tokenizer else SimpleTokenizer()
    data = get_wds_dataset(settings, image_transform(CROP, **transforms[transform]), is_train=True, tokenizer=words)
    return data.dataloader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=int, required=True, help="in the folder")
    parser.add_argument("--images", type=int, default=4096, help="to measure, after the first two batches")
    parser.add_argument("--transform", choices=("train", "squash"), default="train")
    parser.add_argument("--tokenizer", help="a folder with a BERT tokenizer; else its SimpleTokenizer")
    parser.add_argument("--profile", action="store_true", help="also print where the time goes")
    given = parser.parse_args()
    torch.set_num_threads(1)
    stubs = import_torchvision()
    batches = iter(loader(given.folder, given.pairs, given.transform, given.tokenizer))
    for _ in islice(batches, WARM_UP):
        pass
    profile = cProfile.Profile()
    if given.profile:
        profile.enable()
    clock, cpu, images = time.perf_counter(), time.process_time(), 0
    for pixels, tokens in islice(batches, given.images // BATCH):
        assert pixels.shape == (BATCH, 3, CROP, CROP)
        assert len(tokens) == BATCH
        images += len(pixels)
    seconds, cpu = time.perf_counter() - clock, time.process_time() - cpu
    if given.profile:
        profile.disable()
        pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(25)
    if images < given.images // BATCH * BATCH:
        sys.exit(
            f"{given.folder} gave {images} images after the first {WARM_UP} batches, {given.images} were asked for"
        )
    figures = {"images": images, "seconds": seconds, "cpu_seconds": cpu, "images_per_second": images / seconds}
    print(json.dumps({**figures, "stubbed": stubs is not None, "versions": {name: version(name) for name in PACKAGES}}))


if __name__ == "__main__":
    main()
