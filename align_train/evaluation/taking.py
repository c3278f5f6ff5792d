"""Several exams of one model, as result.json has them."""

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from align_train.distributed import rank
from align_train.evaluation.encoder import Encoder
from align_train.evaluation.exam import Exam, Score


def take_exams(exams: Mapping[str, Exam], encoder: Encoder, pictures: Path | None = None) -> dict[str, dict[str, Any]]:
    """Take each exam; every rank must call it, and gets all scores.

    Args:
        exams: by name.
        encoder: the model.
        pictures: a folder for contact_sheet_NAME.png of those exams that have one; None draws nothing.

    Returns:
        Entries of result.json's "exams" by name: kind, scores, counts, dropped, facts, seconds, taken.

    Raises:
        ValueError: an exam's data is not what it needs; names the exam.
        OSError: its data cannot be read; likewise.
    """
    entries = {}
    for name, exam in exams.items():
        started, clock = datetime.now(UTC), time.monotonic()
        try:
            outcome = exam.take(encoder)
        except ValueError as error:
            raise ValueError(f"exam {name}: {error}") from error
        except OSError as error:
            raise OSError(f"exam {name}: {error}") from error
        seconds = time.monotonic() - clock
        if pictures is not None and outcome.draw is not None and rank() == 0:
            outcome.draw(pictures / f"contact_sheet_{name}.png")
        entries[name] = _entry(outcome.score, encoder.encoding.precision) | {
            "seconds": round(seconds, 1),
            "taken": started.isoformat("T", "seconds"),
        }
    return entries


def metrics_of(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Every score as a metric to log: `exam/NAME/i2t_r1` and so on."""
    return {
        f"exam/{name}/{metric}": score["value"]
        for name, entry in entries.items()
        for metric, score in entry["scores"].items()
    }


def _entry(score: Score, precision: str) -> dict[str, Any]:
    scores = {
        name: {"value": v.value, "low": v.low, "high": v.high, "chance": v.chance} for name, v in score.values.items()
    }
    dropped, facts = dict(score.dropped), {**score.facts, "precision": precision}
    return {"kind": score.kind, "scores": scores, "counts": dict(score.counts), "dropped": dropped, "facts": facts}
