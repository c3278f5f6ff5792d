"""`align-train export`: a checkpoint to a Hugging Face folder."""

import json
from pathlib import Path

from omegaconf import DictConfig

from align_train.cli.exporting import export_model, settle
from align_train.cli.models import load_model, newest_run, open_data
from align_train.evaluation import Score
from align_train.records import Tally


def export(config: DictConfig) -> None:
    """Load, settle, write, prove."""
    source = newest_run(config.checkpoint)
    loaded = load_model(source)
    if loaded.recipe is None:
        raise ValueError(f"{source} is a Hugging Face folder already: give a run folder or a .ckpt file")
    run = run_folder(Path(source))
    model, recipe = loaded.model, loaded.recipe
    settle(model, loaded.steps, lambda: open_data(recipe.data, model, recipe.step.micro_batch))
    folder = Path(config.folder) if config.folder else run / "hf"
    export_model(model, recipe, folder, loaded.steps, scores_of(run, loaded.steps))


def run_folder(checkpoint: Path) -> Path:
    """The run a checkpoint belongs to."""
    return checkpoint if checkpoint.is_dir() else checkpoint.parent.parent


def scores_of(run: Path, steps: int) -> dict[str, Score]:
    """The scores in the run's result.json, if they are of these steps."""
    path = run / "result.json"
    result = json.loads(path.read_text()) if path.is_file() else {}
    if result.get("steps") != steps:
        return {}
    return {
        name: Score(exam["recall"], exam["chance"], exam["pairs"], Tally(exam["dropped"]))
        for name, exam in result["exams"].items()
    }
