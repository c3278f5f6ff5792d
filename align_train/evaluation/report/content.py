"""What a report says: the sections of a run's document."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from align_train.evaluation.report.blocks import (
    Block,
    Cell,
    Code,
    Column,
    Document,
    Facts,
    Heading,
    Photo,
    Section,
    Table,
    Text,
)
from align_train.evaluation.report.comparison import (
    any_taken,
    comparison,
    comparison_table,
    name_of,
    not_compared_texts,
    pairs_text,
    remarks,
)
from align_train.evaluation.report.finetuning import exams_of, finetuning_blocks
from align_train.evaluation.report.plots import interval_plot, training_plots
from align_train.evaluation.report.run_folder import RunFolder
from align_train.evaluation.report.scores import by_kind, is_number, kind_named, lost, percent, score_table

# What result.json says of the model, in the report's order; the rest is "Also recorded".
MODEL = {
    "name": "run",
    "weights_sha256": "SHA-256 of the weights",
    "parameters": "parameters",
    "steps": "steps",
    "batch_size": "batch, pairs",
    "pairs_seen": "pairs seen in training",
    "seed": "seed",
}
# And of how an exam was measured.
MEASURED = {
    "checkpoint": "checkpoint",
    "preprocessing": "preprocessing",
    "batch_norm": "batch norm in evaluation",
    "precision": "precision",
    "device": "device",
    "ranks": "processes",
    "software": "software",
}
_ELSEWHERE = {"worst_classes", "not_compared"}  # facts with a place of their own


def document(run: RunFolder) -> Document:
    """The report of a run, in the order of reading."""
    result = run.result
    sections = [
        Section("Fine-tuning", list(_finetuning(result))),
        Section("Scores", list(_scores(result))),
        Section("Beside published models", list(_beside(result))),
        Section("What was measured", [Facts(_measured(result))]),
        Section("How it was measured", list(_how(result))),
        Section("Training", list(_training(run))),
        Section("What it finds", list(_sheets(run))),
        Section("Worst classes", list(_worst(result))),
        Section("Also recorded", list(_also(result)), folded=True),
        Section("Settings of the run", [Code(run.recipe)] if run.recipe else [], folded=True),
    ]
    return Document(name_of(result), _summary(result), [each for each in sections if each.blocks])


def _summary(result: Mapping[str, Any]) -> str:
    parts = [f"{said(result[key])} {key}" for key in ("parameters", "steps") if is_number(result.get(key))]
    if is_number(result.get("pairs_seen")):
        parts.append(f"{pairs_text(result['pairs_seen'])} pairs seen")
    days = sorted(str(exam["taken"])[:10] for exam in result["exams"].values() if exam.get("taken"))
    if days:
        parts.append(f"exams of {days[0]}" if days[0] == days[-1] else f"exams of {days[0]} to {days[-1]}")
    return " · ".join(parts)


def _finetuning(result: Mapping[str, Any]) -> Iterator[Block]:
    if not (finetuning := result.get("finetuning")):
        return
    yield from finetuning_blocks(finetuning)
    facts = [("start", "start"), ("SHA-256 of its weights", "start_weights_sha256"), ("pairs", "pairs")]
    taken = {name: result["exams"].get(name) or {} for name in exams_of(finetuning)}
    data = [(f"data of {name}", said((exam.get("facts") or {}).get("data"))) for name, exam in taken.items()]
    yield Facts([*((name, said(finetuning.get(key))) for name, key in facts), *data])


def _scores(result: Mapping[str, Any]) -> Iterator[Block]:
    exams = result["exams"]
    if not exams:
        yield Text("No exam was taken.")
        return
    losses = lost(exams)
    yield from (Text(says, loud=True) for says in losses)
    ends = "" if losses else " No image was lost."
    yield Text(f"Percent, unless said otherwise; with a score stand its 95 % interval and what chance gives.{ends}")
    yield from interval_plot(exams)
    for name, group in by_kind(exams).items():
        kind = kind_named(name)
        yield Heading(kind.title[0].upper() + kind.title[1:])
        yield score_table(name, group)
        if not kind.percent:
            yield Text(f"{kind.note[0].upper()}{kind.note[1:]}.")


def _beside(result: Mapping[str, Any]) -> Iterator[Block]:
    rows = comparison(result)
    yield Text(
        "The marked row was measured here. Every other number is published: what its source says of another model, and "
        "was not measured again."
        if any_taken(rows)
        else "Every number in this table is published: what its source says of another model."
    )
    yield comparison_table(rows)
    yield from map(Text, [*not_compared_texts(result["exams"]), *remarks(rows)])


def _measured(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts = [(label, said(result.get(key))) for key, label in MODEL.items()]
    dates = sorted(str(exam["taken"]) for exam in result["exams"].values() if exam.get("taken"))
    seconds = [exam["seconds"] for exam in result["exams"].values() if is_number(exam.get("seconds"))]
    facts.append(("exams taken", " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else "not recorded"))
    return [*facts, ("seconds of all exams", said(round(sum(seconds), 1)) if seconds else "not recorded")]


def _how(result: Mapping[str, Any]) -> Iterator[Block]:
    rows = {name: _how_exam(exam) for name, exam in result["exams"].items()}
    first, *others = rows.values() or [{}]
    shared = [row for row in first.items() if others and all(row in each.items() for each in others)]
    if shared:
        yield Heading("All exams")
        yield Facts(shared)
    for name, each in rows.items():
        yield Heading(name)
        yield Facts([row for row in each.items() if row not in shared])


def _how_exam(exam: Mapping[str, Any]) -> dict[str, str]:
    rows = {"kind": kind_named(exam["kind"]).title, "counts": said(exam.get("counts"))}
    rows |= _facts({key: value for key, value in (exam.get("facts") or {}).items() if key not in _ELSEWHERE})
    measured = exam.get("measured") or {}
    rows |= {label: said(measured.get(key)) for key, label in MEASURED.items()}
    rows |= {key.replace("_", " "): said(value) for key, value in measured.items() if key not in MEASURED}
    return rows | {key: said(exam.get(key)) for key in ("dropped", "seconds", "taken")}


def _facts(facts: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """Facts by what they are called; those of a training set, which are facts of their own, one by one; not counts."""
    rows: dict[str, str] = {}
    for key, value in facts.items():
        name = before + key.replace("_sha256", ", SHA-256").replace("_", " ")
        if isinstance(value, Mapping) and value and key != "left_out":
            rows |= _facts(value, f"{name} ")
        else:
            rows[name] = "none" if value is None else said(value)
    return rows


def _training(run: RunFolder) -> Iterator[Block]:
    if not run.curves:
        yield Text("There are no curves: the folder has no metrics.csv with values.")
        return
    batch_size = run.result.get("batch_size")
    if not batch_size:
        yield Text("result.json names no batch size, so the curves are over steps.")
    drawn = list(training_plots(run.curves, batch_size or None))
    yield from drawn
    wanted = ("Loss", "Temperature", "Learning rate", "Validation recall", "Exam scores")
    if missing := [title.lower() for title in wanted if title not in {plot.title for plot in drawn}]:
        yield Text(f"metrics.csv says nothing of: {', '.join(missing)}.")


def _sheets(run: RunFolder) -> Iterator[Block]:
    if run.sheets:
        yield Text(
            "A caption a row, its best images beside it; the right one is framed in green. Rows are picked by their "
            "place in the test alone, not by how well they went."
        )
    for name, path in run.sheets.items():
        yield Photo(name, f"Captions of {name} and the images that the model finds for them", path)


def _worst(result: Mapping[str, Any]) -> Iterator[Block]:
    names = [Column(head, numbers=False) for head in ("class", "right", "taken for")]
    columns = [names[0], Column("images"), *names[1:]]
    for name, exam in result["exams"].items():
        classes = (exam.get("facts") or {}).get("worst_classes") or []
        if not classes:
            continue
        yield Heading(name)
        yield Table(columns, [_class_row(each) for each in classes])


def _class_row(each: Mapping[str, Any]) -> list[Cell]:
    right = each.get("correct")
    others = ", ".join(f"{other} {_percent(share)}" for other, share in each.get("taken_for") or [])
    right_cell = Cell(_percent(right), share=right if is_number(right) else None)
    return [Cell(str(each.get("name"))), Cell(said(each.get("images"))), right_cell, Cell(others or "-")]


def _percent(share: object) -> str:
    return f"{percent(share)} %" if is_number(share) else "-"


def _also(result: Mapping[str, Any]) -> Iterator[Block]:
    rest = {key: value for key, value in result.items() if key not in MODEL and key not in ("exams", "finetuning")}
    if rest:
        yield Facts([(key.replace("_", " "), said(value)) for key, value in rest.items()])


def said(value: object) -> str:
    """A value of a JSON file as text: what is null was not recorded; whole numbers have commas."""
    if value is None:
        return "not recorded"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key.replace('_', ' ')} {said(each)}" for key, each in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(f"({said(each)})" if isinstance(each, list) else said(each) for each in value) or "none"
    return str(value)


def is_hash(text: str) -> bool:
    """Whether it is a SHA-256 in hexadecimal digits."""
    return re.fullmatch("[0-9a-f]{64}", text) is not None
