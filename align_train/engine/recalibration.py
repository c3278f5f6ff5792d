"""When running batch-norm statistics cannot be trusted, and what to do then."""

import torch

from align_train.engine.data import PairData
from align_train.models import Align, recalibrate
from align_train.models.batch_norm import tracking_layers
from align_train.models.repairs import set_depths

# After n steps of momentum m the start value still has the weight (1 - m)^n; n = 5 / m leaves e^-5, 0.7 %.
WARM = 5.0
BATCHES = 50


def needs_recalibration(model: Align, steps: int) -> bool:
    """True where `steps` leave the initial 0 and 1 more than 0.7 % of the running statistics."""
    momenta = [layer.momentum for layer in tracking_layers(model) if layer.momentum]
    return bool(momenta) and steps < WARM / min(momenta)


def recalibrate_on(model: Align, data: PairData) -> int:
    """Measure the statistics anew on the first training batches; returns how many were used.

    Which branches stochastic depth drops in them is drawn anew, always the same.
    """
    set_depths(model, None)
    torch.manual_seed(0)
    return recalibrate(model, data.recalibration_pixels(BATCHES, model.temperature.device)) // data.parts
