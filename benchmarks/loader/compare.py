"""Training batches on one core, against open_clip's own pipeline in its own environment and against bare decoding.

    python benchmarks/loader/compare.py WORK [--shards FOLDER] [--peer-python PYTHON] [--rounds 5] [--images 8192]

WORK is a folder for the shards (made if FOLDER is absent: 10,000 pairs, 384 pixels), the peer's environment and its
tokenizer. pip installs torch for the peer from the index it is set to: PyTorch's CPU index saves gigabytes.
All take turns in every round, each in a fresh process on one core with one thread; what is printed is medians over the
rounds, and of ratios within a round. Importing, opening and the first two batches are not counted. Measure nearly all
of the folder's pairs: until open_clip's shuffle buffer holds 5,000 it reads two pairs for each that it gives, which
takes 2 or 3 % of its time. On a machine with other work only the CPU time says something. Needs Linux.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path

from synthetic_shards import make_shards, pairs_in

from align_train.data.tokens import load_tokenizer

# open_clip 3.3.0 asks for webdataset <= 0.2.86 and breaks with 1.0
PEER = [
    "torch==2.13.0", "webdataset==0.2.86", "transformers==5.23.0", "huggingface_hub", "safetensors", "pandas",
    "pillow", "ftfy", "regex", "tqdm", "pyyaml", "numpy",
]  # fmt: skip
PEER_BARE = ["open_clip_torch==3.3.0", "torchvision==0.29.2", "timm==1.0.31"]  # would bring CUDA with them
HERE = Path(__file__).parent
DECODING, THEIRS, OURS = "libjpeg-turbo decoding alone", "open_clip", "align_train"
ONE_THREAD = dict.fromkeys(
    ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS", "OPENCV_FOR_THREADS_NUM", "HF_HUB_OFFLINE"], "1"
)

Figures = dict[str, list[dict]]


def peer_python(work: Path) -> Path:
    """The Python of the peer's environment, installed if it is not there."""
    python = work / "peer" / "bin" / "python"
    if not python.is_file():
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([sys.executable, "-m", "venv", str(work / "peer")], check=True)
        subprocess.run([*pip, *PEER], check=True)
        subprocess.run([*pip, "--no-deps", *PEER_BARE], check=True)
    return python


def commands(work: Path, shards: Path, peer: Path, images: int) -> dict[str, list[str]]:
    """What takes turns, by its name in the table."""
    tokenizer = work / "tokenizer"
    load_tokenizer().save_pretrained(tokenizer)
    count = ["--images", str(images)]
    theirs = [str(peer), str(HERE / "open_clip_pipeline.py"), str(shards), "--pairs", str(pairs_in(shards)), *count]
    ours = [sys.executable, str(HERE / "our_pipeline.py"), str(shards), *count, "--what"]
    squash = [*theirs, "--transform", "squash"]
    return {
        DECODING: [*ours, "decoding"],
        THEIRS: theirs,
        "open_clip, one bilinear resize without a crop": squash,
        "the same with our vocabulary in its HFTokenizer": [*squash, "--tokenizer", str(tokenizer)],
        OURS: [*ours, "batches"],
        "align_train, pixels made floats as open_clip's are": [*ours, "scaled"],
    }


def measured(command: list[str], core: int) -> dict:
    """The figures that a command prints."""
    pinned = ["taskset", "-c", str(core), *command]
    done = subprocess.run(pinned, capture_output=True, text=True, check=False, env={**os.environ, **ONE_THREAD})
    if done.returncode:
        sys.exit(f"{shlex.join(pinned)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def ratios(figures: Figures, mine: str, theirs: str, of: str) -> float:
    """Median over rounds of one figure by another."""
    pairs = zip(figures[mine], figures[theirs], strict=True)
    return statistics.median(mine[of] / theirs[of] for mine, theirs in pairs)


def table(figures: Figures) -> str:
    """Markdown."""
    lines = [
        "| | images/s, median (min to max) | CPU us an image, median (least) "
        "| times open_clip | by CPU time | share of decoding |",
        "|---|---|---|---|---|---|",
    ]
    for name, rounds in figures.items():
        rates = [figure["images_per_second"] for figure in rounds]
        costs = [1e6 * figure["cpu_seconds"] / figure["images"] for figure in rounds]
        cost = f"{statistics.median(costs):.0f} ({min(costs):.0f})"
        faster = ratios(figures, name, THEIRS, "images_per_second")
        cheaper = 1 / ratios(figures, name, THEIRS, "cpu_seconds")
        share = 100 * ratios(figures, name, DECODING, "images_per_second")
        spread = f"{statistics.median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f})"
        lines.append(f"| {name} | {spread} | {cost} | {faster:.2f} | {cheaper:.2f} | {share:.0f} % |")
    return "\n".join(lines)


def machine() -> str:
    """The processor's name, and how many."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def versions(figure: dict) -> str:
    return ", ".join(f"{name} {version}" for name, version in figure["versions"].items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--shards", type=Path, help="a folder of 00000.tar and so on; made if it is not there")
    parser.add_argument("--peer-python", type=Path, help="of an environment that has open_clip; installed if not given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=8192, help="in each turn")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)))
    given = parser.parse_args()
    work = given.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    shards = (given.shards or work / "shards").absolute()
    if not shards.is_dir():
        make_shards(shards)
    load = os.getloadavg()[0]
    turns = commands(work, shards, given.peer_python or peer_python(work), given.images)
    figures: Figures = {name: [] for name in turns}
    for number in range(given.rounds):
        for name, command in turns.items():
            figures[name].append(measured(command, given.core))
            print(
                f"round {number + 1}: {figures[name][-1]['images_per_second']:6.0f} images/s, {name}", file=sys.stderr
            )
    theirs = figures[THEIRS][0]
    print(f"{date.today()}, {machine()}, load before {load:.1f}: `python {shlex.join(sys.argv)}`\n")
    print(f"{given.rounds} rounds of {theirs['images']} images on one core.")
    print(f"open_clip: {versions(theirs)}; 0 workers. align_train: {versions(figures[OURS][0])}.")
    if theirs["stubbed"]:
        print("torchvision's C++ operators do not load beside this CPU build of torch and were stubbed; none is used.")
    print(f"\n{table(figures)}")


if __name__ == "__main__":
    main()
