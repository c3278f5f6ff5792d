"""What fine-tuning starts from: a model of transformers, a checkpoint of ours, or two parts."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from align_train.cli.models import build_model, is_checkpoint, load_model, newest_run
from align_train.distributed import rank
from align_train.engine import read_checkpoint
from align_train.files import atomic_write
from align_train.hub import align_node, load_hf, load_parts
from align_train.models import Align


@dataclass(frozen=True)
class Start:
    """A model to fine-tune.

    Attributes:
        name: where it is from.
        model: with its weights, on the CPU.
        node: the settings that build it again, without its weights.
        told: what the user should know of it.
    """

    name: str
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
        return Start(f"{image} and {text}", made, node, told)
    source = newest_run(model)
    if not is_checkpoint(Path(source)):
        name = str(Path(source).absolute()) if Path(source).is_dir() else source
        return Start(name, load_hf(source), align_node(source))
    loaded = load_model(Path(source))
    return Start(str(Path(source).absolute()), loaded.model, _plain(loaded.recipe.model))


def weights_of(model: Align) -> dict[str, Tensor]:
    """A copy of the weights."""
    return {name: value.detach().clone().contiguous() for name, value in model.state_dict().items()}


def keep_start(name: str, weights: dict[str, Tensor], run: Path) -> None:
    """Write RUN/start.safetensors, which a resumed run goes by, whatever becomes of the source."""
    if rank() == 0 and not (run / "start.safetensors").is_file():
        run.mkdir(parents=True, exist_ok=True)
        with atomic_write(run / "start.safetensors") as file:
            file.write(save(weights, {"start": name}))


def kept_start(run: Path) -> Start:
    """The start of a run that is resumed, as it was."""
    recipe = OmegaConf.create(read_checkpoint(run / "checkpoints" / "last.ckpt")["recipe"])
    node, file = _plain(recipe.model), run / "start.safetensors"
    model = build_model(node)
    model.load_state_dict(load_file(file))
    with safe_open(file, "pt") as opened:
        name = opened.metadata()["start"]
    return Start(name, model, node)


def _plain(node: DictConfig) -> dict[str, Any]:
    """A node as plain values."""
    values = OmegaConf.to_container(node, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}
