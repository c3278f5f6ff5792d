"""Batch normalisation with the statistics the reference trains with. Same state-dict keys as nn.BatchNorm2d.

Shapes: B images, G = B / group_size groups, C channels, H x W pixels.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from align_train.distributed import sum_over_ranks, world_size

# What a forward pass in training does to the running statistics: moves them (now), is added up for `pool_statistics`
# (pooled), or nothing (held). A plain global, since torch.compile cannot guard on a context variable.
_tracking = "now"


@contextmanager
def _tracked(mode: str) -> Iterator[None]:
    global _tracking  # noqa: PLW0603
    before, _tracking = _tracking, mode
    try:
        yield
    finally:
        _tracking = before


def hold_statistics() -> AbstractContextManager[None]:
    """Within it no running statistic moves: for a forward pass that is done a second time (recomputation)."""
    return _tracked("held")


@contextmanager
def pool_statistics(model: nn.Module) -> Iterator[None]:
    """Move the running statistics once, at the end, by the mean over every forward pass within it, on all ranks.

    So they do not depend on how a step's images are split: over micro-batches, or over ranks, whose statistics the
    reference averages too. Every rank must come by.
    """
    layers = tracking_layers(model)
    for layer in layers:
        layer.pending.zero_()
    with _tracked("pooled"):
        yield
    if not layers:
        return
    total = sum_over_ranks(torch.cat([layer.pending for layer in layers]))
    for layer, pending in zip(layers, total.split([len(layer.pending) for layer in layers]), strict=True):
        mean, variance = (pending[:-1] / pending[-1]).chunk(2)
        layer.move_statistics(mean, variance)


class GhostBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over virtual batches, also called ghost batch norm (Hoffer et al., arXiv 1705.08741).

    In training, group g of G is the images g, g + G, g + 2G, ... (strided, as in Keras's `virtual_batch_size`);
    each group is normalised by its own mean and biased variance:

        y = (x - mean_g) / sqrt(var_g + eps) * weight + bias
        running = (1 - momentum) * running + momentum * mean over groups of (mean_g, var_g)

    Gradients flow through the group statistics. `momentum` is in PyTorch's sense: Keras's 0.99 is 0.01 here.

    Args:
        num_features: channels C.
        group_size: images in a group; None takes the whole local batch as one group.
        eps: 1e-3, as EfficientNet and golden/bn.npz.
        momentum: weight of the newest batch in the running statistics.

    Raises:
        ValueError: in training, when the batch is not a multiple of `group_size`.
    """

    def __init__(
        self, num_features: int, group_size: int | None = 16, eps: float = 1e-3, momentum: float = 0.01
    ) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)
        if group_size is not None and group_size < 1:
            raise ValueError(f"model.batch_norm.group_size is {group_size}: give 1 image or more (16 in the reference)")
        self.group_size = group_size
        # sums of means and variances, and of how many; no part of the state dict, which stays nn.BatchNorm2d's
        self.register_buffer("pending", torch.zeros(2 * num_features + 1), persistent=False)
        self.pending: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, H, W); the result has the memory format of the input."""
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        groups = self._groups(x.shape[0])
        assert self.running_mean is not None
        mean, variance = (self.running_mean.new_zeros(groups * self.num_features) for _ in range(2))
        # With momentum 1 the kernel hands back each group's own mean and unbiased variance.
        y = F.batch_norm(
            _groups_to_channels(x, groups), mean, variance,
            self.weight.repeat(groups), self.bias.repeat(groups), True, 1.0, self.eps,
        )  # fmt: skip
        count = x.numel() // mean.numel()
        self._track(mean.view(groups, -1).mean(0), variance.view(groups, -1).mean(0) * (count - 1) / count)
        return _channels_to_groups(y, x.shape, groups)

    def _groups(self, batch: int) -> int:
        size = self.group_size or batch
        if batch % size:
            raise ValueError(
                f"a batch of {batch} images cannot be cut into virtual batches of {size}: make the batch per device "
                f"a multiple of {size}, or set model.batch_norm.group_size"
            )
        return batch // size

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        """Take note of a forward pass's mean over groups of (mean, biased variance), (C,) each."""
        if _tracking == "now":
            self.move_statistics(mean, variance)
        elif _tracking == "pooled":
            self.pending += torch.cat([mean, variance, mean.new_ones(1)])

    @torch.no_grad()
    def move_statistics(self, mean: Tensor, variance: Tensor) -> None:
        """running = (1 - momentum) * running + momentum * (mean, variance), (C,) each."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        # momentum None is nn.BatchNorm2d's word for the plain mean over all batches since the last reset
        weight = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
        self.running_var.lerp_(variance.to(self.running_var.dtype), weight)


class CrossRankBatchNorm2d(GhostBatchNorm2d):
    """Batch norm with the mean and biased variance over the images of all ranks (on CPU too)."""

    def __init__(self, num_features: int, eps: float = 1e-3, momentum: float = 0.01) -> None:
        super().__init__(num_features, group_size=None, eps=eps, momentum=momentum)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, H, W); every rank must call it the same number of times."""
        if not self.training:
            return super().forward(x)
        values = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        count = x.numel() // self.num_features
        local = torch.cat([values.sum((0, 2, 3)), (values * values).sum((0, 2, 3)), values.new_tensor([float(count)])])
        total = sum_over_ranks(local)
        mean, square = total[:-1].div(total[-1]).chunk(2)
        variance = (square - mean * mean).clamp_min(0)
        self._track(mean, variance)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        shift = self.bias - mean * scale
        return (values * scale[:, None, None] + shift[:, None, None]).to(x.dtype)


class FrozenBatchNorm2d(GhostBatchNorm2d):
    """Batch norm that always uses its running statistics and never moves them; weight and bias still train."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, H, W)."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


def tracking_layers(model: nn.Module) -> list[GhostBatchNorm2d]:
    """The batch norms whose running statistics move in training."""
    return [m for m in model.modules() if isinstance(m, GhostBatchNorm2d) and not isinstance(m, FrozenBatchNorm2d)]


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Tensor], encode: str = "encode_image") -> int:
    """Set the running statistics to their plain mean over all ranks' `batches` of pixels, the weights as they are.

    Every rank must call it, with as many batches. A run shorter than some 500 steps cannot warm up a momentum of 0.01:
    what it would be evaluated with is still partly the initial 0 and 1. The model is left in the mode it was in.

    Returns:
        How many batches were used.

    Raises:
        ValueError: there was no batch, and the statistics are the initial 0 and 1 now.
    """
    layers = tracking_layers(model)
    momenta, training, used = [layer.momentum for layer in layers], model.training, 0
    model.train()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
    try:
        with torch.compiler.set_stance("force_eager"):  # nothing is compiled for a few batches of another momentum
            for used, pixels in enumerate(batches, start=1):  # noqa: B007 - counted for the caller
                getattr(model, encode)(pixels)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        model.train(training)
    if not used:
        raise ValueError("no batch to measure batch-norm statistics on: give at least one")
    found = [value for layer in layers for value in (layer.running_mean, layer.running_var) if value is not None]
    if found:
        mean = sum_over_ranks(torch.cat(found)) / world_size()
        for value, share in zip(found, mean.split([len(value) for value in found]), strict=True):
            value.copy_(share)
    return used


def _groups_to_channels(x: Tensor, groups: int) -> Tensor:
    """(B, C, H, W) to (group_size, G * C, H, W): strided groups side by side, so that one kernel does them all."""
    batch, channels, height, width = x.shape
    if groups == 1 or not x.is_contiguous(memory_format=torch.channels_last):
        return x.reshape(batch // groups, groups * channels, height, width)
    pixels = x.permute(0, 2, 3, 1).reshape(batch // groups, groups, height, width, channels)
    return pixels.permute(0, 2, 3, 1, 4).reshape(batch // groups, height, width, -1).permute(0, 3, 1, 2)


def _channels_to_groups(y: Tensor, shape: torch.Size, groups: int) -> Tensor:
    """The way back from `_groups_to_channels`."""
    batch, channels, height, width = shape
    if groups == 1 or not y.is_contiguous(memory_format=torch.channels_last):
        return y.reshape(shape)
    pixels = y.permute(0, 2, 3, 1).reshape(batch // groups, height, width, groups, channels)
    return pixels.permute(0, 3, 1, 2, 4).reshape(batch, height, width, channels).permute(0, 3, 1, 2)
