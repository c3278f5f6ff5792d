"""A step's pairs to embeddings: at once, or micro-batch by micro-batch in the memory of one.

The latter is gradient caching (Gao et al., arXiv 2101.06983): embed every micro-batch and keep nothing but the
embeddings, take the loss over all of them, then embed each micro-batch again and go back through it. Written as
activation checkpointing of whole micro-batches, it is one forward and one backward pass to everything around it: DDP
reduces each gradient once, precision, clipping and the temperature need not know of it.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from align_train.batch import Batch, StepBatch
from align_train.distributed import rank, world_size
from align_train.models import Align
from align_train.models.batch_norm import pool_statistics
from align_train.models.repairs import draw_depths, once_for_statistics, set_depths

_DEPTHS, _DROPOUT = 0, 1  # what random numbers are for


def encode(model: Align, batch: StepBatch, entropy: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Embed this rank's b pairs: image (b, D) and text (b, D), in the order of `batch.keys`.

    Args:
        model: in training mode.
        batch: dealt out as `BatchPlans` does it.
        entropy: seed and step.
    """
    image, text = _in_parts(model, batch, entropy, _pairs)
    return image, text


def encode_images(model: Align, batch: StepBatch, entropy: Sequence[int]) -> Tensor:
    """As `encode`, the images alone (b, D); a model in evaluation mode draws nothing."""
    (image,) = _in_parts(model, batch, entropy, _images)
    return image


def captions(batch: StepBatch, device: torch.device) -> Iterable[tuple[Tensor, Tensor]]:
    """Ids and masks of each micro-batch, on the device."""
    return ((part.input_ids.to(device), part.attention_mask.to(device)) for part in batch.parts)


def _pairs(model: Align, part: Batch) -> tuple[Tensor, ...]:
    # Text first: it asks the device for the captions' lengths, and should not wait for the images then.
    text = model.encode_text(part.input_ids, part.attention_mask)
    return model.encode_image(part.pixels), text


def _images(model: Align, part: Batch) -> tuple[Tensor, ...]:
    return (model.encode_image(part.pixels),)


def _in_parts(
    model: Align, batch: StepBatch, entropy: Sequence[int], embed: Callable[[Align, Batch], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """What `embed` makes of each micro-batch, together.

    Random numbers are a function of `entropy` and of a micro-batch's number among those of all ranks, so that each is
    the same the second time. What depends on single images, stochastic depth and virtual batch norm, does not depend on
    how the batch is split at all; dropout depends on the number of micro-batches, over all ranks together, alone.
    """
    parts, stride = len(batch.parts), len(batch.parts) * world_size()
    depths = draw_depths(model, len(batch) * world_size(), np.random.default_rng(_sequence(entropy, _DEPTHS)))
    embedded = []
    with pool_statistics(model) if model.training else nullcontext():
        for number in range(rank(), stride, world_size()):
            part = batch.parts[number // world_size()]
            seed = int(_sequence(entropy, _DROPOUT, number).generate_state(1, np.uint64)[0])
            one = partial(_encode_part, embed, model, part, depths[:, number::stride], seed)
            embedded.append(one() if parts == 1 else _forgetting(one))
    return tuple(torch.cat(parts) for parts in zip(*embedded, strict=True))


def _encode_part(
    embed: Callable[[Align, Batch], tuple[Tensor, ...]], model: Align, part: Batch, kept: Tensor, seed: int
) -> tuple[Tensor, ...]:
    torch.manual_seed(seed)
    device = model.temperature.device
    part = part.to(device, non_blocking=True)
    set_depths(model, kept.to(device, non_blocking=True))
    return embed(model, part)


def _forgetting(encode_part: partial[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Keep nothing of the forward pass but its result; it is done again in the backward pass."""
    # Autocast would share its low-precision copy of a weight among micro-batches, and add up their gradients in it.
    torch.clear_autocast_cache()
    # no random state is kept: `_encode_part` sets it
    embedded: tuple[Tensor, ...] = checkpoint(
        encode_part, use_reentrant=False, context_fn=once_for_statistics, preserve_rng_state=False
    )
    return embedded


def _sequence(entropy: Sequence[int], *purpose: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(entropy, spawn_key=purpose)
