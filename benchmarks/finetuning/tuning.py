"""A forward and backward pass of each way of tuning, against full tuning of the same model.

    python benchmarks/finetuning/tuning.py [--model align_sample] [--pairs 16] [--rounds 9] [--precision float32|bf16]

All ways take turns in every round, in one process; ratios are medians over the rounds. Memory is what the estimate of
`align_train.models.memory` says is kept for each pair.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from align_train.models import Align, Tuning, build
from align_train.models.memory import memory_of

WAYS = {
    "full": Tuning(),
    "locked_image": Tuning(image="frozen"),
    "locked_text": Tuning(text="frozen"),
    "last_stages, 2 and 2": Tuning(image=2, text=2),
    "lora, rank 8": Tuning(image="lora", text="lora"),
}


def prepared(preset: str, tuning: Tuning) -> Align:
    torch.manual_seed(0)
    model = build(preset)
    tuning.prepare(model)
    return model.train()


def step_of(model: Align, pairs: int, bf16: bool) -> Callable[[], float]:
    """A function that takes one step and gives its seconds."""
    side, tokens = model.preprocessing.crop, model.preprocessing.max_tokens
    pixels = torch.randint(256, (pairs, 3, side, side), dtype=torch.uint8)
    ids = torch.randint(1, 30522, (pairs, tokens))

    def step() -> float:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            image, text = model.encode_image(pixels), model.encode_text(ids, torch.ones_like(ids))
        (image @ text.T).float().square().sum().backward()
        seconds = time.perf_counter() - start
        model.zero_grad(set_to_none=True)
        return seconds

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="align_sample")
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    options = parser.parse_args()
    models = {name: prepared(options.model, tuning) for name, tuning in WAYS.items()}
    bf16 = options.precision == "bf16"
    steps = {name: step_of(model, options.pairs, bf16) for name, model in models.items()}
    for step in steps.values():
        step()
    rounds = [{name: step() for name, step in steps.items()} for _ in range(options.rounds)]
    print(f"{options.model}, {options.pairs} pairs, {options.precision}, {torch.get_num_threads()} threads\n")
    print("| tuning | parameters trained | time | MB kept a pair |\n|---|---|---|---|")
    for name, model in models.items():
        trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        ratio = statistics.median(taken[name] / taken["full"] for taken in rounds)
        kept = memory_of(model, "bf16-mixed" if bf16 else "32-true").pair / 1e6
        print(f"| {name} | {trained:,} | {ratio:.2f} | {kept:.2f} |")


if __name__ == "__main__":
    main()
