"""What it costs that the ranks agree at each step's end on whether to stop, to save, or to go back.

    python benchmarks/scale/agreement.py [--ranks 2] [--steps 20] [--model align_b3_mini] [--micro 16]

Trains for real: `align-train train` on drawn pairs in so many gloo ranks on this machine (those on a GPU take NCCL:
`--accelerator gpu`). The time is that spent in `Agreement`'s hooks of each step (a tensor of three numbers, its
all-reduce in the background, and the wait for its result), as a share of the whole step; the median over the steps, on
the first rank. Apart from that, as many exchanges of the same size on idle ranks, and what Lightning 2.6 does at each
step by itself, which `Agreement` takes out: a broadcast that the process waits for.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

BAR = 0.001  # of a step


def timed(function: Any, spent: list[float]) -> Any:
    """The function, whose time is added to what the step has spent."""

    def call(*given: Any, **named: Any) -> Any:
        begun = time.perf_counter()
        try:
            return function(*given, **named)
        finally:
            spent[-1] += time.perf_counter() - begun

    return call


def train(words: list[str], result: Path) -> None:
    """One rank: train, and write what the steps and the agreement took."""
    import torch
    from hydra import compose, initialize_config_dir

    from align_train.cli.fitting import fit
    from align_train.cli.models import build_model
    from align_train.distributed import Ballot, rank
    from align_train.engine import Agreement, Heartbeat
    from align_train.shipped import config_folder

    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose("train", words)
    spent, ends = [0.0], list[float]()
    for name in ("on_before_backward", "on_train_batch_end"):
        setattr(Agreement, name, timed(getattr(Agreement, name), spent))
    beat = Heartbeat.on_train_batch_end

    def step_ends(*given: Any) -> None:
        beat(*given)
        ends.append(time.perf_counter())
        spent.append(0.0)  # Agreement comes after this: its wait counts for the next step

    Heartbeat.on_train_batch_end = step_ends
    fitted = fit(config, build_model(config.model), None)
    device = fitted.trainer.strategy.root_device
    alone = {"ballot": [], "broadcast": []}
    flag = torch.zeros(1, device=device)
    for _ in range(200):
        begun = time.perf_counter()
        Ballot(torch.zeros(3, device=device)).result()
        alone["ballot"].append(time.perf_counter() - begun)
        begun = time.perf_counter()
        torch.distributed.broadcast(torch.zeros(1, device=device), src=0)
        flag.item()
        alone["broadcast"].append(time.perf_counter() - begun)
    steps = [after - before for before, after in pairwise(ends[2:])]
    shares = [took / step for took, step in zip(spent[3:], steps, strict=False)]
    if rank() == 0:
        facts = {"step": statistics.median(steps), "spent": statistics.median(spent[3 : len(steps) + 3])}
        facts |= {"share": statistics.median(shares)} | {name: statistics.median(all_) for name, all_ in alone.items()}
        result.write_text(json.dumps(facts))


def main() -> None:
    """Start the ranks, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--model", default="align_b3_mini")
    parser.add_argument("--micro", type=int, default=16)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    arguments, words = parser.parse_known_args()
    if arguments.rank:
        train(words, Path(arguments.rank))
        return
    with tempfile.TemporaryDirectory() as folder:
        shards(Path(folder), arguments.micro * arguments.ranks)
        given = [
            "data=shards", f"model={arguments.model}", f"data.train.pairs.shards={folder}/*.tar", "data.workers=0",
            f"data.batch_size={arguments.micro * arguments.ranks}", f"max_steps={arguments.steps}",
            f"folder={folder}/run", f"trainer.devices={arguments.ranks}",
            f"trainer.accelerator={arguments.accelerator}",
            "schedule.warmup_steps=1", "checkpoint_every=100000", "trainer.log_every_n_steps=1000", "seed=1",
        ]  # fmt: skip
        result = Path(folder) / "result.json"
        port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29561", "OMP_NUM_THREADS": "1", "NODE_RANK": "0"}
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, "--rank", str(result), *given],
                env={**os.environ, **port, "LOCAL_RANK": str(number), "WORLD_SIZE": str(arguments.ranks)},
                stdout=subprocess.DEVNULL,
            )
            for number in range(arguments.ranks)
        ]
        statuses = [each.wait() for each in ranks]
        if any(statuses):
            sys.exit("a rank has failed")
        facts = json.loads(result.read_text())
    print("| ranks | model, pairs a rank | step | in agreeing | share | exchange alone | Lightning's broadcast alone |")
    print("|---|---|---|---|---|---|---|")
    print(
        f"| {arguments.ranks} | {arguments.model}, {arguments.micro} | {facts['step']:.3f} s "
        f"| {1e6 * facts['spent']:.0f} us | {facts['share']:.3%} (bar {BAR:.1%}) | {1e6 * facts['ballot']:.0f} us "
        f"| {1e6 * facts['broadcast']:.0f} us |"
    )


def shards(folder: Path, count: int) -> None:
    """Drawn pairs, of COYO's size."""
    import io

    import numpy as np
    from PIL import Image

    from align_train.corpus.shards import write_shards
    from align_train.records import Pair

    def pair(number: int) -> Pair:
        content = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((346, 346)).save(content, "JPEG")
        return Pair(f"{number}", content.getvalue(), f"a caption with the number {number} and some more words", {})

    write_shards((pair(number) for number in range(4 * count)), folder, "", count)


if __name__ == "__main__":
    main()
