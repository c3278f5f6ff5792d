"""LoRA, low-rank adapters (Hu et al., arXiv 2106.09685), through peft, in place: the model stays an `Align`.

A matrix W (out, in) that is at rest works as W + (alpha / rank) B A, of which B (out, rank), zero at the start, and
A (rank, in) are trained.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import AlignModel

MARK = ".lora_"  # in the name of each of an adapter's parameters


@dataclass(frozen=True)
class Lora:
    """Settings of the adapters.

    Attributes:
        rank: columns of B, rows of A.
        alpha: an adapter counts alpha / rank times.
        dropout: rate at which an adapter's input is dropped in training, 0 to less than 1.

    Raises:
        ValueError: a number is out of range.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"tuning.lora.rank is {self.rank!r}: give a whole number of at least 1")
        if not self.alpha > 0:
            raise ValueError(f"tuning.lora.alpha is {self.alpha!r}: give a number above 0, such as twice the rank")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"tuning.lora.dropout is {self.dropout!r}: give a rate of at least 0 and less than 1")


def adapted_matrices(model: AlignModel, tower: str) -> list[str]:
    """Names of the matrices of a tower, image or text, that get an adapter: all that are not depthwise or a table.

    All, as QLoRA does, which found this to matter more than the rank (arXiv 2305.14314, section 4): the text tower's
    linear layers and projection; of the image tower the 1 x 1 convolutions, squeeze-and-excite's included.
    """
    if tower == "text":
        linear = _named(model, "text_model.encoder", nn.Linear)
        return [*(name for name, _ in linear), "text_projection"]
    convolutions = _named(model, "vision_model.encoder", nn.Conv2d)
    return [name for name, layer in convolutions if getattr(layer, "kernel_size", None) == (1, 1)]


def insert_lora(model: AlignModel, names: Iterable[str], settings: Lora) -> None:
    """Give the matrices of these names adapters, which change nothing yet; peft leaves nothing else to be trained.

    Raises:
        ValueError: peft is not installed.
    """
    peft = _peft()
    target = "|".join(map(re.escape, names))  # a pattern: of a list peft would seek the shortest form, for seconds
    config = peft.LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=target
    )
    peft.inject_adapter_in_model(config, model)
    del model.peft_config  # what peft keeps for several adapters
    for layer in _adapters(model):
        layer.cast_input_dtype_enabled = False  # else a float32 copy of each input in mixed precision
    if not model.vision_model.embeddings.convolution.weight.is_contiguous():
        model.vision_model.to(memory_format=torch.channels_last)  # the adapters too: so lie their gradients


def has_lora(model: nn.Module) -> bool:
    """True where a model has adapters that are not merged."""
    return has_adapters(name for name, _ in model.named_parameters())


def has_adapters(names: Iterable[str]) -> bool:
    """True where names of weights, as of a state dict, are those of a model with adapters."""
    return any(MARK in name for name in names)


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add the adapters to the weights and take them out, in place: the state dict is AlignModel's again.

    A model without adapters stays as it is.
    """
    if not has_lora(model):
        return
    for layer in _adapters(model):
        layer.merge()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if hasattr(child, "lora_A"):
                setattr(parent, name, child.base_layer)


def _adapters(model: nn.Module) -> list[Any]:
    return [layer for layer in model.modules() if hasattr(layer, "lora_A")]


def _named(model: nn.Module, part: str, kind: type[nn.Module]) -> list[tuple[str, nn.Module]]:
    layers = model.get_submodule(part).named_modules(prefix=part)
    return [(name, layer) for name, layer in layers if isinstance(layer, kind)]


def _peft() -> ModuleType:
    try:
        import peft  # late: it is optional
    except ImportError as error:
        raise ValueError(f"LoRA needs the library peft ({error}): pip install 'align-train[lora]'") from error
    return peft
