"""Lightning's trainer with what every run has: callbacks, checkpoints, loggers."""

from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from hydra.utils import instantiate
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from omegaconf import DictConfig

from align_train.cli.checks import is_of_exam
from align_train.cli.scoring import build_exams
from align_train.engine import (
    Agreement,
    AlignTraining,
    AtomicCheckpointIO,
    Budget,
    Examination,
    Heartbeat,
    MetricsFile,
    OwedValidation,
    Progress,
    Recovery,
    RowBeforeSave,
    StopOnPlateau,
    Watchdog,
    begin_even_without_steps,
)
from align_train.files import atomic_write
from align_train.processes import is_first_process


class Outfit(NamedTuple):
    """A trainer, and those of its callbacks that are asked afterwards."""

    trainer: Trainer
    progress: Progress
    agreement: Agreement
    examination: Examination


def build_trainer(
    config: DictConfig, module: AlignTraining, loggers: list[Any], recovery: Recovery, tuned: bool, validated: bool
) -> Outfit:
    """A new trainer, with callbacks that know nothing yet."""
    folder, budget = Path(config.folder), Budget(config.loss.get("chunk_size"))
    progress, agreement = Progress(budget), Agreement(folder / "checkpoints", recovery.checkpoint_minutes)
    watched = [name for name in (config.best.by, *_forgetting(config)) if is_of_exam(name)]
    examination = Examination(
        module.own_exams(build_exams(config.exams)),
        instantiate(config.encoding),
        folder,
        config.examine_every,
        watched,
        progress.throughput.go_on,
        tuned,
    )
    watchdog = Watchdog(60 * recovery.stall_minutes if recovery.stall_minutes else None)
    callbacks = [watchdog, budget, progress, Heartbeat(folder), RowBeforeSave(loggers[0]), agreement, OwedValidation()]
    callbacks += [examination, *plateau(config)]
    return Outfit(_trainer(config, callbacks, loggers, validated), progress, agreement, examination)


def _trainer(config: DictConfig, callbacks: list[Callback], loggers: list[Any], validated: bool) -> Trainer:
    """Lightning's trainer with what every run has."""
    trainer: Trainer = instantiate(
        config.trainer,
        max_steps=config.max_steps,
        max_epochs=-1,  # lengths are in steps
        callbacks=[*callbacks, *checkpoints(config, Path(config.folder), validated)],
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
    begin_even_without_steps(trainer)
    return trainer


def build_loggers(config: DictConfig) -> list[Any]:
    """metrics.csv, and those that are asked for, by the run's own id: the same after each stop."""
    config.run_id = run_id(Path(config.folder))
    return [MetricsFile(config.folder), *(instantiate(node) for node in config.logger.values())]


def run_id(folder: Path) -> str:
    """RUN/run_id, made on the first process; for Weights & Biases, which joins what has one id."""
    file = folder / "run_id"
    if is_first_process() and not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as written:
            written.write(uuid4().hex[:8].encode())
    return file.read_text() if file.is_file() else ""


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


def _forgetting(config: DictConfig) -> list[str]:
    """Metrics that a mixture of start and end is chosen by."""
    named = config.get("forgetting") or {}
    return [*named.get("new", []), *named.get("guard", [])]


def keep_last_if_best(trainer: Trainer, metric: str) -> None:
    """Make the last step best.ckpt where its exam is the best; Lightning looks at every so many steps alone."""
    for callback in trainer.checkpoint_callbacks:
        found = trainer.callback_metrics.get(metric)
        known = isinstance(callback, ModelCheckpoint) and callback.monitor == metric and found is not None
        if known and callback.check_monitor_top_k(trainer, found):
            trainer.save_checkpoint(Path(str(callback.dirpath)) / "best.ckpt", weights_only=False)


def plateau(config: DictConfig) -> list[Callback]:
    """What ends a run early, if that is wanted."""
    by, patience = config.best.by, config.best.patience
    if patience is None:
        return []
    every, first_stage = config.examine_every if is_of_exam(by) else None, config.training.get("head_steps", 0)
    return [StopOnPlateau(by, config.best.mode, patience, every, first_stage)]
