"""Exams, contact sheets and result.json: the same for a run's end and for `align-train evaluate`."""

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from align_train.data import find_shards
from align_train.evaluation import Retrieval, Score, contact_sheet
from align_train.files import atomic_write
from align_train.models import Align


def take_exams(config: DictConfig, model: Align, folder: Path, device: torch.device) -> dict[str, Score]:
    """Score the model on every exam, and draw a contact sheet of each into `folder`."""
    scores = {}
    model.to(device)
    for name in map(str, config):
        exam: Retrieval = instantiate(config[name], _convert_="all")
        embeddings = exam.embed(model, device)
        scores[name] = exam.score(embeddings)
        contact_sheet(embeddings, find_shards(exam.shards), folder / f"contact_sheet_{name}.png")
    return scores


def write_result(folder: Path, scores: Mapping[str, Score], facts: Mapping[str, Any]) -> None:
    """RUN/result.json: the facts, the scores with what chance gives, and the software.

    What the file already says of the same steps stays: an evaluation adds to what training wrote.
    """
    packages = ("align-train", "torch", "lightning", "transformers", "webdataset", "pillow")
    path = folder / "result.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    if before.get("steps") != facts["steps"]:
        before = {}
    result = {
        **before,
        **facts,
        "exams": before.get("exams", {})
        | {
            name: {"recall": s.recall, "chance": s.chance, "pairs": s.pairs, "dropped": dict(s.dropped)}
            for name, s in scores.items()
        },
        "software": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }
    with atomic_write(path) as file:
        file.write((json.dumps(result, indent=2) + "\n").encode())
