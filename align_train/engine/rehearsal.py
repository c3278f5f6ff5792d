"""What a run will need, before it is begun: how much of a batch fits into memory, and how long a pair takes."""

import copy
import time

import torch

from align_train.engine.budget import memory_there
from align_train.models import Align
from align_train.models.memory import AUTOCAST, memory_of, virtual_batch

SHARE = 0.8  # of the memory that is there, for what is an estimate
PAIRS = 16  # at least, that the speed is measured on


def images_at_once(
    model: Align, precision: str, batch_size: int, ranks: int, device: torch.device, rows: int | None = None
) -> int:
    """Most pairs, a divisor of a rank's share of a batch, that need at most SHARE of the memory there is.

    Where not even the smallest part fits, it is that: the estimate may be wrong, and the run says what it needs.
    """
    local = max(batch_size // ranks, 1)
    memory, room, unit = memory_of(model, precision), memory_there(device, ranks), virtual_batch(model) or 1
    divisors = [size for size in range(local, 0, -1) if local % size == 0 and size % unit == 0] or [local]
    fitting = (size for size in divisors if memory.of(size, local, batch_size, rows) <= SHARE * room)
    return next(fitting, divisors[-1])


def seconds_a_pair(model: Align, precision: str, device: torch.device) -> float:
    """Of a forward and a backward pass on pairs of the longest captions, measured on a copy of the model."""
    rehearsed, pairs = copy.deepcopy(model).to(device).train(), _least(virtual_batch(model) or 1)
    side, tokens = model.preprocessing.crop, model.preprocessing.max_tokens
    pixels = torch.zeros(pairs, 3, side, side, dtype=torch.uint8, device=device)
    ids = torch.ones(pairs, tokens, dtype=torch.int64, device=device)
    enabled, dtype = precision in AUTOCAST, AUTOCAST.get(precision, torch.bfloat16)

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=enabled):
            image, text = rehearsed.encode_image(pixels), rehearsed.encode_text(ids, torch.ones_like(ids))
        (image * text).sum().backward()

    step()  # libraries choose their algorithms
    _wait(device)
    start = time.perf_counter()
    step()
    _wait(device)
    return (time.perf_counter() - start) / pairs


def _least(unit: int) -> int:
    """The least multiple of a virtual batch that has PAIRS."""
    return unit * -(-PAIRS // unit)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
