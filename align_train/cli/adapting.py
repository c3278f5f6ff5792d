"""What a fine-tuning run does by itself where batches are small or memory is short; it says so."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, open_dict

from align_train.cli.models import build_model
from align_train.cli.starting import Start
from align_train.engine.budget import memory_there
from align_train.engine.rehearsal import images_at_once, seconds_a_pair
from align_train.models import Align
from align_train.models.memory import memory_of

AT_REST = ("frozen", "lora")  # towers whose statistics are not touched
SPLITTING = ("virtual", "frozen")  # statistics that do not change when a batch is embedded in parts


def adapt(config: DictConfig, start: Start) -> Start:
    """The start with the batch norm that the run trains with; settles `step.micro_batch` and adds `model`.

    Args:
        config: of `finetune`; changed.
        start: what was loaded.
    """
    node = dict(start.node)
    if isinstance(config.gradient_checkpointing, bool):
        node["gradient_checkpointing"] = config.gradient_checkpointing
    settings: dict[str, Any] = dict(node["batch_norm"])
    at_once, told = _at_once(config, start.model), list(start.told)
    wanted, local = config.batch_norm.statistics, config.data.batch_size // ranks_of(config)
    if config.tuning.image in AT_REST:  # the tuning says so
        settings["statistics"] = "frozen"
    elif wanted != "auto":
        settings["statistics"] = wanted
        told.append(f"batch norm: {wanted} statistics, as batch_norm.statistics says")
    elif at_once < config.batch_norm.frozen_below or (at_once < local and settings["statistics"] not in SPLITTING):
        settings["statistics"] = "frozen"
        told.append(
            f"batch norm: statistics frozen, for a device takes {at_once:,} images at once (batch_norm.frozen_below="
            f"{config.batch_norm.frozen_below}, batch_norm.statistics=auto); its weights and biases are trained"
        )
    else:
        told.append(f"batch norm: {settings['statistics']} statistics, as the start was trained")
    model = build_model({**node, "batch_norm": settings})
    model.load_state_dict(start.model.state_dict())
    adapted = replace(start, model=model, node={**node, "batch_norm": settings}, told=told)
    at_once = _at_once(config, adapted.model)
    if at_once < local:
        adapted.told.append(
            f"a batch of {config.data.batch_size:,} pairs is embedded in parts of {at_once:,} a device and compared as "
            "a whole (step.micro_batch)"
        )
    with open_dict(config):
        config.model, config.step.micro_batch = adapted.node, at_once if at_once < local else None
    return adapted


def estimates(config: DictConfig, model: Align) -> Iterator[str]:
    """Lines on the time and the memory that training will take; `config` is adapted."""
    device, precision, ranks = device_of(config), config.trainer.precision, ranks_of(config)
    local = config.data.batch_size // ranks
    seconds = config.max_steps * local * seconds_a_pair(model, precision, device)
    again = config.step.micro_batch is not None
    if again:  # forward, forward and backward: four instead of three
        seconds *= 4 / 3
    yield (
        f"training about {told_seconds(seconds)}: {config.max_steps:,} steps of {config.data.batch_size:,} pairs, as "
        "fast as a few pairs were just now; exams come on top of it"
    )
    micro, rows = config.step.micro_batch or local, config.loss.get("chunk_size")
    need = memory_of(model, precision).of(micro, local, config.data.batch_size, rows)
    yield f"memory about {need / 1e9:,.3g} GB a device, of {memory_there(device, ranks) / 1e9:,.3g} GB that are there"


def told_seconds(seconds: float) -> str:
    """`40 s`, `12 min`, `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def device_of(config: DictConfig) -> torch.device:
    """What the trainer will use; known before there is one."""
    usable = torch.cuda.is_available() and config.trainer.accelerator in ("auto", "gpu", "cuda")
    return torch.device("cuda" if usable else "cpu")


def ranks_of(config: DictConfig) -> int:
    """How many processes will train; likewise."""
    devices = config.trainer.devices
    if not isinstance(devices, int):
        listed = len(devices) if not isinstance(devices, str) else 0
        devices = listed or (torch.cuda.device_count() if device_of(config).type == "cuda" else 1)
    if devices == -1:
        devices = torch.cuda.device_count()
    return max(devices, 1) * config.trainer.num_nodes


def _at_once(config: DictConfig, model: Align) -> int:
    """Pairs that a device takes at once: as the settings say, or what fits of a model that is tuned so."""
    ranks = ranks_of(config)
    if config.step.micro_batch != "auto":
        return min(config.step.micro_batch or config.data.batch_size, config.data.batch_size // ranks)
    tuned = copy.deepcopy(model)
    instantiate(config.tuning, _convert_="all").prepare(tuned)
    rows = config.loss.get("chunk_size")
    return images_at_once(tuned, config.trainer.precision, config.data.batch_size, ranks, device_of(config), rows)
