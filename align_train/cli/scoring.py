"""What result.json says, and the report beside it: the same for a run's end and for `align-train evaluate`."""

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from align_train.data import Inputs
from align_train.distributed import world_size
from align_train.engine.device_speed import device_name
from align_train.evaluation import Encoding, Exam
from align_train.evaluation.report import comparison_text, scores_text, write_report
from align_train.files import atomic_write
from align_train.hub import weights_digest

PACKAGES = (
    "align-train",
    "torch",
    "lightning",
    "transformers",
    "datasets",
    "webdataset",
    "pillow",
    "opencv-python-headless",
)


def build_exams(config: DictConfig) -> dict[str, Exam]:
    """The exams of an exams node, by name."""
    return {str(name): instantiate(node, _convert_="all") for name, node in config.items()}


def facts_of(model: torch.nn.Module, inputs: Inputs, encoding: Encoding, device: torch.device) -> dict[str, Any]:
    """How the exams were taken, for result.json."""
    return {
        "weights_sha256": weights_digest(model),
        "parameters": sum(p.numel() for p in model.parameters()),
        "preprocessing": inputs.facts(),
        "precision": encoding.precision,
        "device": device_name(device),
        "ranks": world_size(),
    }


def write_result(folder: Path, exams: Mapping[str, Mapping[str, Any]], facts: Mapping[str, Any]) -> dict[str, Any]:
    """FOLDER/result.json: the facts, the exams, and the software; returns it.

    What the file already says of the same weights stays: an evaluation adds to what training wrote, which knows best
    how batch-norm statistics were measured.
    """
    path = folder / "result.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    if before.get("weights_sha256") != facts["weights_sha256"]:
        before = {}
    software = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    statistics = {name: before[name] for name in ("batch_norm",) if name in before}
    result = {**before, **facts, **statistics, "exams": before.get("exams", {}) | dict(exams), "software": software}
    with atomic_write(path) as file:
        file.write((json.dumps(result, indent=2) + "\n").encode())
    return result


def tell(folder: Path, result: Mapping[str, Any]) -> None:
    """Print the scores, published ones beside those that compare with them, and write the report."""
    print(scores_text(result["exams"]) if result["exams"] else "no exam was taken")
    if any(entry["facts"].get("benchmark") for entry in result["exams"].values()):
        print(f"\n{comparison_text(result)}")
    markdown, page = write_report(folder)
    print(f"report: {page} and {markdown.name}")
