"""`align-train train`: the main job as a table of contents."""

import re
import sys
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from omegaconf import DictConfig, OmegaConf

from align_train.cli.exporting import export_model, settle
from align_train.cli.models import build_model, load_model, open_data
from align_train.cli.scoring import build_exams, facts_of, tell, write_result
from align_train.data import AlignInputs
from align_train.distributed import is_sharded, rank
from align_train.engine import (
    AlignTraining,
    AtomicCheckpointIO,
    Budget,
    Examination,
    Execution,
    MetricsFile,
    Progress,
    StopOnNonFinite,
    StopOnSignal,
    check_fit,
    keep_freed_memory,
    read_checkpoint,
)
from align_train.evaluation import Encoding
from align_train.files import atomic_write
from align_train.models import Align


def train(config: DictConfig) -> None:
    """Build, fit, score, export."""
    check_lengths(config)
    folder = Path(config.folder)
    recipe = OmegaConf.to_yaml(config, resolve=True)
    torch.manual_seed(config.seed)
    model = build_model(config.model)
    execution: Execution = instantiate(config.step)
    execution.prepare(model)
    data = open_data(config.data, model, execution.micro_batch)
    module = AlignTraining(
        model,
        optimizer=instantiate(config.optimizer),
        schedule=instantiate(config.schedule),
        objective=instantiate(config.loss),
        seed=config.seed,
        centre_captions=config.centre_captions,
        recipe=recipe,
    )
    budget, stopping = Budget(config.loss.chunk_size), StopOnSignal(folder / "checkpoints")
    progress = Progress(budget)
    metrics = MetricsFile(folder)
    encoding: Encoding = instantiate(config.encoding)
    watched = config.best.by if config.best.by.startswith("exam/") else ""
    examination = Examination(
        build_exams(config.exams), encoding, folder, config.examine_every, watched, progress.throughput.go_on
    )
    callbacks = [budget, progress, stopping, examination]
    trainer = build_trainer(config, callbacks, metrics, validated=bool(data.validation))
    if trainer.strategy.root_device.type == "cpu":
        keep_freed_memory()
    resumed = resume_from(config, module, metrics)
    if trainer.is_global_zero:
        write_recipe(folder, recipe)
    trainer.fit(module, data, ckpt_path=resumed, weights_only=True)
    if stopping.stopped:
        if trainer.is_global_zero:
            print(f"stopped at step {trainer.global_step}; go on with: align-train train resume={folder}")
        sys.exit(130)
    module.model.to(trainer.strategy.root_device)
    statistics = settle(module.model, trainer.global_step, lambda: data)
    trainer.save_checkpoint(folder / "checkpoints" / "last.ckpt", weights_only=False)
    if is_sharded(module.model):
        model = load_model(folder).model.to(trainer.strategy.root_device)
    exams = examination.at_end(trainer, model)
    if rank() == 0:
        how = facts_of(model, AlignInputs(model.preprocessing), encoding, trainer.strategy.root_device)
        report(config, model, exams, {**facts(config, trainer, progress), **how, "batch_norm": statistics})


def check_lengths(config: DictConfig) -> None:
    """Raise ValueError for a length that is no positive whole number, and for what would not be exact here."""
    for key in ("max_steps", "checkpoint_every", "validate_every", "data.batch_size", "trainer.log_every_n_steps"):
        value = OmegaConf.select(config, key)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{key} is {value!r}; it must be a whole number of at least 1")
    every, by = config.examine_every, config.best.by
    if every is not None and (not isinstance(every, int) or every < 1):
        raise ValueError(f"examine_every is {every!r}; it must be a whole number of at least 1, or null")
    if by.startswith("exam/") and (every is None or by.split("/")[1] not in config.exams):
        raise ValueError(
            f"best.by is {by}, so set examine_every to a number of steps, and name an exam as exam/NAME/VALUE: there "
            f"are {', '.join(map(str, config.exams)) or 'none'}"
        )
    if not isinstance(config.seed, int) or config.seed < 0:
        raise ValueError(f"seed is {config.seed!r}; it must be a whole number of at least 0")
    if config.trainer.get("limit_train_batches") is not None:
        raise ValueError("trainer.limit_train_batches would begin the data anew: give the length as max_steps")
    if config.trainer.get("accumulate_grad_batches", 1) != 1:
        raise ValueError(
            "trainer.accumulate_grad_batches would leave each part only its own negatives: set step.micro_batch to the "
            "number of pairs that fit into memory, which gives the gradient of the whole batch"
        )
    strategy = config.trainer.get("strategy")
    name = strategy if isinstance(strategy, str) else OmegaConf.select(config, "trainer.strategy._target_")
    if re.search("fsdp|deepspeed|modelparallel", str(name), re.IGNORECASE):
        raise ValueError(
            f"trainer.strategy is {name}, which this program does not know how to shard its towers with: choose "
            "trainer=sharded, or DDP with step.micro_batch and model.gradient_checkpointing=true"
        )


def facts(config: DictConfig, trainer: Trainer, progress: Progress) -> dict[str, Any]:
    """What result.json says of the training."""
    return {
        "name": config.name,
        "seed": config.seed,
        "steps": trainer.global_step,
        "batch_size": config.data.batch_size,
        "checkpoint": str(Path(config.folder) / "checkpoints" / "last.ckpt"),
        **progress.facts(),
        **trainer.datamodule.facts(),
    }


def report(config: DictConfig, model: Align, exams: dict[str, Any], known: dict[str, Any]) -> None:
    """Sum up, and export."""
    folder = Path(config.folder)
    result = write_result(folder, exams, known)
    if config.export:
        exported = export_model(model, config, folder / "hf", known["steps"], exams)
        result = write_result(folder, exams, {**known, "export": exported})
    tell(folder, result)
    print(f"run folder: {folder}")


def build_trainer(config: DictConfig, callbacks: list[Callback], metrics: MetricsFile, validated: bool) -> Trainer:
    """Lightning's trainer with what every run has."""
    callbacks = [*callbacks, StopOnNonFinite(), *checkpoints(config, Path(config.folder), validated)]
    loggers: list[Logger] = [metrics, *(instantiate(node) for node in config.logger.values())]
    trainer: Trainer = instantiate(
        config.trainer,
        max_steps=config.max_steps,
        max_epochs=-1,  # lengths are in steps
        callbacks=callbacks,
        logger=loggers,
        plugins=plugins(),
        val_check_interval=config.validate_every,
        check_val_every_n_epoch=None,
        limit_val_batches=1.0 if validated else 0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # the sampler knows its rank
        enable_progress_bar=False,  # Progress draws it
        enable_model_summary=False,
    )
    return trainer


def plugins() -> list[Any]:
    """Atomic checkpoints; under SLURM without Lightning's requeueing, which can deadlock with several ranks."""
    slurm = [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []
    return [AtomicCheckpointIO(), *slurm]


def checkpoints(config: DictConfig, folder: Path, validated: bool) -> list[ModelCheckpoint]:
    """`last.ckpt` every so many steps, and `best.ckpt` by a metric of validation or of an exam."""
    last = ModelCheckpoint(
        folder / "checkpoints",
        filename="last",
        every_n_train_steps=config.checkpoint_every,
        enable_version_counter=False,
    )
    of_exam = config.best.by.startswith("exam/")
    best = ModelCheckpoint(
        folder / "checkpoints",
        filename="best",
        monitor=config.best.by,
        mode=config.best.mode,
        every_n_train_steps=config.examine_every if of_exam else None,
        auto_insert_metric_name=False,
        enable_version_counter=False,
    )
    return [last, best] if validated or of_exam else [last]


def resume_from(config: DictConfig, module: AlignTraining, metrics: MetricsFile) -> Path | None:
    """The checkpoint to go on from, once it is known to fit; metrics.csv goes on there too."""
    if not config.resume:
        return None
    path = Path(config.resume) / "checkpoints" / "last.ckpt"
    checkpoint = read_checkpoint(path)
    check_fit(module.model, checkpoint, path)
    if checkpoint["global_step"] >= config.max_steps:
        raise ValueError(
            f"{path} is at step {checkpoint['global_step']} and max_steps is {config.max_steps}: nothing is left to "
            "train, give a larger max_steps"
        )
    metrics.go_on_from(checkpoint["global_step"])
    return path


def write_recipe(folder: Path, recipe: str) -> None:
    """RUN/resolved.yaml: every setting as it was used."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "resolved.yaml") as file:
        file.write(recipe.encode())
