"""How a run goes on: from its newest checkpoint, and past a loss that is no number."""

import logging
import math
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from omegaconf import DictConfig

from align_train import signals
from align_train.cli.jobs import Job
from align_train.cli.resuming import AUTO
from align_train.cli.scoring import known_result
from align_train.distributed import on_rank_zero, rank
from align_train.engine import (
    Agreement,
    AlignTraining,
    NonFinite,
    PairData,
    Recovery,
    Skipped,
    StreamData,
    check_fit,
    newest_checkpoint,
    note_skipped,
    read_checkpoint,
    read_skipped,
)

log = logging.getLogger(__name__)


def checkpoint_to_resume(config: DictConfig) -> Path | None:
    """The newest complete checkpoint of the run that is to go on; None where one begins.

    Raises:
        FileNotFoundError: the run has none, and was named.
        ValueError: none of them can be read.
    """
    if not config.resume:
        return None
    run = Path(config.folder if config.resume == AUTO else config.resume)
    found = newest_checkpoint(run)
    if found is None and config.resume != AUTO:
        raise FileNotFoundError(f"no checkpoint in {run / 'checkpoints'}: resume=... takes the folder of a run")
    return found


def take_up(config: DictConfig, path: Path, trainer: Trainer, module: AlignTraining, tuned: bool) -> int:
    """Check that a checkpoint can be gone on from, and make the trainer do so; the checkpoint's step.

    A run that `best.patience` had ended is not trained any further.

    Raises:
        ValueError: it is of another model, or nothing is left to train.
    """
    checkpoint = read_checkpoint(path, mmap=True)
    check_fit(module.model, checkpoint, path)
    step: int = checkpoint["global_step"]
    ended = not tuned and config.resume != AUTO and known_result(Path(config.folder)).get("steps") == step
    if step >= config.max_steps and ended:  # the others have exams to take yet
        raise ValueError(
            f"{path} is at step {step} and max_steps is {config.max_steps}: nothing is left to train, give a larger "
            "max_steps"
        )
    if is_trained(config, checkpoint):
        trainer.fit_loop.epoch_loop.max_steps = step
    return step


def is_trained(config: DictConfig, checkpoint: dict[str, Any]) -> bool:
    """True if a run has no step left: it has taken all, or `best.patience` has ended it."""
    without = checkpoint["callbacks"].get("StopOnPlateau", {}).get("without", 0)
    return bool(checkpoint["global_step"] >= config.max_steps or without >= (config.best.patience or math.inf))


def step_past(
    problem: NonFinite, folder: Path, recovery: Recovery, data: PairData | StreamData, may_go_on: bool
) -> Path | None:
    """Leave out the pairs that led to a loss that is no number, and note it; the checkpoint to go back to.

    All ranks must call it.

    Args:
        problem: where it was.
        folder: the run folder.
        recovery: how often, and how much is left out.
        data: what the pairs are from.
        may_go_on: this process can train on from a checkpoint.

    Raises:
        FloatingPointError: it was too often, or this process cannot go on.
    """
    before = on_rank_zero(lambda: len(read_skipped(folder)))
    if before >= recovery.rollbacks:
        told = f"; it was gone back {before} times before (recovery.rollbacks={recovery.rollbacks})" if before else ""
        raise FloatingPointError(f"{problem}, and go on with resume={folder}{told}") from problem
    first, last = max(0, problem.step - recovery.skipped_steps + 1), problem.step
    checkpoint = on_rank_zero(lambda: newest_checkpoint(folder))
    step = read_checkpoint(checkpoint, mmap=True)["global_step"] if checkpoint else 0
    left_out = data.skip(first, last)
    note_skipped(folder, Skipped(first, last, str(problem).partition(";")[0], step, left_out))
    told = f"{problem}. What the steps {first} to {last} had taken is left out from now on"
    if not may_go_on:
        raise OSError(f"{told}; the weights are dealt out, so go on with resume={folder}") from problem
    if rank() == 0:
        log.warning("%s; back to step %d (%d of at most %d times)", told, step, before + 1, recovery.rollbacks)
    return checkpoint


def exit_if_stopped(agreement: Agreement, trainer: Trainer, folder: Path, verb: str) -> None:
    """Exit with the status of what the run was asked for, if it was: it is saved."""
    if asked := agreement.asked:
        signals.fulfilled()
        if trainer.is_global_zero:
            says = {signals.Wish.END: " by SIGTERM", signals.Wish.REQUEUE: " by SIGUSR1"}.get(asked, "")
            # what becomes of a job is said at the end of its log, and no command for a terminal
            then = f"run folder {folder}" if Job.current() else f"go on with: align-train {verb} resume={folder}"
            print(f"stopped{says} at step {trainer.global_step}; {then}", flush=True)
        sys.exit(asked.status if rank() == 0 else 0)  # others would take the first down before it is done
