"""When running batch-norm statistics cannot be trusted, and what to do then."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from align_train.engine.data import PairData
from align_train.engine.stream import StreamData
from align_train.models import Align, recalibrate
from align_train.models.batch_norm import tracking_layers
from align_train.models.repairs import set_depths

# After n steps of momentum m the start value still has the weight (1 - m)^n; n = 5 / m leaves e^-5, 0.7 %.
WARM = 5.0
# What the statistics are measured on: so many training batches, fewer where these are large.
BATCHES = 50
IMAGES = 12_800
RUNNING = "running statistics"


def needs_recalibration(model: Align, steps: int) -> bool:
    """True where `steps` leave the initial 0 and 1 more than 0.7 % of the running statistics."""
    momenta = [layer.momentum for layer in tracking_layers(model) if layer.momentum]
    return bool(momenta) and steps < WARM / min(momenta)


def recalibrate_on(model: Align, data: PairData | StreamData) -> int:
    """Measure the statistics anew on the first training batches, BATCHES at most; returns how many were used.

    Which branches stochastic depth drops in them is drawn anew, always the same.
    """
    set_depths(model, None)
    torch.manual_seed(0)
    batches = min(BATCHES, math.ceil(IMAGES / data.batch_size))
    return recalibrate(model, data.recalibration_pixels(batches, model.temperature.device)) // data.parts


def recalibrated(batches: int) -> str:
    """What the statistics are then."""
    return f"statistics recalibrated on {batches} training batches"


@contextmanager
def settled_statistics(model: Align, steps: int | None, data: PairData | StreamData) -> Iterator[str]:
    """With statistics that can be trusted, and what they are: recalibrated ones, where the running ones cannot.

    These are put back after it. `steps` None says that they can.
    """
    if steps is None or not needs_recalibration(model, steps):
        yield RUNNING
        return
    layers = tracking_layers(model)
    before = [{name: value.clone() for name, value in layer.named_buffers()} for layer in layers]
    try:
        yield recalibrated(recalibrate_on(model, data))
    finally:
        for layer, buffers in zip(layers, before, strict=True):
            for name, value in layer.named_buffers():
                value.copy_(buffers[name])
