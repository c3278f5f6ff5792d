"""The cached step over micro-batches against as many plain steps of one micro-batch each: time and memory.

    python benchmarks/scale/cached.py [--device cpu|cuda] [--model align_b3_mini] [--micro 16] [--parts 8] [--rounds 3]
        [--precision bf16|float32]

A step: uint8 pixels and token ids in host memory, `encode`, loss, backward, LAMB. The cached step compares all pairs
with each other and updates the weights once. Both sides take turns in every round, each in a fresh process after a
short step to warm up; what is printed is medians over the rounds, and of ratios within a round. Memory is the highest
that was in use (on a CPU the process's, Linux), and what of it the steps took beyond what was there before the first:
the model, and on a CPU the pixels of all pairs that wait for their turn, which are listed apart. On a machine with
other work only the CPU time with --threads 1 says something.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import GROUP, PIXELS, apart, batch_of, machine, model_of, peak, resident
from torch import Tensor

from align_train.batch import Batch, StepBatch
from align_train.engine import Contrastive
from align_train.engine.encoding import encode
from align_train.engine.host_memory import keep_freed_memory
from align_train.optim import lamb

PLAIN, CACHED = "plain steps", "one cached step"
TIME_BAR, MEMORY_BAR = 1.4, 1.1


def part_of(number: int, size: int, device: str) -> Batch:
    """Micro-batch `number`, in memory from which a GPU copies fast."""
    pixels, ids, mask = batch_of(size, seed=number)
    longest = int(mask.sum(1).max())
    keys = tuple(f"{number}-{row}" for row in range(size))
    identities = torch.arange(size)[:, None].repeat(1, 2) + number * size
    part = Batch(pixels, ids[:, :longest], mask[:, :longest], keys, mask.sum(1), identities)
    return part.pin_memory() if device == "cuda" else part


def step_of(given: dict) -> Callable[[StepBatch], Tensor]:
    """A training step on a model with fresh weights; it returns the loss."""
    device = given["device"]
    model = model_of(given["model"]).to(device).train()
    model.text_chunks = given["chunks"]
    optimizer, objective = lamb(model, 1e-3), Contrastive()
    entropy = [0, 0]

    def step(batch: StepBatch) -> Tensor:
        entropy[1] += 1
        with torch.autocast(device, torch.bfloat16, enabled=given["precision"] == "bf16"):
            image, text = encode(model, batch, entropy)
            loss = objective(image, text, model.temperature, batch.identities.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return step


def measure(side: str, given: dict) -> dict:
    """Seconds and CPU seconds for all pairs, and bytes, in this process, a fresh one."""
    device = given["device"]
    if given["threads"]:
        torch.set_num_threads(given["threads"])
    keep_freed_memory()
    step = step_of(given)
    parts = [part_of(number, given["micro"], device) for number in range(given["parts"])]
    batches = [StepBatch(parts)] if side == CACHED else [StepBatch([part]) for part in parts]
    before = in_use(device)
    step(StepBatch(parts[:2]) if side == CACHED else batches[0])
    wall, cpu = [], []
    for _ in range(given["steps"]):
        clock, busy = time.perf_counter(), time.process_time()
        for batch in batches:
            assert step(batch).isfinite()  # waits for the device, as a loop that prints its loss
        if device == "cuda":
            torch.cuda.synchronize()
        wall.append(time.perf_counter() - clock)
        cpu.append(time.process_time() - busy)
    top = peak(device)
    seconds = {"wall": statistics.median(wall), "cpu": statistics.median(cpu)}
    return {**seconds, "peak": top, "extra": top - before}


def in_use(device: str) -> int:
    """Bytes now; from here on `peak` is of what comes."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    return resident("VmRSS")


def compare(given: dict) -> None:
    rounds = [
        {side: apart("cached", "measure", side, given) for side in (PLAIN, CACHED)} for _ in range(given["rounds"])
    ]
    unit = "cpu" if given["device"] == "cpu" and given["threads"] == 1 else "wall"
    print(
        "| for all pairs | seconds | CPU seconds | times plain | peak, MiB | times plain | extra, MiB | times plain |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for side in (PLAIN, CACHED):
        wall, cpu, top, extra = (
            statistics.median(r[side][key] for r in rounds) for key in ("wall", "cpu", "peak", "extra")
        )
        slower, more, beyond = (
            statistics.median(r[side][key] / r[PLAIN][key] for r in rounds) for key in (unit, "peak", "extra")
        )
        name = f"{given['parts']} {side}" if side == PLAIN else side
        print(
            f"| {name} | {wall:.3g} | {cpu:.3g} | {slower:.2f} | {top / 2**20:,.0f} | {more:.2f} "
            f"| {extra / 2**20:,.0f} | {beyond:.2f} |"
        )
    print(f"\ntime at most {TIME_BAR}: {verdict(slower, TIME_BAR)}; extra memory at most {MEMORY_BAR}: ", end="")
    print(verdict(beyond, MEMORY_BAR))


def verdict(value: float, bar: float) -> str:
    return "reached" if value <= bar else "NOT reached"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", default="align_b3_mini")
    parser.add_argument("--micro", type=int, default=16, help="pairs in a micro-batch, a multiple of 16")
    parser.add_argument("--parts", type=int, default=8, help="micro-batches")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1, help="times that all pairs are timed in a process")
    parser.add_argument("--precision", choices=["bf16", "float32"], default="bf16")
    parser.add_argument("--chunks", type=int, default=4, help="length-sorted parts of a micro-batch's captions")
    parser.add_argument("--threads", type=int, default=0, help="of torch on the CPU; 0 leaves its default")
    given = vars(parser.parse_args())
    if given["micro"] % GROUP:
        parser.error(f"--micro is {given['micro']}; give a multiple of {GROUP}, the virtual batch")
    waiting = 3 * PIXELS**2 * given["micro"] * given["parts"] / 2**20
    print(
        f"{given['model']}, {given['parts']} micro-batches of {given['micro']}, {given['precision']}, "
        f"{machine(given['device'])}, torch {torch.__version__}, {given['rounds']} rounds; "
        f"pixels of all pairs in host memory: {waiting:.0f} MiB, on both sides\n"
    )
    compare(given)


if __name__ == "__main__":
    main()
