"""`align-train evaluate`: score a model."""

from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.fabric import Fabric
from omegaconf import DictConfig

from align_train.cli.models import Examined, is_checkpoint, load_examined, newest_run, run_folder
from align_train.cli.scoring import build_exams, facts_of, tell, write_result
from align_train.distributed import rank
from align_train.engine import keep_freed_memory, needs_recalibration
from align_train.engine.recalibration import RUNNING
from align_train.evaluation import EmbeddingFolder, Encoder, take_exams


def evaluate(config: DictConfig) -> None:
    """Take the exams on all ranks; print them, write result.json, report and contact sheets."""
    if not config.exams:
        raise ValueError("no exam is chosen: give exams=[retrieval_sample], or a file of your own in --config-dir")
    exams, encoding = build_exams(config.exams), instantiate(config.encoding)
    device = start_ranks(config)
    source = newest_run(config.checkpoint)
    folder = result_folder(config, source)
    examined = load_examined(source)
    if device.type == "cpu":
        keep_freed_memory()
    examined.model.to(device)
    facts = {**facts_of(examined.model, examined.inputs, encoding, device), **origin(source, examined)}
    encoder = Encoder(examined.model, examined.inputs, device, encoding, kept(config.embed, facts))
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    entries = take_exams(exams, encoder, folder)
    if rank() == 0:
        tell(folder, write_result(folder, entries, facts))


def start_ranks(config: DictConfig) -> torch.device:
    """Start the processes that share the work, if there are to be several; the device of this one.

    Raises:
        ValueError: a device or a number of them that is not there.
    """
    usable = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if config.device not in ("auto", *usable):
        raise ValueError(f"device is {config.device!r}, but this machine has {' and '.join(usable)}")
    kind = usable[-1] if config.device == "auto" else config.device
    if (config.devices, config.num_nodes) == (1, 1):
        return torch.device(kind)
    fabric = Fabric(accelerator=kind, devices=config.devices, num_nodes=config.num_nodes, strategy="ddp")
    fabric.launch()
    return fabric.device


def result_folder(config: DictConfig, source: str) -> Path:
    """Where results go: as asked for, the run they are of, or Hydra's new folder."""
    run = run_folder(Path(source)) if is_checkpoint(Path(source)) else None
    return Path(config.folder or run or HydraConfig.get().runtime.output_dir)


def origin(source: str, examined: Examined) -> dict[str, Any]:
    """What is known of a model's training, for result.json."""
    if examined.trained is None:
        return {"checkpoint": source}
    recipe, steps = examined.trained.recipe, examined.trained.steps
    cold = needs_recalibration(examined.trained.model, steps) and Path(source).suffix == ".ckpt"
    if cold and rank() == 0:  # `export` recalibrates, this does not
        print(f"note: {steps} steps are too few to warm up the batch-norm statistics, so scores may be low")
    return {
        "checkpoint": source,
        "batch_norm": RUNNING + (", which so few steps do not warm up" if cold else ""),
        "name": recipe.name,
        "seed": recipe.seed,
        "steps": steps,
        "batch_size": recipe.data.batch_size,
        "pairs_seen": steps * recipe.data.batch_size,
    }


def kept(folder: str | None, facts: dict[str, Any]) -> EmbeddingFolder | None:
    """Where embeddings are kept, by what they depend on."""
    if folder is None:
        return None
    return EmbeddingFolder(
        Path(folder), {name: facts[name] for name in ("weights_sha256", "preprocessing", "precision")}
    )
