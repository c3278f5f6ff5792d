"""Several exams of one model, as result.json has them."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from align_train.distributed import rank
from align_train.evaluation.encoder import Encoder
from align_train.evaluation.exam import Exam, Score, naming
from align_train.evaluation.measuring import measured_with
from align_train.evaluation.published import not_compared

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Taken:
    """Exams that were taken.

    Attributes:
        entries: of result.json's "exams" by name: kind, scores, counts, dropped, facts, measured, seconds, taken; equal
            on all ranks but for the last two.
        drawings: what draws a contact sheet, by the name of its exam; on rank 0 alone. They hold the embeddings.
    """

    entries: dict[str, dict[str, Any]]
    drawings: Mapping[str, Callable[[Path], Path]] = field(default_factory=dict)

    def draw(self, folder: Path) -> None:
        """Draw FOLDER/contact_sheet_NAME.png, once the scores are safe: what goes wrong is a warning, no error."""
        for name, drawing in self.drawings.items():
            path = folder / f"contact_sheet_{name}.png"
            try:
                path.unlink(missing_ok=True)  # should the new one fail: the old one may be of other weights
                drawing(path)
            except Exception as error:  # noqa: BLE001 # a picture is not a score, whatever it is that fails
                log.warning("%s could not be drawn: %s: %s", path, type(error).__name__, error)


def take_exams(exams: Mapping[str, Exam], encoder: Encoder) -> Taken:
    """Take each exam; every rank must call it, and gets all scores.

    Args:
        exams: by name.
        encoder: the model.

    Raises:
        ValueError: an exam's data is not what it needs; names the exam.
        OSError: its data cannot be read; likewise.
    """
    entries, drawings, measured = {}, dict[str, Callable[[Path], Path]](), measured_with(encoder)
    for name, exam in exams.items():
        started, clock = datetime.now(UTC), time.monotonic()
        with naming(name):
            outcome = exam.take(encoder)
        seconds = time.monotonic() - clock
        if outcome.draw is not None and rank() == 0:
            drawings[name] = outcome.draw
        entries[name] = _entry(outcome.score) | {
            "measured": measured,
            "seconds": round(seconds, 1),
            "taken": started.isoformat("T", "seconds"),
        }
    return Taken(entries, drawings)


def is_known_by(metric: str) -> bool:
    """True for exam/NAME/VALUE with a value that exams are known by, which is told where there is room for little."""
    return metric.rpartition("/")[2] in ("i2t_r1", "t2i_r1", "top1", "r1")


def metrics_of(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Every score as a metric to log: `exam/NAME/i2t_r1` and so on."""
    return {
        f"exam/{name}/{metric}": score["value"]
        for name, entry in entries.items()
        for metric, score in entry["scores"].items()
    }


def _entry(score: Score) -> dict[str, Any]:
    scores = {
        name: {"value": v.value, "low": v.low, "high": v.high, "chance": v.chance} for name, v in score.values.items()
    }
    counts, dropped, facts = dict(score.counts), dict(score.dropped), dict(score.facts)
    if benchmark := facts.get("benchmark"):
        why = not_compared(score.kind, benchmark, counts, dropped, facts.get("excluded") or {})
        facts |= {"benchmark": None if why else benchmark, "not_compared": why or None}
    return {"kind": score.kind, "scores": scores, "counts": counts, "dropped": dropped, "facts": facts}
