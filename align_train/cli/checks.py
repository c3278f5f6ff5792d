"""What a run's settings must hold before anything is built."""

import re
from pathlib import Path

from omegaconf import DictConfig, OmegaConf


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


def check_unused(config: DictConfig) -> None:
    """Raise ValueError where a run that is begun would find the checkpoints of another in its folder."""
    folder = Path(config.folder)
    if config.resume is None and any((folder / "checkpoints").glob("*.ckpt")):
        raise ValueError(f"{folder} holds a run already: go on with resume={folder}, or name another folder")


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
    patience = config.best.patience
    if patience is not None and (not isinstance(patience, int) or patience < 1):
        raise ValueError(f"best.patience is {patience!r}; it must be a whole number of at least 1, or null")
    if not is_of_exam(by):
        return
    exam = by.removeprefix("exam/").rpartition("/")[0]
    if every is None or every > config.max_steps or exam not in config.exams:
        raise ValueError(
            f"best.by is {by}, so set examine_every to a number of steps up to max_steps, and name an exam as "
            f"exam/NAME/VALUE: there are {', '.join(map(str, config.exams)) or 'none'}"
        )
