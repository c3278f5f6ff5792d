"""What transformers' AlignModel needs before it can be trained: one named repair a function.

AlignModel is an exact inference port, and wrong as a training model in ways that no error message shows. Each
repair changes modules in place and no state-dict key, so that export stays `save_pretrained` and is exact.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AlignModel
from transformers.models.align.modeling_align import (
    AlignTextPooler,
    AlignTextSelfAttention,
    AlignVisionBlock,
    AlignVisionFinalBlockLayer,
)

from align_train.models.batch_norm import CrossRankBatchNorm2d, FrozenBatchNorm2d, GhostBatchNorm2d, hold_statistics


def repair_batch_norm(
    model: AlignModel, statistics: str = "virtual", group_size: int = 16, momentum: float = 0.01
) -> None:
    """Put batch norms with the reference's momentum and statistics in the place of nn.BatchNorm2d.

    As shipped, momentum is Keras's 0.99 read in PyTorch's sense (0.1 in `expand_bn`): the running statistics are
    the last batch. Kakao trains with virtual batches of 16.

    Args:
        model: changed in place.
        statistics: virtual (groups of `group_size`), batch (this rank's batch), cross_rank, or frozen.
        group_size: images in a virtual batch.
        momentum: weight of the newest batch in the running statistics.

    Raises:
        ValueError: `statistics` is none of these.
    """
    makers: dict[str, Callable[[int, float], nn.BatchNorm2d]] = {
        "virtual": lambda channels, eps: GhostBatchNorm2d(channels, group_size, eps, momentum),
        "batch": lambda channels, eps: GhostBatchNorm2d(channels, None, eps, momentum),
        "cross_rank": lambda channels, eps: CrossRankBatchNorm2d(channels, eps, momentum),
        "frozen": lambda channels, eps: FrozenBatchNorm2d(channels, None, eps, momentum),
    }
    if statistics not in makers:
        raise ValueError(f"model.batch_norm.statistics is {statistics!r}; it must be one of {', '.join(makers)}")
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, makers[statistics](child.num_features, child.eps))


class StochasticDepth(nn.Module):
    """Drops whole samples of a residual branch and scales the rest by 1 / (1 - p) (arXiv 1603.09382).

    Attributes:
        kept: (B,) of which samples the branch is kept, 1 or 0; None draws them from torch's generator.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Drop rows of (B, ...) in training; the identity in evaluation."""
        if not self.training or self.p == 0.0:
            return x
        shape = x.shape[0], *[1] * (x.ndim - 1)
        if self.kept is None:
            kept = torch.empty(shape, dtype=x.dtype, device=x.device).bernoulli_(1 - self.p)
        else:
            kept = self.kept.to(x.dtype).view(shape)
        return x * (kept / (1 - self.p))

    def extra_repr(self) -> str:
        """Shown in the printed model."""
        return f"p={self.p}"


def repair_stochastic_depth(model: AlignModel) -> None:
    """Drop whole samples where AlignModel's nn.Dropout drops single elements of the residual branch."""
    for layer in model.modules():
        if isinstance(layer, AlignVisionFinalBlockLayer):
            layer.dropout = StochasticDepth(layer.dropout.p)


def draw_depths(model: AlignModel, batch: int, random: np.random.Generator) -> Tensor:
    """Which samples keep which residual branch: uint8 (layers, batch), 1 or 0, on the CPU.

    Drawn for the whole global batch at once, of which every rank and micro-batch takes its own columns: so what is
    dropped does not depend on how the batch is split.
    """
    rates = [layer.p for layer in _dropping(model)]
    drawn = random.random((len(rates), batch), np.float32) >= np.asarray(rates, np.float32)[:, None]
    return torch.from_numpy(drawn.view(np.uint8))


def set_depths(model: AlignModel, kept: Tensor | None) -> None:
    """Let the coming forward passes of B images drop what `kept` (layers, B) says, columns of `draw_depths`.

    It holds until it is set again, since activations may be recomputed in the backward pass; None draws anew each time.
    """
    layers = _dropping(model)
    rows = [None] * len(layers) if kept is None else kept.unbind()
    for layer, row in zip(layers, rows, strict=True):
        layer.kept = row


def _dropping(model: AlignModel) -> list[StochasticDepth]:
    return [layer for layer in model.modules() if isinstance(layer, StochasticDepth) and layer.p > 0]


def repair_attention(model: AlignModel) -> None:
    """Use PyTorch's fused attention in the text tower.

    `is_causal = False` matters: without padding no mask is built, and transformers' SDPA function would then
    take a layer that does not say otherwise for a causal one.
    """
    for layer in model.modules():
        if isinstance(layer, AlignTextSelfAttention):
            layer.is_causal = False
    model.config._attn_implementation_internal = "sdpa"
    model.config.text_config._attn_implementation_internal = "sdpa"


class _GlobalMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)


def repair_pooling(model: AlignModel) -> None:
    """Pool with a mean: the same value as AvgPool2d(hidden_dim, ceil_mode=True), 2.6 times faster, any image size."""
    model.vision_model.pooler = _GlobalMean()


class _UnusedTextPooler(AlignTextPooler):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states[:, 0]


def repair_text_pooler(model: AlignModel) -> None:
    """Take the text pooler, whose output ALIGN never uses, out of training and computation; its weights stay.

    As shipped its parameters never get a gradient, and DDP raises in the second step.
    """
    model.text_model.pooler.__class__ = _UnusedTextPooler
    model.text_model.pooler.requires_grad_(False)


class _CheckpointedBlock(AlignVisionBlock):
    def forward(self, hidden_states: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(hidden_states)
        return checkpoint(super().forward, hidden_states, use_reentrant=False, context_fn=once_for_statistics)


def once_for_statistics() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For `torch.utils.checkpoint`: batch norm's running statistics move in the forward pass, not in its repetition."""
    return nullcontext(), hold_statistics()


def repair_checkpointing(model: AlignModel) -> None:
    """Recompute activations in the backward pass, in both towers; AlignModel can do so in the text tower only.

    Random numbers are replayed, and batch norm's running statistics move once.
    """
    # set by hand: gradient_checkpointing_enable is deprecated in transformers 5.23, its successor newer than our bound
    for layer in model.text_model.encoder.layer:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    for block in model.vision_model.encoder.blocks:
        block.__class__ = _CheckpointedBlock
