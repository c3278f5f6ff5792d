"""This run beside what others have published."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from align_train.evaluation.published import COLUMNS, PUBLISHED, REMARK
from align_train.evaluation.report.blocks import Cell, Column, Table, aligned
from align_train.evaluation.report.scores import is_number, percent

# Kind of exam and benchmark to column and score.
_MEASURED = {
    ("neighbours", "imagenet"): {"imagenet_neighbours": "r1"},
    ("zero_shot", "imagenet"): {"imagenet_zero_shot": "top1"},
    ("retrieval", "flickr30k"): {"flickr30k_i2t": "i2t_r1", "flickr30k_t2i": "t2i_r1"},
    ("retrieval", "coco"): {"coco_i2t": "i2t_r1", "coco_t2i": "t2i_r1"},
}
NONE_TAKEN = "This run took none of these exams: its row is empty; its scores on other data do not compare with these."


@dataclass(frozen=True)
class Row:
    """A model of the comparison.

    Attributes:
        model: its name.
        data: what it was trained on.
        pairs: pairs seen in training.
        scores: the text of each column of `published.COLUMNS`, percent; "-" where nothing was measured.
        intervals: the 95 % interval of a score, where one was measured.
        source: who says so.
        link: an address of the source, "" for this run.
        published: whether the numbers are of others; False for this run alone.
    """

    model: str
    data: str
    pairs: str
    scores: Mapping[str, str]
    intervals: Mapping[str, str]
    source: str
    link: str = ""
    published: bool = False


def comparison(result: Mapping[str, Any]) -> list[Row]:
    """This run, then the published models.

    An exam counts if its `facts.benchmark` says that it is one of the published ones. Two exams of one kind on one
    benchmark give this run a second row.

    Args:
        result: of a result.json.
    """
    return [*_own_rows(result), *_published_rows()]


def comparison_text(result: Mapping[str, Any]) -> str:
    """The comparison for a terminal."""
    rows = comparison(result)
    own = [row for row in rows if not row.published]
    intervals = [
        f"{row.model}, 95 % interval of {' '.join(COLUMNS[column])}: {text}"
        for row in own
        for column, text in row.intervals.items()
    ]
    notes = [*not_compared_texts(result["exams"]), *([] if any_taken(own) else [NONE_TAKEN])]
    links = {row.source: row.link for row in rows if row.published}
    sources = [f"{source}: {link}" for source, link in links.items()]
    return "\n".join([aligned(comparison_table(rows, brief=True)), "percent", *intervals, *notes, *sources])


def comparison_table(rows: list[Row], brief: bool = False) -> Table:
    """The rows as a table, this run's marked; `brief` leaves out the intervals."""
    columns = [
        *(Column(head, numbers=False) for head in ("model", "trained on")),
        Column("pairs seen"),
        *(Column(head, group) for group, head in COLUMNS.values()),
        Column("source", numbers=False),
    ]
    cells = [
        [
            *(Cell(text) for text in (row.model, row.data, row.pairs)),
            *(Cell(row.scores[column], "" if brief else row.intervals.get(column, "")) for column in COLUMNS),
            Cell(f"published: {row.source}" if row.published else row.source, link=row.link),
        ]
        for row in rows
    ]
    return Table(columns, cells, marked=[number for number, row in enumerate(rows) if not row.published])


def any_taken(rows: list[Row]) -> bool:
    """Whether this run has a number in any column."""
    return any(text != "-" for row in rows if not row.published for text in row.scores.values())


def not_compared_texts(exams: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence for each exam that claims to be of a published benchmark and is not."""
    facts = {name: exam.get("facts") or {} for name, exam in exams.items()}
    return [f"{name}: {each['not_compared']}" for name, each in facts.items() if each.get("not_compared")]


def remarks(rows: list[Row]) -> list[str]:
    """What to read beside the table."""
    return [REMARK] if any_taken(rows) else [NONE_TAKEN, REMARK]


def name_of(result: Mapping[str, Any]) -> str:
    """What the model is called: its run's name, or where its weights were."""
    measured = [exam.get("measured") or {} for exam in result["exams"].values()]
    places = [str(each["checkpoint"]) for each in measured if each.get("checkpoint")]
    return str(result.get("name") or next(iter(places), "no name"))


def pairs_text(pairs: object) -> str:
    """19.66B, 307,200, or "-"."""
    if not is_number(pairs):
        return "-"
    return f"{pairs / 1e9:.4g}B" if pairs >= 1e9 else f"{pairs:,.0f}"


def _published_rows() -> Iterator[Row]:
    for model in PUBLISHED:
        scores = {column: f"{model.scores[column]:.1f}" if column in model.scores else "-" for column in COLUMNS}
        pairs = "not stated" if model.pairs is None else pairs_text(model.pairs)
        yield Row(model.model, model.data, pairs, scores, {}, model.source.name, model.source.link, published=True)


def _own_rows(result: Mapping[str, Any]) -> Iterator[Row]:
    """One row, or as many as there are exams for one column."""
    found: dict[str, list[tuple[str, Mapping[str, Any]]]] = {column: [] for column in COLUMNS}
    for name, exam in result["exams"].items():
        what = str(exam.get("kind")), str((exam.get("facts") or {}).get("benchmark"))
        for column, score in _MEASURED.get(what, {}).items():
            found[column].append((name, exam["scores"].get(score) or {}))
    for line in list(zip_longest(*found.values())) or [()]:
        measured = dict(zip(found, line, strict=True)) if line else {}
        yield _own_row(result, {column: taken for column, taken in measured.items() if taken})


def _own_row(result: Mapping[str, Any], measured: Mapping[str, tuple[str, Mapping[str, Any]]]) -> Row:
    scores, intervals = dict.fromkeys(COLUMNS, "-"), {}
    for column, (_, score) in measured.items():
        if is_number(score.get("value")):
            scores[column] = percent(score["value"])
            if is_number(score.get("low")) and is_number(score.get("high")):
                intervals[column] = f"{percent(score['low'])} to {percent(score['high'])}"
    exams = ", ".join(dict.fromkeys(name for name, _ in measured.values()))
    source = f"measured: {exams}" if exams else "no such exam taken"
    pairs = [str(name) for name in result.get("effective_epochs") or {}]  # sequences of pairs that were trained on
    trained_on = ", ".join(pairs) if pairs and pairs != ["stream"] else str(result.get("name") or "-")
    return Row(
        f"this run: {name_of(result)}", trained_on, pairs_text(result.get("pairs_seen")), scores, intervals, source
    )
