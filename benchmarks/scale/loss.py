"""The chunked loss against the plain one: time and peak extra memory of forward and backward, in one run.

    python benchmarks/scale/loss.py [--device cuda] [--rounds 3] [--chunks 1024] [--large]

Cases take turns, each in a fresh process after a warm-up; what is printed is medians over the rounds, and of ratios
within a round. Peak extra memory is what the loss takes beyond its inputs, gradients included: on a CPU the highest
resident memory less that before (Linux), on a GPU what the allocator says. --large adds the chunked loss at 65,536
rows, once; on a CPU that takes minutes. On a machine with other work only the CPU time says something.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from align_train.losses import contrastive_loss

ROWS, LARGE, WIDTH = 16_384, 65_536, 640
MEMORY_BAR, TIME_BAR, LARGE_BAR = 0.1, 1.5, 2**30


def inputs(rows: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator(device).manual_seed(0)
    image, text = (normalize(torch.randn(rows, WIDTH, device=device, generator=random)) for _ in range(2))
    return image.requires_grad_(), text.requires_grad_(), torch.tensor(0.07, device=device, requires_grad=True)


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


def measure(chunk: int | None, rows: int, device: str) -> tuple[float, float, int]:
    """Seconds, CPU seconds and peak extra bytes of one forward and backward in this process, a fresh one."""
    # On a GPU the first call of a size also asks the driver for the memory; on a CPU every call does.
    contrastive_loss(*inputs(rows if device == "cuda" else 256, device), chunk_size=chunk).backward()
    leaves = inputs(rows, device)
    before = wait_and_memory(device, highest=False)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    clock, cpu = time.perf_counter(), time.process_time()
    contrastive_loss(*leaves, chunk_size=chunk).backward()
    extra = wait_and_memory(device, highest=True) - before
    return time.perf_counter() - clock, time.process_time() - cpu, extra


def measured(chunk: int | None, rows: int, device: str) -> tuple[float, float, int]:
    """`measure` in a fresh process."""
    case = f"import json, loss; print(json.dumps(loss.measure({chunk}, {rows}, {device!r})))"
    found = subprocess.run([sys.executable, "-c", case], check=True, stdout=subprocess.PIPE, cwd=Path(__file__).parent)
    return tuple(json.loads(found.stdout))


def verdict(value: float, bar: float) -> str:
    return "reached" if value <= bar else "NOT reached"


def compare(device: str, chunks: list[int], rounds: int) -> None:
    cases: list[int | None] = [None, *chunks]
    found = [{chunk: measured(chunk, ROWS, device) for chunk in cases} for _ in range(rounds)]
    print(f"\n{ROWS:,} x {WIDTH}, float32, forward and backward, {device}, {rounds} rounds\n")
    print("| loss | seconds | of plain's | CPU seconds | of plain's | extra memory, MiB | of plain's | verdict |")
    print("|---|---|---|---|---|---|---|---|")
    for chunk in cases:
        wall, cpu, extra = (statistics.median(one[chunk][i] for one in found) for i in range(3))
        ratios = [statistics.median(one[chunk][i] / one[None][i] for one in found) for i in range(3)]
        name, judged = "plain", ""
        if chunk is not None:
            name = f"chunks of {chunk:,}"
            judged = f"time {verdict(ratios[0], TIME_BAR)}, memory {verdict(ratios[2], MEMORY_BAR)}"
        print(
            f"| {name} | {wall:.3g} | {ratios[0]:.2f} | {cpu:.3g} | {ratios[1]:.2f} | {extra / 2**20:,.0f} "
            f"| {ratios[2]:.3f} | {judged} |",
            flush=True,
        )


def large(device: str, chunk: int) -> None:
    wall, cpu, extra = measured(chunk, LARGE, device)
    fits = f"{extra / 2**20:,.0f} MiB extra, 1 GiB {verdict(extra, LARGE_BAR)}"
    print(f"\n{LARGE:,} x {WIDTH}, chunks of {chunk:,}: {fits}; {wall:.3g} s, {cpu:.3g} CPU seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chunks", type=int, nargs="+", default=[1024])
    parser.add_argument("--large", action="store_true", help="also 65,536 rows, with the first of --chunks")
    given = parser.parse_args()
    compare(given.device, given.chunks, given.rounds)
    if given.large:
        large(given.device, given.chunks[0])


if __name__ == "__main__":
    main()
