"""From a preset to a model that is ready to train."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import yaml
from transformers import AlignConfig

from align_train.models.align import Align, vision_width
from align_train.models.fast_text import repair_last_layer
from align_train.models.fast_vision import repair_depthwise_gradient, repair_squeeze
from align_train.models.initialisation import initialise_small_text, initialise_vision
from align_train.models.repairs import (
    repair_attention,
    repair_batch_norm,
    repair_checkpointing,
    repair_pooling,
    repair_stochastic_depth,
    repair_text_pooler,
)
from align_train.records import Preprocessing
from align_train.shipped import config_folder

Spec = TypeVar("Spec")


@dataclasses.dataclass(frozen=True)
class Vision:
    """EfficientNet's size and regularisation.

    Attributes:
        width: multiplier of the channels (B0 1.0, B7 2.0; arXiv 1905.11946).
        depth: multiplier of the blocks a stage (B0 1.0, B7 3.1).
        stochastic_depth: drop rate of the last block; earlier ones rise linearly to it (Keras: drop_connect_rate).
        channels_last: keep weights and activations in NHWC memory, faster on CPU and on tensor cores.
    """

    width: float
    depth: float
    stochastic_depth: float
    channels_last: bool


@dataclasses.dataclass(frozen=True)
class Text:
    """BERT's size and regularisation (mini 4 x 256, base 12 x 768, large 24 x 1024).

    Attributes:
        layers: number of transformer layers.
        width: hidden size; the feed-forward layers are four times as wide.
        heads: attention heads; must divide the width.
        dropout: rate in hidden layers and attention.
        positions: longest sequence, in tokens.
        vocabulary: number of WordPiece tokens; 30,522 in the shipped one.
        initialisation: bert (std 0.02), or small (for a few narrow layers trained from scratch).
    """

    layers: int
    width: int
    heads: int
    dropout: float
    positions: int
    vocabulary: int
    initialisation: str


@dataclasses.dataclass(frozen=True)
class BatchNorm:
    """Which statistics batch norm uses in training; see `repair_batch_norm`."""

    statistics: str
    group_size: int
    momentum: float


@dataclasses.dataclass(frozen=True)
class Temperature:
    """The learned divisor of the logits: where it starts, and the bounds it is kept within."""

    start: float
    lower: float
    upper: float


def build(preset: str) -> Align:
    """Build a preset of configs/model/, e.g. `build("align_b7_base")`, with fresh weights from torch's generator.

    Raises:
        ValueError: there is no such preset; the message lists them.
    """
    path = config_folder() / "model" / f"{preset}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
        raise ValueError(f"no model preset {preset!r}; there are {known}")
    recipe = yaml.safe_load(path.read_text())
    recipe.pop("_target_")
    return build_align(**recipe)


def build_align(
    vision: Mapping[str, Any],
    text: Mapping[str, Any],
    batch_norm: Mapping[str, Any],
    temperature: Mapping[str, Any],
    preprocessing: Mapping[str, Any],
    projection_dim: int,
    gradient_checkpointing: bool = False,
) -> Align:
    """Build ALIGN from the nodes of a model YAML: transformers' model, every repair, Keras's start values.

    Args:
        vision: see `Vision`.
        text: see `Text`.
        batch_norm: see `BatchNorm`.
        temperature: see `Temperature`.
        preprocessing: see `align_train.records.Preprocessing`.
        projection_dim: width D of the embeddings; must be the image tower's width.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.

    Raises:
        ValueError: an unknown or missing key, a width mismatch, or a value out of range, each with its numbers.
    """
    image, words = read_node(Vision, "vision", vision), read_node(Text, "text", text)
    norm, heat = read_node(BatchNorm, "batch_norm", batch_norm), read_node(Temperature, "temperature", temperature)
    inputs = read_node(Preprocessing, "preprocessing", preprocessing)
    if words.positions < 64:
        raise ValueError(
            f"model.text.positions is {words.positions}; transformers' AlignProcessor pads to 64, so give at least 64"
        )
    if inputs.max_tokens > words.positions:
        raise ValueError(
            f"model.preprocessing.max_tokens is {inputs.max_tokens}, but the text tower has model.text.positions="
            f"{words.positions}: raise positions or shorten the captions"
        )
    if words.width % words.heads:
        raise ValueError(f"model.text.width {words.width} is not a multiple of model.text.heads {words.heads}")
    config = _transformers_config(image, words, heat, inputs, projection_dim)
    model = Align(config, inputs, (heat.lower, heat.upper))
    repair(model, norm, gradient_checkpointing)
    initialise_vision(model)
    if words.initialisation == "small":
        initialise_small_text(model)
    elif words.initialisation != "bert":
        raise ValueError(f"model.text.initialisation is {words.initialisation!r}; it must be bert or small")
    if image.channels_last:
        model.vision_model.to(memory_format=torch.channels_last)
    return model


def repair(model: Align, norm: BatchNorm, gradient_checkpointing: bool = False) -> None:
    """Every repair, in one place; none changes a state-dict key."""
    repair_batch_norm(model, norm.statistics, norm.group_size, norm.momentum)
    repair_stochastic_depth(model)
    repair_attention(model)
    repair_pooling(model)
    repair_squeeze(model)
    repair_depthwise_gradient(model)
    repair_text_pooler(model)
    repair_last_layer(model)
    if gradient_checkpointing:
        repair_checkpointing(model)


def _transformers_config(
    image: Vision, words: Text, heat: Temperature, inputs: Preprocessing, projection_dim: int
) -> AlignConfig:
    vision_config = {
        "image_size": inputs.crop,
        "width_coefficient": image.width,
        "depth_coefficient": image.depth,
        "drop_connect_rate": image.stochastic_depth,
        "hidden_dim": 4 * vision_width(image.width),
        "batch_norm_momentum": 0.01,
    }
    text_config = {
        "vocab_size": words.vocabulary,
        "hidden_size": words.width,
        "num_hidden_layers": words.layers,
        "num_attention_heads": words.heads,
        "intermediate_size": 4 * words.width,
        "max_position_embeddings": words.positions,
        "hidden_dropout_prob": words.dropout,
        "attention_probs_dropout_prob": words.dropout,
    }
    return AlignConfig(
        text_config=text_config,
        vision_config=vision_config,
        projection_dim=projection_dim,
        temperature_init_value=heat.start,
    )


def read_node(kind: type[Spec], name: str, values: Mapping[str, Any]) -> Spec:
    """A dataclass from the node `model.NAME` of a recipe; ValueError for an unknown or missing key."""
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - known):
        raise ValueError(f"unknown key model.{name}.{unknown[0]}; known are {', '.join(sorted(known))}")
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"model.{name}: {error}") from error
