"""From settings and a model to a trained one: what `train` and `finetune` have in common."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from align_train.cli.models import open_data
from align_train.cli.recovering import exit_if_stopped, step_past, take_up
from align_train.cli.resuming import record_settings
from align_train.cli.trainers import Outfit, build_loggers, build_trainer, keep_last_if_best
from align_train.distributed import is_sharded
from align_train.engine import (
    AlignTraining,
    Examination,
    Execution,
    NonFinite,
    PairData,
    Progress,
    Recovery,
    StreamData,
    forget_skipped,
    keep_freed_memory,
    parted,
    ranges,
    read_skipped,
)
from align_train.engine.recalibration import RUNNING
from align_train.evaluation.measuring import device_name, software
from align_train.files import atomic_write
from align_train.models import Align
from align_train.processes import is_first_process


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


def fit(config: DictConfig, model: Align, resumed: Path | None, tuned: bool = False) -> Fitted:
    """Train a model by the settings, which its checkpoints carry; a run that is told to stop ends here.

    Where a loss is no number, the run goes back to its newest checkpoint, and on without the pairs that led there.

    Args:
        config: of `train` or `finetune`, complete.
        model: with the weights that training starts from.
        resumed: the checkpoint to go on from; None begins.
        tuned: it is a trained model already: exams are taken before the first step too, and the batch-norm statistics
            are warm from the start.
    """
    folder = Path(config.folder)
    recipe = OmegaConf.to_yaml(config, resolve=True)
    execution: Execution = instantiate(config.step)
    execution.prepare(model)
    data = open_data(config.data, model, execution.micro_batch)
    data.skipped = ranges(read_skipped(folder)) if config.resume else []
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
    start = {name: value.detach().clone() for name, value in module.state_dict().items()}
    if is_first_process():
        write_recipe(folder, recipe)
        record_settings(config)
        if not config.resume:
            forget_skipped(folder)
    trained = train_to_the_end(config, module, data, start, resumed, tuned)
    trainer = trained.trainer
    exit_if_stopped(trained.agreement, trainer, folder, "finetune" if tuned else "train")
    if tuned:
        keep_last_if_best(trainer, config.best.by)
    module.model.to(trainer.strategy.root_device)
    known = facts(config, trainer, trained.progress)
    return Fitted(trainer, module, data, trained.examination, known, parted(start)[1])


def train_to_the_end(
    config: DictConfig,
    module: AlignTraining,
    data: PairData | StreamData,
    start: dict[str, Tensor],
    resumed: Path | None,
    tuned: bool,
) -> Outfit:
    """Train, from the start's weights or from a checkpoint, and past losses that are no number, by a trainer each."""
    recovery: Recovery = instantiate(config.recovery)
    loggers = build_loggers(config)
    while True:
        made = build_trainer(config, module, loggers, recovery, tuned, validated=bool(data.validation))
        trainer = made.trainer
        if trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()
        step = take_up(config, resumed, trainer, module, tuned) if resumed else -1
        loggers[0].go_on_from(step)
        try:
            trainer.fit(module, data, ckpt_path=resumed, weights_only=True)
        except NonFinite as problem:
            module.forget_step()
            resumed = step_past(problem, Path(config.folder), recovery, data, not is_sharded(module.model))
            module.load_state_dict(start)
        except SystemExit as end:
            if isinstance(end.__context__, KeyboardInterrupt):  # Lightning's answer to a Ctrl-C, without a word
                raise KeyboardInterrupt from None
            raise
        else:
            return made


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


def write_recipe(folder: Path, recipe: str) -> None:
    """RUN/resolved.yaml: every setting as it was used."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "resolved.yaml") as file:
        file.write(recipe.encode())
