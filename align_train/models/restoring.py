"""From transformers' own config, as plain values, to a repaired model: what a recipe says of its start."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AlignConfig, PreTrainedConfig

from align_train.models.align import Align
from align_train.models.building import BatchNorm, read_node, repair
from align_train.records import Preprocessing

REFERENCE_BATCH_NORM = BatchNorm("virtual", group_size=16, momentum=0.01)  # as Kakao Brain trained


def restore_align(
    config: Mapping[str, Any],
    preprocessing: Mapping[str, Any],
    batch_norm: Mapping[str, Any],
    temperature_bounds: Sequence[float],
    gradient_checkpointing: bool = False,
    channels_last: bool = True,
) -> Align:
    """Build a model that weights of transformers fit, with every repair; its own weights are fresh.

    `build_align` makes a model of sizes, with the start values of training from scratch; this makes one of any
    AlignConfig, for weights that come from elsewhere. A run that starts from a folder has it as its model node, so its
    checkpoints need neither the folder nor the repository.

    Args:
        config: keyword arguments of transformers' AlignConfig, such as `restoring_settings` gives.
        preprocessing: see `align_train.records.Preprocessing`.
        batch_norm: see `align_train.models.building.BatchNorm`.
        temperature_bounds: lowest and highest temperature; must contain `config.temperature_init_value`.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
        channels_last: keep the image tower in NHWC memory, faster on CPU and on tensor cores.

    Raises:
        ValueError: an unknown or missing key of `preprocessing` or `batch_norm`, a width mismatch, a pooling that is
            no mean, bounds that leave out the start value, or captions longer than the text tower takes.
    """
    inputs = read_node(Preprocessing, "preprocessing", preprocessing)
    norm = read_node(BatchNorm, "batch_norm", batch_norm)
    settings = AlignConfig(**config)
    if settings.vision_config.pooling_type != "mean":
        raise ValueError(
            f"the image tower pools by {settings.vision_config.pooling_type!r} (pooling_type), but only mean is trained"
        )
    if inputs.max_tokens > settings.text_config.max_position_embeddings:
        raise ValueError(
            f"model.preprocessing.max_tokens is {inputs.max_tokens}, but the text tower has "
            f"{settings.text_config.max_position_embeddings} positions: lower max_tokens"
        )
    lower, upper = temperature_bounds
    model = Align(settings, inputs, (lower, upper))
    repair(model, norm, gradient_checkpointing)
    if channels_last:
        model.vision_model.to(memory_format=torch.channels_last)
    return model


def restoring_settings(
    config: AlignConfig, preprocessing: Preprocessing, temperature_bounds: tuple[float, float]
) -> dict[str, Any]:
    """What `restore_align` takes, as values that YAML and JSON can hold; batch norm as the reference trained."""
    return {
        "config": {
            **_own_values(config),
            "text_config": _own_values(config.text_config),
            "vision_config": _own_values(config.vision_config),
        },
        "preprocessing": dataclasses.asdict(preprocessing),
        "batch_norm": dataclasses.asdict(REFERENCE_BATCH_NORM),
        "temperature_bounds": list(temperature_bounds),
        "gradient_checkpointing": False,
        "channels_last": True,
    }


def _own_values(config: PreTrainedConfig) -> dict[str, Any]:
    """All that a kind of config adds to what every config has; JSON makes lists of tuples."""
    names = config_fields(type(config)) - config_fields(PreTrainedConfig)
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {name: value for name, value in values.items() if name in names}


def config_fields(kind: type[PreTrainedConfig]) -> set[str]:
    """Names of the settings that a kind of config has."""
    return {field.name for field in dataclasses.fields(kind)}
