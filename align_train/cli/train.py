"""`align-train train`: the main job as a table of contents."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from align_train import signals
from align_train.cli.checks import check_best, check_lengths, check_unused
from align_train.cli.exporting import export_model, settle
from align_train.cli.fitting import fit
from align_train.cli.models import build_model, load_model
from align_train.cli.recovering import checkpoint_to_resume, is_trained
from align_train.cli.resuming import AUTO
from align_train.cli.scoring import facts_of, known_result, tell, tell_report, write_result
from align_train.distributed import is_sharded, rank
from align_train.engine import read_checkpoint
from align_train.engine.agreement import end_if_asked
from align_train.evaluation import Taken
from align_train.models import Align


def train(config: DictConfig) -> None:
    """Build, fit, score, export."""
    check_lengths(config)
    check_best(config)
    check_unused(config)
    resumed = checkpoint_to_resume(config)
    if resumed and is_done(config, resumed):
        print(f"the run is done: {config.folder}")
        return
    torch.manual_seed(config.seed)
    model = build_model(config.model)
    fitted = fit(config, model, resumed)
    trainer, module, folder = fitted.trainer, fitted.module, Path(config.folder)
    module.statistics = settle(module.model, trainer.global_step, lambda: fitted.data)
    trainer.save_checkpoint(folder / "checkpoints" / "last.ckpt", weights_only=False)
    if is_sharded(module.model):
        model = load_model(folder).model.to(trainer.strategy.root_device)
    end_if_asked(trainer.strategy.root_device)  # all is saved; the exams can be taken by the next start
    taken, failed = fitted.examination.at_end(trainer, model)
    if rank() == 0:
        signals.check()
        report(config, model, taken, {**fitted.facts, "batch_norm": module.statistics})
    if failed:
        raise failed


def is_done(config: DictConfig, checkpoint: Path) -> bool:
    """True if `resume=auto` finds nothing left to do: all steps, exams, export and report."""
    known, reported = known_result(Path(config.folder)), (Path(config.folder) / "report.md").is_file()
    trained = config.resume == AUTO and is_trained(config, read_checkpoint(checkpoint, mmap=True))
    return trained and bool(known) and ("export" in known or not config.export) and (reported or not config.report)


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
