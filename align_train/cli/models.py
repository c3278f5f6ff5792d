"""From a config, a checkpoint or a Hugging Face folder to a model."""

from dataclasses import dataclass
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from align_train.engine import PairData, StreamData, load_weights, read_checkpoint
from align_train.hub import load_hf
from align_train.models import Align


@dataclass(frozen=True)
class Loaded:
    """A model, and for one of our checkpoints its recipe and the steps it was trained."""

    model: Align
    recipe: DictConfig | None
    steps: int


def build_model(config: DictConfig) -> Align:
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


def newest_run(source: str) -> str:
    """The newest run below a folder of runs, such as outputs/sample; anything else as it is."""
    folder = Path(source)
    runs = [run for run in folder.iterdir() if is_run(run)] if folder.is_dir() and not is_run(folder) else []
    if not runs:
        return source
    newest = max(runs, key=lambda run: (run / "checkpoints" / "last.ckpt").stat().st_mtime)
    print(f"the newest of {len(runs)} runs in {folder}: {newest}")
    return str(newest)


def load_model(source: str) -> Loaded:
    """A run folder, a .ckpt file, an exported folder or a hub id.

    Raises:
        FileNotFoundError: a run folder without a checkpoint, or a .ckpt file that is not there.
        ValueError: the file does not hold a model of ours.
        OSError: transformers finds neither a folder nor a repository of that name.
    """
    path = Path(source)
    if path.suffix != ".ckpt" and not (path / "checkpoints").is_dir():
        return Loaded(load_hf(source), None, 0)
    checkpoint = read_checkpoint(path)
    recipe = OmegaConf.create(checkpoint["recipe"])
    assert isinstance(recipe, DictConfig)
    model = build_model(recipe.model)
    load_weights(model, checkpoint, path)
    return Loaded(model, recipe, int(checkpoint["global_step"]))


def choose_device(name: str) -> torch.device:
    """`auto` is a GPU if there is one; ValueError for a device that is not there."""
    usable = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if name != "auto" and name.partition(":")[0] not in usable:
        raise ValueError(f"device is {name!r}, but this machine has {' and '.join(usable)}")
    return torch.device(usable[-1] if name == "auto" else name)
