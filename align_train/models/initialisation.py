"""Start values: as Keras's EfficientNet and BERT have them, and a variant for small text towers."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import AlignModel
from transformers.models.align.modeling_align import AlignTextSelfAttention, AlignTextSelfOutput

from align_train.distributed import dealt_out_as, sum_over_ranks, world_size

# Standard deviation of a unit normal cut at +-2: Keras divides by it, so that the cut values have the wanted one.
_CUT_NORMAL_STD = 0.87962566103423978


@torch.no_grad()
def initialise_vision(model: AlignModel) -> None:
    """Keras's VarianceScaling(2, fan_out, truncated normal) on every convolution, as EfficientNet was trained.

    std = sqrt(2 / fan_out), fan_out = k * k * out_channels, and k * k alone for a depthwise kernel, whose Keras
    layout (k, k, C, 1) counts one output. transformers has 0.02 everywhere, where batch norm's eps damps 69 of
    B7's 162 layers.
    """
    for layer in model.vision_model.modules():
        if isinstance(layer, nn.Conv2d):
            kernel = layer.kernel_size[0] * layer.kernel_size[1]
            fan_out = kernel * (1 if layer.groups > 1 else layer.out_channels)
            std = math.sqrt(2.0 / fan_out) / _CUT_NORMAL_STD
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


@torch.no_grad()
def initialise_small_text(model: AlignModel) -> None:
    """Make a small text tower tell captions apart from the first step.

    With BERT's std of 0.02, two layers of 128 give nearly the same [CLS] for every caption (cosine 0.99), and the
    first minutes of training go into undoing that. Linear weights start at 1 / sqrt(fan_in), the value and
    attention-output weights at twice that, so that [CLS] hears the words; position and type embeddings at 0.002,
    so that they do not drown them. Found by measurement: docs/log.md.
    """
    for layer in model.text_model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)
    for layer in model.text_model.modules():
        if isinstance(layer, AlignTextSelfAttention):
            layer.value.weight.mul_(2)
        elif isinstance(layer, AlignTextSelfOutput):
            layer.dense.weight.mul_(2)
    embeddings = model.text_model.embeddings
    nn.init.normal_(embeddings.position_embeddings.weight, std=0.002)
    nn.init.normal_(embeddings.token_type_embeddings.weight, std=0.002)
    nn.init.normal_(model.text_projection.weight, std=model.text_projection.in_features**-0.5)


@torch.no_grad()
def centre_text(model: AlignModel, captions: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Set the text projection's bias to minus the mean projected [CLS] of captions: (ids, mask), (B, L) each.

    The part that all captions share carries no information and would fill the cosine. It is a plain weight, so it
    is trained on and exported like any other. Every rank must bring as many parts of equal size.
    """
    training = model.training
    model.eval()
    projected = torch.cat([model.get_text_features(ids, mask).pooler_output for ids, mask in captions])
    mean = sum_over_ranks(projected.mean(0)) / world_size()
    bias = model.text_projection.bias
    bias.sub_(dealt_out_as(mean, bias))  # which is in the mean
    model.train(training)
