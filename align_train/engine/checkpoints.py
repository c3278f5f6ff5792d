"""Checkpoints on disk: whole or not there, and read without running code."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import nn

from align_train.files import atomic_write

log = logging.getLogger(__name__)

MODEL = "model."  # before the names of its weights in a training's state dict


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary name, flushes to disk, renames; reads tensors and plain values only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save so that `path` is either the old file or the whole new one, whatever happens in between."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Load with `weights_only=True`, always."""
        return read_checkpoint(Path(path), map_location)


def checkpoint_of(run: Path) -> Path:
    """The file that a run folder stands for: what fine-tuning recommends, else the newest."""
    recommended = run / "checkpoints" / "recommended.ckpt"
    return recommended if recommended.is_file() else recommended.with_name("last.ckpt")


def newest_checkpoint(run: Path) -> Path | None:
    """The file to go on from: of last.ckpt and best.ckpt the one of the later step; None where there is neither.

    Of one step best.ckpt is the later one: it is saved after the validation.

    One that cannot be read, as after a failure of the disk, is told and passed over.

    Raises:
        OSError: one cannot be read just now.
        ValueError: there are some, and none can be read.
    """
    steps, problems = dict[Path, int](), list[str]()
    for file in (run / "checkpoints" / "best.ckpt", run / "checkpoints" / "last.ckpt"):
        if file.is_file():
            try:
                steps[file] = read_checkpoint(file, mmap=True)["global_step"]
            except ValueError as problem:
                problems.append(str(problem))
    if problems and not steps:
        raise ValueError(f"nothing to go on from: {'; '.join(problems)}")
    for told in problems:
        log.warning("passed over: %s", told)
    return max(steps, key=lambda file: steps[file]) if steps else None


def read_checkpoint(path: Path, map_location: Any = "cpu", mmap: bool = False) -> dict[str, Any]:
    """The checkpoint in a file, or that of a run folder, see `checkpoint_of`.

    Args:
        path: of either.
        map_location: device that tensors go to.
        mmap: read of the tensors only what is used.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read just now.
        ValueError: the file is not a checkpoint of ours.
    """
    file = checkpoint_of(path) if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"no checkpoint at {file}: give a run folder or a .ckpt file in its checkpoints/")
    try:
        checkpoint: dict[str, Any] = torch.load(file, map_location=map_location, weights_only=True, mmap=mmap)
    except OSError:  # the disk may be there again at the next start
        raise
    except Exception as error:
        raise ValueError(f"{file} is not a readable checkpoint ({error}): is it whole, and of align_train?") from error
    if not isinstance(checkpoint, dict) or "recipe" not in checkpoint:
        raise ValueError(f"{file} holds no recipe: it is not a checkpoint of align_train")
    return checkpoint


def load_weights(model: nn.Module, checkpoint: dict[str, Any], path: Path) -> None:
    """Put a checkpoint's weights into a model.

    Raises:
        ValueError: it is a checkpoint of another model; names the first weight that does not fit.
    """
    model.load_state_dict(check_fit(model, checkpoint, path))


def check_fit(model: nn.Module, checkpoint: dict[str, Any], path: Path) -> dict[str, torch.Tensor]:
    """The checkpoint's weights of the model by its names, without those of what was trained beside it.

    Raises:
        ValueError: one is missing, unknown or of another shape; the first is named.
    """
    wanted = model.state_dict()
    found, _ = parted(checkpoint["state_dict"])
    for name in [*wanted, *found]:
        shapes = [tuple(weights[name].shape) if name in weights else "absent" for weights in (wanted, found)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{path} is a checkpoint of another model: {name} is {shapes[0]} in the model and {shapes[1]} in the "
                "checkpoint. Choose the model it was trained with (model=...), or another checkpoint"
            )
    return found


def of_training(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model's state dict by the names that a training's has."""
    return {MODEL + name: value for name, value in weights.items()}


def parted(weights: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights of a training's state dict: the model's by its own names, and the others."""
    own = {name.removeprefix(MODEL): value for name, value in weights.items() if name.startswith(MODEL)}
    return own, {name: value for name, value in weights.items() if not name.startswith(MODEL)}
