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
from align_train.cli.scoring import build_exams, facts_of, tell, tell_report, write_result
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
from align_train.evaluation import Encoding, Taken
from align_train.evaluation.measuring import device_name, software
from align_train.files import atomic_write
from align_train.models import Align


def train(config: DictConfig) -> None:
    """Build, fit, score, export."""
    check_lengths(config)
    check_best(config)
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
    watched = config.best.by if is_of_exam(config.best.by) else ""
    exams, every = build_exams(config.exams), config.examine_every
    examination = Examination(exams, encoding, folder, every, watched, progress.throughput.go_on)
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
    module.statistics = settle(module.model, trainer.global_step, lambda: data)
    trainer.save_checkpoint(folder / "checkpoints" / "last.ckpt", weights_only=False)
    if is_sharded(module.model):
        model = load_model(folder).model.to(trainer.strategy.root_device)
    taken, failed = examination.at_end(trainer, model)
    if rank() == 0:
        report(config, model, taken, {**facts(config, trainer, progress), "batch_norm": module.statistics})
    if failed:
        raise failed


def check_lengths(config: DictConfig) -> None:
    """Raise ValueError for a length that is no positive whole number, and for what would not be exact here."""
    for key in ("max_steps", "checkpoint_every", "validate_every", "data.batch_size", "trainer.log_every_n_steps"):
        value = OmegaConf.select(config, key)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{key} is {value!r}; it must be a whole number of at least 1")
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


def is_of_exam(metric: str) -> bool:
    """True for exam/NAME/VALUE."""
    return metric.startswith("exam/")


def check_best(config: DictConfig) -> None:
    """Raise ValueError where exams are to be taken at no step, or best.ckpt is to be chosen by what there is not."""
    every, by, mode = config.examine_every, config.best.by, config.best.mode
    if every is not None and (not isinstance(every, int) or every < 1):
        raise ValueError(f"examine_every is {every!r}; it must be a whole number of at least 1, or null")
    if not isinstance(by, str) or mode not in ("max", "min"):
        raise ValueError(f"best.by is {by!r} and best.mode {mode!r}: give the name of a metric, and max or min")
    if not is_of_exam(by):
        return
    exam = by.removeprefix("exam/").rpartition("/")[0]
    if every is None or every > config.max_steps or exam not in config.exams:
        raise ValueError(
            f"best.by is {by}, so set examine_every to a number of steps up to max_steps, and name an exam as "
            f"exam/NAME/VALUE: there are {', '.join(map(str, config.exams)) or 'none'}"
        )


def facts(config: DictConfig, trainer: Trainer, progress: Progress) -> dict[str, Any]:
    """What result.json says of the training."""
    return {
        "name": config.name,
        "seed": config.seed,
        "steps": trainer.global_step,
        "batch_size": config.data.batch_size,
        "trained_with": {"device": device_name(trainer.strategy.root_device), "software": software()},
        **progress.facts(),
        **trainer.datamodule.facts(),
    }


def report(config: DictConfig, model: Align, taken: Taken, known: dict[str, Any]) -> None:
    """Sum up, and export."""
    folder = Path(config.folder)
    known = {**known, **facts_of(model)}
    origin = {"checkpoint": str(folder / "checkpoints" / "last.ckpt"), "batch_norm": known["batch_norm"]}
    result = write_result(folder, taken.entries, known, origin)
    if config.export:
        known["export"] = export_model(model, config, folder / "hf", known["steps"], taken.entries)
        result = write_result(folder, taken.entries, known, origin)
    taken.draw(folder)
    tell(result)
    if config.report:
        tell_report(folder)
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
    of_exam = is_of_exam(config.best.by)
    best = ModelCheckpoint(
        folder / "checkpoints",
        filename="best",
        monitor=config.best.by,
        mode=config.best.mode,
        every_n_train_steps=config.examine_every if of_exam else None,
        save_on_train_epoch_end=of_exam or None,  # or it would wait for a validation after the last step
        auto_insert_metric_name=False,
        enable_version_counter=False,
    )
    return [best, last] if validated or of_exam else [last]  # last.ckpt knows then what best.ckpt is


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
