"""From settings and a model to a trained one: what `train` and `finetune` have in common."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from align_train.cli.checks import is_of_exam
from align_train.cli.models import open_data
from align_train.cli.scoring import build_exams
from align_train.engine import (
    AlignTraining,
    AtomicCheckpointIO,
    Budget,
    Examination,
    Execution,
    MetricsFile,
    PairData,
    Progress,
    StopOnNonFinite,
    StopOnPlateau,
    StopOnSignal,
    StreamData,
    check_fit,
    keep_freed_memory,
    parted,
    read_checkpoint,
)
from align_train.engine.recalibration import RUNNING
from align_train.evaluation import Encoding
from align_train.evaluation.measuring import device_name, software
from align_train.files import atomic_write
from align_train.models import Align


@dataclass(frozen=True)
class Fitted:
    """A training that has come to its end.

    Attributes:
        trainer: that did it; its process group still stands.
        module: holds the model.
        data: that was read.
        examination: takes the exams.
        facts: for result.json.
        beside: weights before the first step of what is trained beside the model.
    """

    trainer: Trainer
    module: AlignTraining
    data: PairData | StreamData
    examination: Examination
    facts: dict[str, Any]
    beside: dict[str, Tensor]


def fit(config: DictConfig, model: Align, tuned: bool = False) -> Fitted:
    """Train a model by the settings, which its checkpoints carry; a run that is told to stop ends here, with 130.

    Args:
        config: of `train` or `finetune`, complete.
        model: with the weights that training starts from.
        tuned: it is a trained model already: exams are taken before the first step too, and the batch-norm statistics
            are warm from the start.
    """
    folder = Path(config.folder)
    recipe = OmegaConf.to_yaml(config, resolve=True)
    execution: Execution = instantiate(config.step)
    execution.prepare(model)
    data = open_data(config.data, model, execution.micro_batch)
    module: AlignTraining = instantiate(config.training, _convert_="all")(
        model,
        optimizer=instantiate(config.optimizer),
        schedule=instantiate(config.schedule),
        objective=instantiate(config.loss),
        seed=config.seed,
        centre_captions=config.centre_captions,
        recipe=recipe,
    )
    module.statistics = RUNNING if tuned else ""
    beside = {name: value.clone() for name, value in parted(module.state_dict())[1].items()}
    budget, stopping = Budget(config.loss.get("chunk_size")), StopOnSignal(folder / "checkpoints")
    progress = Progress(budget)
    metrics = MetricsFile(folder)
    encoding: Encoding = instantiate(config.encoding)
    watched = [name for name in (config.best.by, *_forgetting(config)) if is_of_exam(name)]
    exams, every = module.own_exams(build_exams(config.exams)), config.examine_every
    examination = Examination(exams, encoding, folder, every, watched, progress.throughput.go_on, tuned)
    callbacks = [budget, progress, stopping, examination, *plateau(config)]
    trainer = build_trainer(config, callbacks, metrics, validated=bool(data.validation))
    if trainer.strategy.root_device.type == "cpu":
        keep_freed_memory()
    resumed = resume_from(config, trainer, module, metrics, tuned)
    if trainer.is_global_zero:
        write_recipe(folder, recipe)
    try:
        trainer.fit(module, data, ckpt_path=resumed, weights_only=True)
    except SystemExit:  # Lightning's answer to a Ctrl-C, without a word
        raise KeyboardInterrupt from None
    if stopping.stopped:
        if trainer.is_global_zero:
            verb = "finetune" if tuned else "train"
            print(f"stopped at step {trainer.global_step}; go on with: align-train {verb} resume={folder}")
        sys.exit(130)
    if tuned:
        keep_last_if_best(trainer, config.best.by)
    module.model.to(trainer.strategy.root_device)
    return Fitted(trainer, module, data, examination, facts(config, trainer, progress), beside)


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


def resume_from(
    config: DictConfig, trainer: Trainer, module: AlignTraining, metrics: MetricsFile, tuned: bool
) -> Path | None:
    """The checkpoint to go on from, once it is known to fit; metrics.csv goes on there too.

    A run that `best.patience` had ended is not trained any further.
    """
    if not config.resume:
        return None
    path = Path(config.resume) / "checkpoints" / "last.ckpt"
    checkpoint = read_checkpoint(path)
    check_fit(module.model, checkpoint, path)
    if checkpoint["global_step"] >= config.max_steps and not tuned:  # fine-tuning has mixtures to make yet
        raise ValueError(
            f"{path} is at step {checkpoint['global_step']} and max_steps is {config.max_steps}: nothing is left to "
            "train, give a larger max_steps"
        )
    without = checkpoint["callbacks"].get("StopOnPlateau", {}).get("without", 0)
    if without >= (config.best.patience or math.inf):
        trainer.fit_loop.epoch_loop.max_steps = checkpoint["global_step"]
    metrics.go_on_from(checkpoint["global_step"])
    return path


def write_recipe(folder: Path, recipe: str) -> None:
    """RUN/resolved.yaml: every setting as it was used."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "resolved.yaml") as file:
        file.write(recipe.encode())
