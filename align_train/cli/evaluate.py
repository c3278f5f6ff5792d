"""`align-train evaluate`: score a model."""

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from align_train.cli.models import Loaded, choose_device, is_run, load_model, newest_run
from align_train.cli.scoring import take_exams, write_result
from align_train.engine import needs_recalibration
from align_train.evaluation import table


def warn_if_cold(loaded: Loaded) -> None:
    """Say so where batch-norm statistics are still partly their start values; `export` recalibrates, this does not."""
    if needs_recalibration(loaded.model, loaded.steps):
        print(f"note: {loaded.steps} steps are too few to warm up the batch-norm statistics, so scores may be low")


def evaluate(config: DictConfig) -> None:
    """Take the exams, print the table, write result.json and contact sheets."""
    if not config.exams:
        raise ValueError("no exam is chosen: give exams=sample, or a file of your own in --config-dir")
    source = Path(newest_run(config.checkpoint))
    folder = Path(config.folder or (source if is_run(source) else HydraConfig.get().runtime.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    loaded = load_model(str(source))
    if loaded.recipe is not None and source.suffix == ".ckpt":
        warn_if_cold(loaded)
    scores = take_exams(config.exams, loaded.model, folder, choose_device(config.device))
    write_result(folder, scores, {"checkpoint": str(source), "steps": loaded.steps})
    print(table(scores))
    print(f"result.json and contact sheets in {folder}")
