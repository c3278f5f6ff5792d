"""Optimizers, which parameters they decay, and learning-rate schedules."""

# `lamb` is the function, which a config names; `from align_train.optim.lamb import ...` still reaches the module.
from align_train.optim.groups import adamw, lamb
from align_train.optim.lamb import Lamb
from align_train.optim.schedules import constant, cosine, linear
from align_train.optim.two_stages import two_cosines

__all__ = ["Lamb", "adamw", "constant", "cosine", "lamb", "linear", "two_cosines"]
