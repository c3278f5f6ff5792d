"""What an export of a trained checkpoint needs: settled statistics and a card."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from transformers.utils.logging import disable_progress_bar

from align_train import __version__
from align_train.distributed import rank
from align_train.engine import PairData, StreamData, needs_recalibration, recalibrate_on
from align_train.engine.recalibration import RUNNING, recalibrated
from align_train.evaluation.report import scores_text
from align_train.files import atomic_write
from align_train.hub import export_hf, export_onnx, model_card, push, require_onnx
from align_train.hub.classifier import export_classifier
from align_train.models import Align
from align_train.models.class_head import ClassHead


def settle(model: Align, steps: int, open_data: Callable[[], PairData | StreamData]) -> str:
    """Recalibrate batch norm where the run was too short for its running statistics; says what they are now."""
    if not needs_recalibration(model, steps):
        return RUNNING
    batches = recalibrate_on(model, open_data())
    if rank() == 0:
        print(f"batch-norm {recalibrated(batches)}: {steps} steps are too few to warm them up")
    return recalibrated(batches)


def export_model(
    model: Align,
    recipe: DictConfig,
    folder: Path,
    steps: int,
    exams: Mapping[str, Mapping[str, Any]],
    *,
    finetuning: Mapping[str, Any] | None = None,
    head: ClassHead | None = None,
    onnx: bool = False,
) -> dict[str, Any]:
    """Write and prove the Hugging Face folder; returns what result.json says of it.

    Args:
        model: the trained one.
        recipe: of its run.
        folder: where to.
        steps: that it was trained.
        exams: as in result.json, for the card.
        finetuning: likewise; None where the model was not fine-tuned.
        head: a classifier that was trained with it, written beside it.
        onnx: write and prove both towers as ONNX files too.
    """
    if onnx:
        require_onnx()
    disable_progress_bar()  # of transformers, for the blink of writing and reloading
    shown = scores_text(exams) if exams else "No exam was taken."
    settings = settings_of(model, recipe, steps)
    card = partial(model_card, recipe.name, __version__, recipe.data_card, settings, shown, finetuning)
    difference = export_hf(model, folder, card())
    print(f"exported to {folder}; reloaded by transformers, embeddings differ by at most {difference:.1e}")
    told: dict[str, Any] = {"folder": str(folder), "largest_difference": difference}
    if onnx:
        told["largest_onnx_difference"] = export_onnx(folder)
        with atomic_write(folder / "README.md") as file:
            file.write(card(onnx=True).encode())  # only now is it true
        print(
            f"wrote {folder}/onnx; run by onnxruntime, embeddings differ from transformers' by at most "
            f"{told['largest_onnx_difference']:.1e}"
        )
    if head is not None:
        told |= export_classifier(head, folder)
    return told


def push_where_asked(config: DictConfig, folder: Path) -> None:
    """Upload the exported folder to the repository `push_to`, unless that is null."""
    if config.push_to:
        print(f"pushed to {push(folder, config.push_to, config.private)}")


def settings_of(model: Align, recipe: DictConfig, steps: int) -> dict[str, Any]:
    """What the card says of how the model was trained."""
    tuning = recipe.get("tuning")
    return {
        "steps": steps,
        "batch size": recipe.data.batch_size,
        "pairs seen": steps * recipe.data.batch_size,
        **({f"{tower} tower": _tuned(tuning[tower]) for tower in ("image", "text")} if tuning else {}),
        "optimizer": _described(recipe.optimizer),
        "schedule": _described(recipe.schedule),
        "label smoothing": recipe.loss.label_smoothing,
        "precision": recipe.trainer.get("precision"),
        "image size": f"{model.preprocessing.crop} pixels, cut from {model.preprocessing.resize}",
        "longest caption": f"{model.preprocessing.max_tokens} tokens",
        "temperature at the end": f"{model.temperature.item():.4f}",
        "seed": recipe.seed,
    }


def _tuned(setting: str | int) -> str:
    words = {"full": "trained", "frozen": "frozen", "lora": "trained by adapters (LoRA), merged"}
    return words.get(str(setting), f"the last {setting} stages trained")


def _described(node: DictConfig) -> str:
    """`adamw (lr 0.002, ...)`: what a node names, and its settings."""
    settings = ", ".join(f"{key} {node[key]}" for key in map(str, node) if not key.startswith("_"))
    return f"{node._target_.rpartition('.')[2]} ({settings})"
