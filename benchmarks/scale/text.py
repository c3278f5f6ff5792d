"""The text tower, forward and backward, against stock AlignModel.get_text_features on captions padded to 64 tokens.

    python benchmarks/scale/text.py [--device cpu|cuda] [--rounds 5] [--batch 256] [--size base|mini]
        [--precision float32|bf16] [--chunks 4,8,16,32] [--compile]

Captions are as long as COYO's: log-normal with a mean of 16 tokens, at least 3, cut at 64. All variants take turns in
every round, in one process and in training mode (dropout 0.1); ratios are medians over the rounds. Both sides run in
the same precision; bf16 is autocast, for the stock model too. Before, the embeddings of all are compared in evaluation
mode.
"""

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import AlignConfig, AlignModel

from align_train.models import Align, build_align, compile_towers

SIZES = {"mini": (4, 256, 4), "base": (12, 768, 12)}
LONGEST, SHORTEST = 64, 3
MEAN, SPREAD = 16.0, 0.5  # COYO's mean is 15.8 BERT tokens; the spread of the logarithm is as of English alt-texts
BAR = 3.0


def models(size: str, device: str) -> tuple[AlignModel, Align]:
    """The stock model and ours with the same weights; their image towers are small and idle."""
    layers, width, heads = SIZES[size]
    torch.manual_seed(0)
    ours = build_align(
        vision={"width": 0.1, "depth": 0.1, "stochastic_depth": 0.0, "channels_last": True},
        text={"layers": layers, "width": width, "heads": heads, "dropout": 0.1, "positions": 512,
              "vocabulary": 30522, "initialisation": "bert"},
        batch_norm={"statistics": "batch", "group_size": 16, "momentum": 0.01},
        temperature={"start": 1.0, "lower": 0.01, "upper": 10.0},
        preprocessing={"resize": 40, "crop": 33, "antialias": False, "max_tokens": LONGEST},
        projection_dim=32,
    )  # fmt: skip
    stock = AlignModel(AlignConfig.from_dict(ours.config.to_dict()))
    stock.load_state_dict(ours.state_dict())
    assert stock.config.text_config._attn_implementation == "eager", "the stock model is to run as shipped"
    return stock.to(device), ours.to(device)


def captions(batch: int, device: str) -> tuple[Tensor, Tensor]:
    """Ids and mask (batch, 64)."""
    random = torch.Generator().manual_seed(0)
    drawn = torch.empty(batch).log_normal_(math.log(MEAN) - SPREAD**2 / 2, SPREAD, generator=random)
    lengths = drawn.round().long().clamp(SHORTEST, LONGEST)
    mask = (torch.arange(LONGEST) < lengths[:, None]).long()
    return (torch.randint(1, 30522, mask.shape, generator=random) * mask).to(device), mask.to(device)


def variants(
    stock: AlignModel, ours: Align, ids: Tensor, mask: Tensor, chunks: list[int]
) -> dict[str, Callable[[], Tensor]]:
    """Name to a function that embeds the captions; the first is the stock model."""
    longest = int(mask.sum(1).max())

    def stock_64() -> Tensor:
        features = stock.get_text_features(ids, mask).pooler_output
        return features / features.norm(p=2, dim=-1, keepdim=True)

    def ours_in(parts: int) -> Callable[[], Tensor]:
        def encode() -> Tensor:
            ours.text_chunks = parts
            return ours.encode_text(ids[:, :longest], mask[:, :longest])

        return encode

    whole = {f"ours, padded to the batch's longest ({longest})": ours_in(1)}
    return {"stock, padded to 64": stock_64, **whole, **{f"ours, {n} length-sorted chunks": ours_in(n) for n in chunks}}


def seconds(encode: Callable[[], Tensor], model: AlignModel, device: str, autocast: bool) -> float:
    """Time of one forward and backward pass."""
    model.zero_grad(set_to_none=True)
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    wait()
    clock = time.perf_counter()
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        embeddings = encode()
    embeddings[:, 0].sum().backward()
    wait()
    return time.perf_counter() - clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", choices=list(SIZES), default="base")
    parser.add_argument("--precision", choices=["float32", "bf16"], default="float32")
    parser.add_argument("--chunks", default="4,8,16,32")
    parser.add_argument("--compile", action="store_true", help="compile our text tower (not the stock model)")
    given = parser.parse_args()
    stock, ours = models(given.size, given.device)
    ids, mask = captions(given.batch, given.device)
    encoders = variants(stock, ours, ids, mask, [int(n) for n in given.chunks.split(",")])
    autocast = given.precision == "bf16"
    if given.compile:
        compile_towers(ours, vision=False, text=True)
    check(stock, ours, encoders)
    stock.train()
    ours.train()
    owners = {name: stock if name.startswith("stock") else ours for name in encoders}
    rounds = [
        {name: seconds(encode, owners[name], given.device, autocast) for name, encode in encoders.items()}
        for _ in range(given.rounds + 1)
    ][1:]  # the first one warms up
    device = torch.cuda.get_device_name() if given.device == "cuda" else platform.processor() or "CPU"
    lengths = mask.sum(1)
    print(f"\nBERT-{given.size}, batch {given.batch}, {given.precision}{', compiled' if given.compile else ''}, "
          f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}; captions: "
          f"{lengths.float().mean():.1f} tokens on average, {lengths.max()} at most\n")  # fmt: skip
    table(encoders, rounds)


@torch.no_grad()
def check(stock: AlignModel, ours: Align, encoders: dict[str, Callable[[], Tensor]]) -> None:
    """All variants give the same embeddings in evaluation mode, in float32."""
    stock.eval()
    ours.eval()
    expected, *others = (encode() for encode in encoders.values())
    difference = max(float((other - expected).abs().max()) for other in others)
    assert difference < 1e-5, f"embeddings differ by {difference:.1e}"
    print(f"largest difference of an embedding's number to stock's: {difference:.1e}")


def table(encoders: dict[str, Callable[[], Tensor]], rounds: list[dict[str, float]]) -> None:
    stock, *others = encoders
    print("| text tower, forward + backward | ms | times stock |\n|---|---:|---:|")
    best = 0.0
    for name in (stock, *others):
        ratio = statistics.median(r[stock] / r[name] for r in rounds)
        best = max(best, ratio)
        print(f"| {name} | {1000 * statistics.median(r[name] for r in rounds):,.0f} | {ratio:.2f} |")
    print(f"\nbar: {BAR:.1f} times; best: {best:.2f}: {'reached' if best >= BAR else 'NOT REACHED'}")


if __name__ == "__main__":
    main()
