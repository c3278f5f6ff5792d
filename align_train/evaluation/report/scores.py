"""The scores of exams as tables, one for each kind of exam."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, TypeGuard

from align_train.evaluation.report.blocks import Cell, Column, Table, aligned


@dataclass(frozen=True)
class Kind:
    """How scores of one kind of exam are shown.

    Attributes:
        title: over the table.
        columns: group and head by the name of a score.
        counts: what the scores are of, as far as it stands beside them; None for all there are.
        note: under the table, of what stands in brackets in the terminal's.
        percent: whether the scores are shares of 1, but for ranks.
        long: scores that the terminal's table leaves to the report.
    """

    title: str
    columns: Mapping[str, tuple[str, str]]
    counts: tuple[str, ...] | None
    note: str
    percent: bool = True
    long: tuple[str, ...] = ()


_INTERVAL = "percent; in brackets the 95 % interval"
_WAYS = {"i2t": "image to text", "t2i": "text to image"}
_TOWERS = ("image", "text")
_ACCURACY = {"top1": ("", "top-1"), "top5": ("", "top-5"), "mean_per_class": ("", "mean per class")}

KINDS = {
    "retrieval": Kind(
        "retrieval",
        {
            f"{way}_{name}": (says, head)
            for way, says in _WAYS.items()
            for name, head in (("r1", "R@1"), ("r5", "R@5"), ("r10", "R@10"), ("median_rank", "median"))
        },
        ("images", "captions"),
        "percent; in brackets what a random order gives; ties count against the model",
        long=("i2t_r10", "t2i_r10"),
    ),
    "zero_shot": Kind(
        "zero-shot classification",
        _ACCURACY,
        ("images", "classes"),
        _INTERVAL,
    ),
    "neighbours": Kind(
        "nearest neighbours",
        {f"r{k}": ("", f"R@{k}") for k in (1, 5, 10, 20)},
        ("images", "training_images"),
        _INTERVAL,
    ),
    "classifier": Kind("classifier", _ACCURACY, ("images", "classes"), _INTERVAL),
    "linear_probe": Kind("linear probe", _ACCURACY, ("images", "training_images", "classes"), _INTERVAL),
    "health": Kind(
        "health of the embeddings",
        {
            "alignment": ("", "alignment"),
            "modality_gap": ("", "modality gap"),
            **{f"uniformity_{tower}": ("uniformity", tower) for tower in _TOWERS},
            **{f"mean_cosine_{tower}": ("mean cosine", tower) for tower in _TOWERS},
            **{f"effective_rank_{tower}": ("effective rank", tower) for tower in _TOWERS},
        },
        ("pairs",),
        "numbers as they are, no percent",
        percent=False,
    ),
}


def kind_named(name: str) -> Kind:
    """The kind, or for a name that is not known one that shows all numbers as they are."""
    unknown = "a kind of exam that this report does not know: numbers as they are, no percent"
    return KINDS.get(name) or Kind(name, {}, None, unknown, percent=False)


def by_kind(exams: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """The exams grouped by kind: known kinds first."""
    kinds = [*KINDS, *sorted({exam["kind"] for exam in exams.values()} - set(KINDS))]
    groups = {kind: {name: exam for name, exam in exams.items() if exam["kind"] == kind} for kind in kinds}
    return {kind: group for kind, group in groups.items() if group}


def scores_text(exams: Mapping[str, Mapping[str, Any]]) -> str:
    """The scores for a terminal or a model card: a table for each kind of exam, an exam a row.

    Args:
        exams: "exams" of a result.json.
    """
    parts = []
    for name, group in by_kind(exams).items():
        kind, table = kind_named(name), score_table(name, group, brief=True)
        parts.append("\n".join([kind.title, aligned(table), kind.note, *lost(group)]))
    return "\n\n".join(parts) or "no exam was taken"


def lost(exams: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence for each exam that could not use all of its data."""
    dropped = {name: exam.get("dropped") or {} for name, exam in exams.items()}
    reasons = {name: ", ".join(f"{why} {count:,}" for why, count in each.items()) for name, each in dropped.items()}
    return [
        f"{name} could not use {sum(each.values()):,} ({reasons[name]}): its scores are of the rest."
        for name, each in dropped.items()
        if any(each.values())
    ]


def score_table(kind_name: str, exams: Mapping[str, Mapping[str, Any]], brief: bool = False) -> Table:
    """The scores of exams of one kind.

    Args:
        kind_name: of all of them.
        exams: of a result.json.
        brief: fewer columns, and one number in brackets, as a terminal has room for.
    """
    kind = kind_named(kind_name)
    taken = {name: ("", name) for exam in exams.values() for name in exam["scores"]}
    columns = {name: says for name, says in kind.columns.items() if name in taken}
    columns |= {name: says for name, says in taken.items() if name not in columns}
    columns = {name: says for name, says in columns.items() if not (brief and name in kind.long)}
    there = {name: None for exam in exams.values() for name in exam.get("counts") or {}}
    counts = [name for name in there if kind.counts is None or name in kind.counts]
    rows = []
    for name, exam in exams.items():
        numbers = [(exam.get("counts") or {}).get(count) for count in counts]
        scores = [score_cell(kind_name, column, exam["scores"].get(column), brief) for column in columns]
        rows.append([Cell(name), *(Cell(_whole(n, brief)) for n in numbers), *scores])
    heads = [Column("exam", numbers=False), *(Column(count.replace("_", " ")) for count in counts)]
    return Table([*heads, *(Column(head, group) for group, head in columns.values())], rows)


def score_cell(kind_name: str, name: str, score: Mapping[str, Any] | None, brief: bool = False) -> Cell:
    """One score, "-" if it was not measured."""
    value, low, high, chance = ((score or {}).get(key) for key in ("value", "low", "high", "chance"))
    if not is_number(value):
        return Cell("-")
    kind = kind_named(kind_name)
    shown = plain if not kind.percent else rank if name.endswith("_rank") else percent
    interval = f"{shown(low)}{'-' if brief else ' to '}{shown(high)}" if is_number(low) and is_number(high) else ""
    random = "" if not is_number(chance) else f"{100 * chance:.2f}" if shown is percent else shown(chance)
    if brief:
        return Cell(shown(value), "" if shown is not percent else random if kind_name == "retrieval" else interval)
    return Cell(shown(value), "; ".join(part for part in (interval, random and f"chance {random}") if part))


def percent(share: float) -> str:
    """A share of 1 with one digit after the point."""
    return f"{100 * share:.1f}"


def rank(number: float) -> str:
    """A rank: whole, or between two."""
    return f"{number:.1f}".removesuffix(".0")


def plain(number: float) -> str:
    """A number as it is, with about four digits."""
    return f"{number:.3f}" if 0.001 <= abs(number) < 10 else f"{number:.4g}"


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a finite number: a score may be null, or NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _whole(count: object, brief: bool) -> str:
    if not isinstance(count, int):
        return "-"
    return f"{count}" if brief else f"{count:,}"
