"""Metrics of the sizes that exams have: seconds and peak extra memory, retrieval beside its naive version.

    python benchmarks/evaluation/metrics.py [--device cuda] [--rounds 3] [--bank 1000000]

Cases take turns, each in a fresh process after a warm-up; what is printed is medians over the rounds. Peak extra memory
is what the metric takes beyond its inputs: on a CPU the highest resident memory less that before (Linux), on a GPU what
the allocator says. The neighbours' bank alone is 2.6 GB. On a machine with other work only the CPU time says something.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from align_train import metrics

IMAGES, CAPTIONS, WIDTH, BAR = 5_000, 25_000, 640, 2.0  # COCO 5K


def unit(rows: int, device: str, seed: int) -> Tensor:
    random = torch.Generator(device).manual_seed(seed)
    made = torch.empty(rows, WIDTH, device=device)
    for part in made.split(65_536):
        part.normal_(generator=random).div_(part.norm(dim=1, keepdim=True))
    return made


def integers(count: int, below: int, device: str) -> Tensor:
    return torch.randint(below, (count,), device=device, generator=torch.Generator(device).manual_seed(9))


def naive_recall(image: Tensor, text: Tensor, image_of_text: Tensor) -> None:
    """R@1, 5 and 10 both ways from the full matrix."""
    score = image @ text.T
    index = torch.arange(len(image), device=image.device)
    found = image_of_text[score.topk(10, dim=1).indices] == index[:, None]
    wanted = score.T.topk(10, dim=1).indices == image_of_text[:, None]
    for k in (1, 5, 10):
        found[:, :k].any(1).double().mean().item()
        wanted[:, :k].any(1).double().mean().item()


def prepare(case: str, size: float, bank: int, device: str) -> Callable[[], object]:
    """The case's work on inputs of `size` times its rows."""
    images, captions, queries, rows = (int(count * size) for count in (IMAGES, CAPTIONS, 2000, bank))
    hits, labels = integers(2 * captions, 2, device), integers(2 * captions, 1000, device)
    of_image = torch.arange(captions, device=device) // 5
    match case:
        case "retrieval" | "retrieval, naive":
            work = metrics.retrieval_recall if case == "retrieval" else naive_recall
            given = unit(images, device, 0), unit(captions, device, 1), of_image
        case "zero-shot":
            work = metrics.classification_ranks
            given = unit(2 * captions, device, 2), unit(1000, device, 3), labels
        case "neighbours":
            work = metrics.neighbour_ranks
            some = integers(queries, 1000, device), integers(rows, 1000, device)
            given = unit(queries, device, 2), unit(rows, device, 3), *some
        case "uniformity":
            work, given = metrics.uniformity, (unit(captions, device, 1),)
        case "interval of a mean":
            work, given = metrics.mean_interval, (hits,)
        case "interval of a mean of classes":
            work, given = metrics.class_mean_interval, (hits, labels)
        case "interval of a median":
            work, given = metrics.median_interval, (integers(captions, IMAGES, device), of_image)
    return partial(work, *given)


def resident(name: str) -> int:
    """Bytes now (VmRSS) or at most (VmHWM); unlike ru_maxrss, the latter knows nothing of the process that forked."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def wait_and_memory(device: str, highest: bool) -> int:
    """Bytes in use, now or at most, after all that was asked of the device."""
    if device == "cpu":
        return resident("VmHWM" if highest else "VmRSS")
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() if highest else torch.cuda.memory_allocated()


def measure(case: str, device: str, bank: int) -> tuple[float, float, int]:
    """Seconds, CPU seconds and peak extra bytes of a case in this process, a fresh one."""
    prepare(case, 0.02, bank, device)()
    task = prepare(case, 1, bank, device)
    before = wait_and_memory(device, highest=False)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    clock, cpu = time.perf_counter(), time.process_time()
    task()
    extra = wait_and_memory(device, highest=True) - before
    return time.perf_counter() - clock, time.process_time() - cpu, extra


def measured(case: str, device: str, bank: int) -> tuple[float, float, int]:
    """`measure` in a fresh process."""
    # This file is called metrics, as is the package's: it is imported from its own folder under its own name.
    code = f"import json, metrics; print(json.dumps(metrics.measure({case!r}, {device!r}, {bank})))"
    found = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, cwd=Path(__file__).parent)
    return tuple(json.loads(found.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bank", type=int, default=1_000_000, help="training embeddings of the neighbours")
    given = parser.parse_args()
    told = {
        "retrieval": f"{IMAGES:,} x {CAPTIONS:,}",
        "retrieval, naive": f"{IMAGES:,} x {CAPTIONS:,}",
        "zero-shot": f"{2 * CAPTIONS:,} x 1,000",
        "neighbours": f"2,000 x {given.bank:,}",
        "uniformity": f"{CAPTIONS:,} x {CAPTIONS:,} / 2",
        "interval of a mean": f"{2 * CAPTIONS:,}",
        "interval of a mean of classes": f"{2 * CAPTIONS:,}",
        "interval of a median": f"{CAPTIONS:,} of {IMAGES:,} groups",
    }
    found = [{case: measured(case, given.device, given.bank) for case in told} for _ in range(given.rounds)]
    print(f"\nD = {WIDTH}, float32, {given.device}, {torch.get_num_threads()} threads, {given.rounds} rounds\n")
    print("| metric | size | seconds | CPU seconds | extra memory, MiB | verdict |\n|---|---|---|---|---|---|")
    for case, size in told.items():
        wall, cpu, extra = (statistics.median(one[case][i] for one in found) for i in range(3))
        verdict = f"{BAR:g} s {'reached' if wall < BAR else 'NOT reached'}" if case == "retrieval" else ""
        print(f"| {case} | {size} | {wall:.3g} | {cpu:.3g} | {extra / 2**20:,.0f} | {verdict} |")
    ratio = statistics.median(one["retrieval"][0] / one["retrieval, naive"][0] for one in found)
    print(f"\nretrieval takes {ratio:.2f} of the naive version's time")


if __name__ == "__main__":
    main()
