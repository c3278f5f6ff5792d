"""What a report is made from: the files of a run folder."""

import csv
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align_train.evaluation.report.finetuning import wrong_with
from align_train.evaluation.report.scores import is_number

REMEDY = "take the exams with `align-train evaluate`, which writes this file"


@dataclass(frozen=True)
class RunFolder:
    """What a run has left.

    Attributes:
        result: of result.json.
        curves: step and value of each column of metrics.csv; empty without the file.
        sheets: contact sheets, by the name of their exam.
        recipe: text of resolved.yaml, "" without the file.
    """

    result: Mapping[str, Any]
    curves: Mapping[str, list[tuple[int, float]]]
    sheets: Mapping[str, Path]
    recipe: str


def read_run(folder: Path) -> RunFolder:
    """Read the folder.

    Raises:
        ValueError: there is no result.json, it is not of this program, or metrics.csv has no column `step`.
    """
    result, recipe = read_result(folder / "result.json"), folder / "resolved.yaml"
    sheets = {name: folder / f"contact_sheet_{name}.png" for name in result["exams"]}
    return RunFolder(
        result,
        read_curves(folder / "metrics.csv"),
        {name: path for name, path in sheets.items() if path.is_file()},  # no other: those are of other weights
        recipe.read_text() if recipe.is_file() else "",
    )


def read_result(path: Path, remedy: str = REMEDY) -> dict[str, Any]:
    """result.json, checked for what the report builds on; ValueError names the file and what to do."""
    if not path.is_file():
        raise ValueError(f"{path} is not there: {remedy}")
    try:
        result = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): {remedy}") from error
    if not isinstance(result, dict) or not isinstance(result.get("exams"), dict):
        raise ValueError(f"{path} has no object `exams`: {remedy}")
    for name, exam in result["exams"].items():
        if wrong := _wrong_with(exam):
            raise ValueError(f"{path}: the exam {name} {wrong}: {remedy}")
    if result.get("finetuning") and (wrong := wrong_with(result["finetuning"])):
        raise ValueError(f"{path}: `finetuning` {wrong}: move it away, and fine-tune again")
    return result


def _wrong_with(exam: object) -> str:
    if not isinstance(exam, dict) or not isinstance(exam.get("kind"), str):
        return "has no `kind`"
    scores = exam.get("scores")
    if not isinstance(scores, dict):
        return "has no `scores`"
    for name, score in scores.items():
        if score is not None and not (isinstance(score, dict) and "value" in score):
            return f"has a score {name} without a `value`"
    wrong = [key for key in ("counts", "dropped", "facts", "measured") if not isinstance(exam.get(key) or {}, dict)]
    return f"has `{wrong[0]}` that is no object" if wrong else ""


def read_curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and value of each column of metrics.csv; empty cells and values that are not finite are left out."""
    if not path.is_file():
        return {}
    curves: dict[str, list[tuple[int, float]]] = {}
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        if "step" not in (rows.fieldnames or []):
            raise ValueError(f"{path} has no column `step`: it is not of a run; move it away, or restore the run's own")
        for row in rows:
            with suppress(ValueError, TypeError):  # a last line torn by a kill
                step = int(float(row.pop("step")))
                for name, text in row.items():
                    if text and is_number(value := float(text)):
                        curves.setdefault(name, []).append((step, value))
    return curves
