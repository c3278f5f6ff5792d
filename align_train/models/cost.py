"""What a pair costs to train on: floating-point operations, counted on shapes alone, without computing anything."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from align_train.models.align import Align

LENGTHS = (16, 32, 64)  # in tokens: three captions fix the polynomial; every text tower has 64 positions or more


@dataclass(frozen=True)
class Cost:
    """Model FLOPs of pairs, forward and backward; a multiplication and an addition are two.

    As is usual, convolutions, matrix products and attention count; all else, and what is computed a second time, does
    not (arXiv 2204.02311, appendix B). The loss's 12 B D of a pair are left out: 0.2 % of align_b3_mini at B = 4,096.

    Attributes:
        image: of one image.
        caption: a, b, c of a + b L + c L^2 for a caption of L tokens.
    """

    image: float
    caption: tuple[float, float, float]

    def pairs(self, lengths: Tensor) -> float:
        """FLOPs of pairs whose captions have so many tokens, int64 (b,) on the CPU."""
        constant, linear, square = self.caption
        tokens = lengths.double()
        varying = linear * tokens.sum().item() + square * tokens.square().sum().item()
        return len(lengths) * (self.image + constant) + varying


def cost_of(model: Align) -> Cost:
    """Count what a model costs, frozen parameters as what they are; its weights are not touched."""
    # In evaluation mode the products are the same, and nothing is recomputed, or asked of other ranks.
    hollow = hollow_copy(model, "meta").eval()
    image = counted_flops(partial(image_features, hollow, 1))
    counts = [counted_flops(partial(text_features, hollow, 1, length)) for length in LENGTHS]
    constant, linear, square = np.linalg.solve(np.vander(LENGTHS, increasing=True), counts).tolist()
    return Cost(image, (constant, linear, square))


def hollow_copy(model: Align, device: str) -> Align:
    """A copy whose weights have shapes alone: on the device `meta`, or on any within a FakeTensorMode."""
    hollow: dict[int, Any] = {}
    for kept in (*model.parameters(), *model.buffers()):
        empty = torch.empty_strided(kept.size(), kept.stride(), dtype=kept.dtype, device=device)
        hollow[id(kept)] = nn.Parameter(empty, kept.requires_grad) if isinstance(kept, nn.Parameter) else empty
    return copy.deepcopy(model, hollow)  # takes these for copies that it has made already


def image_features(model: Align, images: int) -> Tensor:
    """What the image tower makes of so many images of the size that the model takes."""
    side = model.preprocessing.crop
    pixels = model.temperature.new_empty((images, 3, side, side)).to(memory_format=torch.channels_last)
    features: Tensor = model.get_image_features(pixels).pooler_output
    return features


def text_features(model: Align, captions: int, length: int) -> Tensor:
    """What the text tower makes of so many captions of `length` tokens.

    Part by part, since AlignTextModel looks at values, which a hollow model has none of, to make its mask.
    """
    tower, words = model.text_model, model.text_model.embeddings.word_embeddings.weight
    embedded = words.new_empty((captions, length, words.shape[1])).requires_grad_(words.requires_grad)
    states = tower.encoder(tower.embeddings(inputs_embeds=embedded)).last_hidden_state
    features: Tensor = model.text_projection(states[:, 0])
    return features


def counted_flops(forward: Callable[[], Tensor]) -> float:
    """FLOPs of a forward pass, and of its backward pass where anything is to be trained."""
    with FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: _back_convolution}
    ) as count:
        result = forward()
        if result.requires_grad:
            result.sum().backward()
    return float(count.get_total_flops())


def _back_convolution(gradient: Sequence[int], x: Sequence[int], weight: Sequence[int], *rest: Any, **_: Any) -> int:
    """As much as the forward pass for each of the gradients to input and weight that is wanted.

    PyTorch's own formula takes a depthwise convolution for a dense one there, which is 45 times too much for B3.
    """
    wanted = rest[-1]
    return 2 * prod(gradient) * prod(weight[1:]) * sum(wanted[:2])
