"""What result.json says, and the report beside it: the same for a run's end and for `align-train evaluate`."""

import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from align_train.evaluation import Exam
from align_train.evaluation.report import (
    comparison_text,
    not_compared_texts,
    read_result,
    scores_text,
    write_report,
)
from align_train.files import atomic_write
from align_train.hub import weights_digest


def build_exams(config: DictConfig) -> dict[str, Exam]:
    """The exams of an exams node, by name.

    Raises:
        ValueError: a name that cannot be part of a file's.
    """
    for name in map(str, config):
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(
                f"an exam is named {name!r}, but files and metrics are called after it: use letters, digits, _, - and "
                "dots alone"
            )
    return {str(name): instantiate(node, _convert_="all") for name, node in config.items()}


def facts_of(model: torch.nn.Module) -> dict[str, Any]:
    """What is true of the weights, however they are measured, for result.json."""
    return {"weights_sha256": weights_digest(model), "parameters": sum(p.numel() for p in model.parameters())}


def known_result(folder: Path) -> dict[str, Any]:
    """What FOLDER/result.json says already; {} without the file.

    Raises:
        ValueError: it is not of this program, so that nothing can be added to it.
    """
    path = folder / "result.json"
    if not path.is_file():
        return {}
    return read_result(path, remedy="move it away, or write to another folder")


def write_result(
    folder: Path, entries: Mapping[str, Mapping[str, Any]], facts: Mapping[str, Any], origin: Mapping[str, Any]
) -> dict[str, Any]:
    """FOLDER/result.json: the facts and the exams; returns it.

    What the file already says of the same weights stays, so an evaluation adds to what training wrote. How an exam was
    measured is told with that exam.

    Args:
        folder: that of the file.
        entries: exams that were taken.
        facts: true of the weights and their training, with weights_sha256.
        origin: true of these exams: checkpoint, and batch_norm where it is known.
    """
    exams = {name: {**entry, "measured": {**origin, **entry["measured"]}} for name, entry in entries.items()}
    with _alone(folder):
        before = known_result(folder)
        if before.get("weights_sha256") != facts["weights_sha256"]:
            before = {}
        result = {**before, **facts, "exams": before.get("exams", {}) | exams}
        with atomic_write(folder / "result.json") as file:
            file.write((json.dumps(result, indent=2) + "\n").encode())
    return result


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While no other process writes this folder's result."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems have no locks: better a small risk than no scores
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


def tell(result: Mapping[str, Any]) -> None:
    """Print the scores, and published ones beside those that compare with them."""
    print(scores_text(result["exams"]) if result["exams"] else "no exam was taken")
    if any((entry.get("facts") or {}).get("benchmark") for entry in result["exams"].values()):
        print(f"\n{comparison_text(result)}")
    elif texts := not_compared_texts(result["exams"]):
        print("\n" + "\n".join(texts))


def tell_report(folder: Path) -> None:
    """Write the report of a folder with a result.json, and say where it is."""
    markdown, page = write_report(folder)
    print(f"report: {page} and {markdown.name}")
