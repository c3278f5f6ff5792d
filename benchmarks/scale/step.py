"""The whole training step against stock transformers' AlignModel(return_loss=True) in a plain loop.

    python benchmarks/scale/step.py [--device cpu|cuda] [--model align_b3_mini] [--batch 32] [--rounds 3] [--compile]
        [--largest]

A step: pixels and token ids from host memory in, forward, loss, backward, optimizer; at 289 pixels. The stock model has
what its processor makes (contiguous float32 pixels, captions padded to 64) and torch's fused AdamW. Ours gets what our
loader makes (uint8, captions as long as the longest), encodes captions in length-sorted chunks, and has LAMB.
Captions are as long as COYO's: log-normal with a mean of 16 tokens, cut at 64. All take turns in every round, each in a
fresh process with one step to warm up; what is printed is medians over the rounds, and of ratios within a round. Memory
is the process's highest resident memory (Linux), on a GPU what the allocator gave out at most. On a machine with other
work only the CPU time with --threads 1 says something. --largest seeks the largest batch that fits on a GPU.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from measuring import GROUP, apart, batch_of, machine, model_of, peak
from torch import Tensor
from transformers import AlignConfig, AlignModel

from align_train.engine.host_memory import keep_freed_memory
from align_train.losses import contrastive_loss
from align_train.models import compile_towers
from align_train.optim import lamb

STOCK, STOCK_BF16, PLAIN_MALLOC = "stock, float32", "stock, bf16 autocast", "stock, bf16 autocast, freed memory kept"
OURS_FLOAT32, OURS, RECOMPUTED = "ours, float32", "ours, bf16", "ours, bf16, gradient checkpointing"
CPU_BAR, GPU_BAR, LARGEST_BAR = 2.0, 2.5, 2.0

Step = Callable[[Tensor, Tensor, Tensor], Tensor]


def as_side_takes_it(side: str, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What the side's own loader hands over; the work of making it is not part of the step."""
    pixels, ids, mask = batch
    if side.startswith("stock"):
        return (pixels.float() / 127.5 - 1).contiguous(), ids, mask
    longest = int(mask.sum(1).max())
    return pixels, ids[:, :longest], mask[:, :longest]


def step_of(side: str, preset: str, device: str, compiled: bool, chunks: int) -> Step:
    """A training step of one side, on a model with fresh weights; it returns the loss."""
    model = model_of(preset, gradient_checkpointing=side == RECOMPUTED)
    if side.startswith("stock"):
        model = AlignModel(AlignConfig.from_dict(model.config.to_dict()))
        assert model.config.text_config._attn_implementation == "eager", "the stock model is to run as shipped"
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.to(device).parameters(), 1e-3, fused=True)
    else:
        model.text_chunks = chunks
        optimizer = lamb(model.to(device), 1e-3)
        if compiled:
            compile_towers(model, vision=True, text=True)
    model.train()

    def loss_of(pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        if side.startswith("stock"):
            return model(input_ids=ids, pixel_values=pixels, attention_mask=mask, return_loss=True).loss
        return contrastive_loss(model.encode_image(pixels), model.encode_text(ids, mask), model.temperature)

    def step(*batch: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled="bf16" in side):
            loss = loss_of(*(x.to(device, non_blocking=True) for x in batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return step


def measure(side: str, given: dict) -> dict:
    """Seconds, CPU seconds and peak bytes of a step, in this process, a fresh one."""
    device = given["device"]
    if given["threads"]:
        torch.set_num_threads(given["threads"])
    if side.startswith("ours") or side == PLAIN_MALLOC:
        keep_freed_memory()
    step = step_of(side, given["model"], device, given["compile"], given["chunks"])
    batch = as_side_takes_it(side, batch_of(given["batch"]))
    if device == "cuda":
        batch = tuple(x.pin_memory() for x in batch)
    wall, cpu = [], []
    for _ in range(1 + given["steps"]):
        clock, busy = time.perf_counter(), time.process_time()
        assert step(*batch).isfinite()  # waits for the device, as a loop that prints its loss
        if device == "cuda":
            torch.cuda.synchronize()
        wall.append(time.perf_counter() - clock)
        cpu.append(time.process_time() - busy)
    return {"wall": statistics.median(wall[1:]), "cpu": statistics.median(cpu[1:]), "peak": peak(device)}


def largest(side: str, given: dict) -> dict:
    """The largest batch, a multiple of 16, with which two steps fit: doubled until they do not, then bisected."""
    step = step_of(side, given["model"], "cuda", given["compile"], given["chunks"])

    def fits(groups: int) -> bool:
        try:
            for _ in range(2):  # the optimizer's state comes with the first
                step(*as_side_takes_it(side, batch_of(groups * GROUP)))
        except torch.cuda.OutOfMemoryError:
            return False
        finally:
            torch.cuda.empty_cache()
        return True

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 32):  # to 3 %
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return {"batch": low * GROUP}


def compare(sides: list[str], given: dict) -> None:
    rounds = [{side: apart("step", "measure", side, given) for side in sides} for _ in range(given["rounds"])]
    unit = "cpu" if given["device"] == "cpu" and given["threads"] == 1 else "wall"
    bar = GPU_BAR if given["device"] == "cuda" else CPU_BAR
    print("| step | images/s | CPU seconds | times stock float32 | times stock bf16 | peak memory, GiB | verdict |")
    print("|---|---|---|---|---|---|---|")
    for side in sides:
        speed, busy, top = (statistics.median(r[side][name] for r in rounds) for name in (unit, "cpu", "peak"))
        times = [statistics.median(r[s][unit] / r[side][unit] for r in rounds) for s in (STOCK, STOCK_BF16)]
        judged = times[1] if given["device"] == "cuda" else times[0]
        verdict = ("reached" if judged >= bar else "NOT reached") if side == OURS else ""
        print(
            f"| {side} | {given['batch'] / speed:.3g} | {busy:.3g} | {times[0]:.2f} | {times[1]:.2f} "
            f"| {top / 2**30:.2f} | {verdict} |"
        )


def compare_largest(given: dict) -> None:
    found = {side: apart("step", "largest", side, given)["batch"] for side in (STOCK, STOCK_BF16, OURS, RECOMPUTED)}
    print("\n| largest batch that fits | pairs | times stock bf16 | verdict |\n|---|---|---|---|")
    for side, pairs in found.items():
        times = pairs / max(found[STOCK_BF16], 1)
        verdict = ("reached" if times >= LARGEST_BAR else "NOT reached") if side.startswith("ours") else ""
        print(f"| {side} | {pairs:,} | {times:.2f} | {verdict} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", default="align_b3_mini")
    parser.add_argument("--batch", type=int, default=32, help="a multiple of 16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="timed steps in a process")
    parser.add_argument("--chunks", type=int, default=8, help="length-sorted parts of the captions, ours")
    parser.add_argument("--threads", type=int, default=0, help="of torch on the CPU; 0 leaves its default")
    parser.add_argument("--compile", action="store_true", help="torch.compile our towers")
    parser.add_argument("--sides", nargs="+", default=None, help="rows besides the two of the stock model")
    parser.add_argument("--largest", action="store_true", help="also the largest batch that fits")
    given = vars(parser.parse_args())
    if given["largest"] and given["device"] == "cpu":
        parser.error("--largest needs --device cuda: on a CPU the kernel ends the process that takes too much")
    if given["batch"] % GROUP:
        parser.error(f"--batch is {given['batch']}; give a multiple of {GROUP}, the virtual batch")
    on = f"{machine(given['device'])}, torch {torch.__version__}"
    print(f"{given['model']}, batch {given['batch']}, {on}, {given['rounds']} rounds\n")
    compare([STOCK, STOCK_BF16, *(given["sides"] or [PLAIN_MALLOC, OURS_FLOAT32, OURS, RECOMPUTED])], given)
    if given["largest"]:
        compare_largest(given)


if __name__ == "__main__":
    main()
