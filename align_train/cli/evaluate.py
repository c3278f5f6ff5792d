"""`align-train evaluate`: score a model."""

from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.fabric import Fabric
from omegaconf import DictConfig

from align_train.cli.models import Examined, is_checkpoint, load_examined, newest_run, run_folder
from align_train.cli.scoring import build_exams, facts_of, known_result, tell, tell_report, write_result
from align_train.data import Inputs
from align_train.distributed import on_rank_zero, rank
from align_train.engine import keep_freed_memory, needs_recalibration
from align_train.engine.checkpoints import checkpoint_of
from align_train.engine.recalibration import RUNNING
from align_train.evaluation import EmbeddingFolder, Encoder, Encoding, check_exams, take_exams


def evaluate(config: DictConfig) -> None:
    """Take the exams on all ranks; print them, write result.json, report and contact sheets."""
    if not config.exams:
        raise ValueError("no exam is chosen: give exams=[retrieval_sample], or a file of your own in --config-dir")
    exams, encoding = build_exams(config.exams), instantiate(config.encoding)
    device = start_ranks(config)
    source = newest_run(config.checkpoint)
    examined = load_examined(source)
    facts, where = {**facts_of(examined.model), **training_of(examined)}, origin(source, examined)
    folder = on_rank_zero(lambda: ready_folder(config, source, facts["weights_sha256"]))
    check_exams(exams)
    if device.type == "cpu":
        keep_freed_memory()
    examined.model.to(device)
    kept = kept_embeddings(config.embed, facts["weights_sha256"], examined.inputs, encoding)
    taken = take_exams(exams, Encoder(examined.model, examined.inputs, device, encoding, kept))
    if rank() == 0:
        result = write_result(folder, taken.entries, facts, where)
        taken.draw(folder)
        tell(result)
        tell_report(folder)


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


def ready_folder(config: DictConfig, source: str, digest: str) -> Path:
    """Where results go, made, with a result.json that more can be added to, if there is one.

    Raises:
        ValueError: that file is not of this program: now instead of after all exams.
    """
    folder = result_folder(config, Path(source), digest)
    folder.mkdir(parents=True, exist_ok=True)
    known_result(folder)
    return folder


def result_folder(config: DictConfig, source: Path, digest: str) -> Path:
    """As asked for, the run that results are of, or Hydra's new folder.

    A run's result.json is of what the run stands for (`checkpoint_of`): other checkpoints get RUN/evaluate/NAME.
    """
    if config.folder or not is_checkpoint(source):
        return Path(config.folder or HydraConfig.get().runtime.output_dir)
    run = run_folder(source)
    if source.is_dir() or source.samefile(checkpoint_of(run)) or known_result(run).get("weights_sha256") == digest:
        return run
    return run / "evaluate" / source.stem


def training_of(examined: Examined) -> dict[str, Any]:
    """What is known of a model's training, for result.json."""
    if examined.trained is None:
        return {}
    recipe, steps = examined.trained.recipe, examined.trained.steps
    return {
        "name": recipe.name,
        "seed": recipe.seed,
        "steps": steps,
        "batch_size": recipe.data.batch_size,
        "pairs_seen": steps * recipe.data.batch_size,
    }


def origin(source: str, examined: Examined) -> dict[str, str]:
    """Where the weights were, and what their batch-norm statistics are, for the exams' entries in result.json."""
    trained = examined.trained
    if trained is None:
        return {"checkpoint": source}
    if trained.statistics or not needs_recalibration(trained.model, trained.steps):
        return {"checkpoint": source, "batch_norm": trained.statistics or RUNNING}
    if rank() == 0:  # `export` recalibrates, this does not
        print(f"note: {trained.steps} steps are too few to warm up the batch-norm statistics, so scores may be low")
    return {"checkpoint": source, "batch_norm": f"{RUNNING}, which so few steps do not warm up"}


def kept_embeddings(folder: str | None, digest: str, inputs: Inputs, encoding: Encoding) -> EmbeddingFolder | None:
    """Where embeddings are kept, by what they depend on."""
    if folder is None:
        return None
    facts = {"weights_sha256": digest, "preprocessing": inputs.facts(), "precision": encoding.precision}
    return EmbeddingFolder(Path(folder), facts)
