"""When running batch-norm statistics cannot be trusted, and what to do then."""

import itertools

from align_train.engine.data import PairData
from align_train.models import Align, GhostBatchNorm2d, recalibrate

# After n steps of momentum m the start value still has the weight (1 - m)^n; n = 5 / m leaves e^-5, 0.7 %.
WARM = 5.0
BATCHES = 50


def needs_recalibration(model: Align, steps: int) -> bool:
    """True where `steps` leave the initial 0 and 1 more than 0.7 % of the running statistics."""
    momenta = [m.momentum for m in model.modules() if isinstance(m, GhostBatchNorm2d) and m.momentum]
    return bool(momenta) and steps < WARM / min(momenta)


def recalibrate_if_short(model: Align, data: PairData, steps: int, batches: int = BATCHES) -> int:
    """Measure the statistics anew on training batches if the run was short; returns how many were used."""
    if not needs_recalibration(model, steps):
        return 0
    pixels = data.recalibration_pixels(batches, model.temperature.device)
    return recalibrate(model, itertools.islice(pixels, batches))
