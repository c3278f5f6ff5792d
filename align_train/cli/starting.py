"""What fine-tuning starts from: a model of transformers, a checkpoint of ours, or two parts."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from align_train.cli.models import build_model, is_checkpoint, load_model, newest_run
from align_train.engine import needs_recalibration, read_checkpoint
from align_train.files import atomic_write
from align_train.hub import align_node, load_hf, load_parts
from align_train.models import Align
from align_train.processes import is_first_process

MADE_BY = ("start", "pairs", "check")  # nodes of the settings that decide what the pairs are


@dataclass(frozen=True)
class Start:
    """A model to fine-tune.

    Attributes:
        sources: where it is from: hub ids, or absolute paths; two where it was put together.
        model: with its weights, on the CPU.
        node: the settings that build it again, without its weights.
        told: what the user should know of it.
    """

    sources: tuple[str, ...]
    model: Align
    node: dict[str, Any]
    told: list[str] = field(default_factory=list)


def load_start(config: DictConfig) -> Start:
    """The model of a start node.

    Raises:
        ValueError: neither a model nor two parts are named, or both; what is named is of another architecture or
            vocabulary.
        OSError: it is not there.
    """
    model, image, text = config.model, config.image, config.text
    if (model is None) == (image is None and text is None) or (image is None) != (text is None):
        raise ValueError(
            f"start.model is {model}, start.image {image} and start.text {text}: name a whole model, or with "
            "start.model=null both an image and a text tower"
        )
    if model is None:
        made, node, told = load_parts(image, text)
        return Start((_named(image), _named(text)), made, node, told)
    source = newest_run(model)
    if not is_checkpoint(Path(source)):
        return Start((_named(source),), load_hf(source), align_node(source))
    loaded = load_model(Path(source))
    if loaded.statistics is None and needs_recalibration(loaded.model, loaded.steps):
        raise ValueError(
            f"{source} is of step {loaded.steps} of a run, too early for its batch-norm statistics, which fine-tuning "
            "goes by: export it first (`align-train export checkpoint=...` measures them), and start from that folder"
        )
    return Start((_named(source),), loaded.model, _plain(loaded.recipe.model))


def weights_of(model: Align) -> dict[str, Tensor]:
    """A copy of the weights."""
    return {name: value.detach().clone().contiguous() for name, value in model.state_dict().items()}


def keep_start(start: Start, weights: dict[str, Tensor], run: Path) -> None:
    """Write RUN/start.safetensors, which a resumed run goes by, whatever becomes of the source."""
    if is_first_process():
        run.mkdir(parents=True, exist_ok=True)
        with atomic_write(run / "start.safetensors") as file:
            file.write(save(weights, {"sources": json.dumps(start.sources)}))


def asked_for(config: DictConfig) -> DictConfig:
    """The settings that the pairs in a run folder were made by, resolved."""
    return OmegaConf.create({name: OmegaConf.to_container(config[name], resolve=True) for name in MADE_BY})


def kept_start(config: DictConfig, checkpoint: Path) -> Start:
    """The start of a run that is resumed from a checkpoint, as it was.

    Raises:
        ValueError: the settings name other pairs, or another start, than those that it goes on with.
    """
    run = Path(config.folder)
    recipe = OmegaConf.create(read_checkpoint(checkpoint, mmap=True)["recipe"])
    asked = asked_for(config)
    for name in MADE_BY:
        if recipe[name] != asked[name]:
            raise ValueError(
                f"resume={run} goes on with the pairs and the start that it has: leave out what changes {name}, or "
                "begin another run"
            )
    node, file = _plain(recipe.model), run / "start.safetensors"
    model = build_model(node)
    model.load_state_dict(load_file(file))
    with safe_open(file, "pt") as opened:
        sources = json.loads(opened.metadata()["sources"])
    return Start(tuple(sources), model, node)


def _named(source: str) -> str:
    """A hub id as it is; what lies here by its absolute path."""
    return str(Path(source).absolute()) if Path(source).exists() else source


def _plain(node: DictConfig) -> dict[str, Any]:
    """A node as plain values."""
    values = OmegaConf.to_container(node, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}
