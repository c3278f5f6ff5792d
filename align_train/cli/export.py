"""`align-train export`: a checkpoint to a Hugging Face folder."""

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from align_train.cli.exporting import export_model, settle
from align_train.cli.models import is_checkpoint, load_model, newest_run, open_data, run_folder
from align_train.hub import weights_digest
from align_train.models import Align


def export(config: DictConfig) -> None:
    """Load, settle, write, prove."""
    source = Path(newest_run(config.checkpoint))
    if source.is_dir() and not is_checkpoint(source):
        raise ValueError(f"{source} is no run folder: give one, or a .ckpt file")
    loaded = load_model(source)
    run = run_folder(source)
    model, recipe = loaded.model, loaded.recipe
    settle(model, loaded.steps, lambda: open_data(recipe.data, model, recipe.step.micro_batch))
    folder = Path(config.folder) if config.folder else run / "hf"
    export_model(model, recipe, folder, loaded.steps, exams_of(run, model))


def exams_of(run: Path, model: Align) -> dict[str, Any]:
    """The exams in the run's result.json, if they are of these weights."""
    path = run / "result.json"
    result = json.loads(path.read_text()) if path.is_file() else {}
    known: dict[str, Any] = result.get("exams", {})
    return known if known and result.get("weights_sha256") == weights_digest(model) else {}
