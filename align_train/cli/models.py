"""From a config, a checkpoint or a Hugging Face folder to a model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from align_train.data import AlignInputs, Inputs
from align_train.distributed import rank
from align_train.engine import (
    AtomicCheckpointIO,
    PairData,
    StreamData,
    load_weights,
    of_training,
    parted,
    read_checkpoint,
)
from align_train.hub import load_dual_encoder
from align_train.models import Align, has_adapters, merge_lora
from align_train.models.class_head import ClassHead

HEAD = "head."  # before the names of a classifier's weights in a training's state dict


@dataclass(frozen=True)
class Loaded:
    """A model of one of our checkpoints, and what the checkpoint says of it.

    Attributes:
        model: on the CPU.
        recipe: the settings it was trained with.
        steps: that it was trained.
        statistics: what its batch-norm statistics are; None where that was not settled, in the middle of training.
        beside: weights of what was trained beside it.
        head: the classifier that these are of; None where there is none.
    """

    model: Align
    recipe: DictConfig
    steps: int
    statistics: str | None = None
    beside: Mapping[str, torch.Tensor] = field(default_factory=dict)
    head: ClassHead | None = None


def build_model(config: DictConfig | Mapping[str, Any]) -> Align:
    """A fresh model of a model node."""
    model: Align = instantiate(config, _convert_="all")
    return model


def open_data(config: DictConfig, model: Align, micro_batch: int | None = None) -> PairData | StreamData:
    """The data module of a data node, for the inputs this model takes and the pairs a device takes at once.

    A partial, since `instantiate` would turn the dataclass into a dictionary.
    """
    data: PairData | StreamData = instantiate(config, _partial_=True, _convert_="all")(
        preprocessing=model.preprocessing, micro_batch=micro_batch
    )
    return data


def is_run(path: Path) -> bool:
    """True for the folder of a run that has saved a checkpoint."""
    return (path / "checkpoints" / "last.ckpt").is_file()


def is_checkpoint(path: Path) -> bool:
    """True for what is meant as a checkpoint of ours: a .ckpt file or a run folder."""
    return path.suffix == ".ckpt" or (path / "checkpoints").is_dir()


def run_folder(checkpoint: Path) -> Path:
    """The run a checkpoint belongs to."""
    return checkpoint if checkpoint.is_dir() else checkpoint.parent.parent


def newest_run(source: str) -> str:
    """The newest run below a folder of runs, such as outputs/sample; anything else as it is."""
    folder = Path(source)
    runs = [run for run in folder.iterdir() if is_run(run)] if folder.is_dir() and not is_run(folder) else []
    if not runs:
        return source
    newest = max(runs, key=lambda run: (run / "checkpoints" / "last.ckpt").stat().st_mtime)
    if rank() == 0:
        print(f"the newest of {len(runs)} runs in {folder}: {newest}")
    return str(newest)


def load_model(path: Path) -> Loaded:
    """A run folder or a .ckpt file.

    Raises:
        FileNotFoundError: a run folder without a checkpoint, or a file that is not there.
        ValueError: the file does not hold a model of ours.
    """
    checkpoint = read_checkpoint(path)
    recipe = OmegaConf.create(checkpoint["recipe"])
    assert isinstance(recipe, DictConfig)
    model = build_model(recipe.model)
    if has_adapters(checkpoint["state_dict"]):
        instantiate(recipe.tuning).prepare(model)
    load_weights(model, checkpoint, path)
    merge_lora(model)
    _, beside = parted(checkpoint["state_dict"])
    head = None
    if classes := checkpoint.get("classes"):
        head = ClassHead.of(classes, {name.removeprefix(HEAD): value for name, value in beside.items()})
    statistics = checkpoint.get("statistics") or None
    return Loaded(model, recipe, int(checkpoint["global_step"]), statistics, beside, head)


def save_model(
    model: Align, recipe: DictConfig, steps: int, statistics: str, path: Path, head: ClassHead | None = None
) -> None:
    """Write weights alone, a classifier's too, as a checkpoint, which `load_model` reads and no run goes on from."""
    weights = of_training(model.state_dict())
    told = {"recipe": OmegaConf.to_yaml(recipe, resolve=True), "global_step": steps, "statistics": statistics}
    if head is not None:
        weights |= {HEAD + name: value for name, value in head.state_dict().items()}
        told["classes"] = list(head.classes)
    weights = {name: value.cpu() for name, value in weights.items()}
    AtomicCheckpointIO().save_checkpoint({"state_dict": weights, **told}, path)


@dataclass(frozen=True)
class Examined:
    """A model to be scored, what makes its inputs, and, of a checkpoint of ours, where it comes from."""

    model: torch.nn.Module
    inputs: Inputs
    trained: Loaded | None = None


def load_examined(source: str) -> Examined:
    """A run folder, a .ckpt file, or any dual encoder of transformers: a folder or a hub id.

    Raises:
        FileNotFoundError: a run folder without a checkpoint, or a .ckpt file that is not there.
        ValueError: it is not such a model.
        OSError: transformers finds neither a folder nor a repository of that name.
    """
    if is_checkpoint(Path(source)):
        trained = load_model(Path(source))
        return Examined(trained.model, AlignInputs(trained.model.preprocessing), trained)
    encoder = load_dual_encoder(source)
    return Examined(encoder, encoder.inputs)
