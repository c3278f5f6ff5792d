"""`align-train export`: a checkpoint to a Hugging Face folder."""

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from align_train.cli.exporting import export_model, push_where_asked, settle
from align_train.cli.models import is_checkpoint, load_model, newest_run, open_data, run_folder
from align_train.hub import weights_digest
from align_train.hub.pushing import require_token
from align_train.models import Align


def export(config: DictConfig) -> None:
    """Load, settle, write, prove; push where asked."""
    if config.push_to is not None:
        require_token(config.push_to)
    source = Path(newest_run(config.checkpoint))
    if source.is_dir() and not is_checkpoint(source):
        raise ValueError(f"{source} is no run folder: give one, or a .ckpt file")
    loaded = load_model(source)
    run = run_folder(source)
    model, recipe = loaded.model, loaded.recipe
    if loaded.statistics is None:
        settle(model, loaded.steps, lambda: open_data(recipe.data, model, recipe.step.micro_batch))
    folder, known = Path(config.folder) if config.folder else run / "hf", result_of(run, model)
    export_model(
        model,
        recipe,
        folder,
        loaded.steps,
        known.get("exams", {}),
        finetuning=known.get("finetuning"),
        head=loaded.head,
        onnx=config.onnx,
    )
    push_where_asked(config, folder)


def result_of(run: Path, model: Align) -> dict[str, Any]:
    """The run's result.json, if it is of these weights; else nothing."""
    path = run / "result.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return result if result.get("weights_sha256") == weights_digest(model) else {}
