"""What a report says of a fine-tuning: before, after and between, on new data and on what is not to be forgotten."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from align_train.evaluation.report.blocks import Block, Cell, Column, Plot, Table, Text, aligned
from align_train.evaluation.report.path_plot import Marked, path_plot
from align_train.evaluation.report.scores import KINDS, is_number, percent

_NAMES = {name: f"{group} {head}".strip() for kind in KINDS.values() for name, (group, head) in kind.columns.items()}
_ALPHA = "Alpha is the share of the way from the start's weights, 0, to those at the end of training, 1 (WiSE-FT)."
OPTIMISTIC = (
    "The recommended alpha was chosen by the scores on new data and guard, so on these data they are a little better "
    "than on others."
)


def finetuning_blocks(finetuning: Mapping[str, Any]) -> Iterator[Block]:
    """The tables and the plot.

    Args:
        finetuning: that of a result.json.
    """
    yield Text(_recommended(finetuning))
    yield before_and_after(finetuning)
    yield Text(f"Percent; differences, against the start, in points. {_ALPHA} {OPTIMISTIC}")
    yield _plot(finetuning)
    yield _all_alphas(finetuning)


def finetuning_text(result: Mapping[str, Any]) -> str:
    """The scores before, after and between for a terminal.

    Args:
        result: a result.json with "finetuning".
    """
    finetuning = result["finetuning"]
    notes = ["percent; differences, against the start, in points", _recommended(finetuning), OPTIMISTIC]
    return "\n".join([aligned(before_and_after(finetuning)), *notes])


def before_and_after(finetuning: Mapping[str, Any]) -> Table:
    """Each score, and the means, of the start, of the recommended alpha and of the end."""
    shown = _shown(finetuning)
    start = shown["start"]
    groups = [f"{name}, alpha {point['alpha']:g}" for name, point in shown.items() if name != "start"]
    columns = [
        *(Column(head, numbers=False) for head in ("data", "score")),
        Column("alpha 0", "start"),
        *(Column(head, group) for group in groups for head in ("score", "difference")),
    ]
    rows, means = [], []
    named = [*finetuning["new"], *finetuning["guard"]]
    beside = [name for name in start["scores"] if name not in named]
    for kind, names in (("new", finetuning["new"]), ("guard", finetuning["guard"]), ("other", beside)):
        for name in names:
            values = [point["scores"].get(name) for point in shown.values()]
            rows.append([Cell(kind), Cell(label(name)), *_compared(*values)])
        if len(names) > 1 and kind != "other":
            means.append(len(rows))
            rows.append([Cell(kind), Cell("mean"), *_compared(*(point[kind] for point in shown.values()))])
    return Table(columns, rows, marked=means)


def wrong_with(finetuning: object) -> str:
    """What "finetuning" of a result.json lacks that the report builds on; "" if nothing."""
    if not isinstance(finetuning, Mapping):
        return "is no object"
    if missing := [key for key in ("new", "guard", "most_loss", "points", "recommended") if key not in finetuning]:
        return f"has no `{missing[0]}`"
    points = finetuning["points"]
    if not isinstance(points, list) or not all(isinstance(point, dict) for point in points):
        return "has `points` that are no list of objects"
    for point in points:
        if not is_number(point.get("alpha")) or not isinstance(point.get("scores"), dict):
            return "has a point without `alpha` or `scores`"
        if not is_number(point.get("new")) or (finetuning["guard"] and not is_number(point.get("guard"))):
            return f"has no means for alpha {point['alpha']}"
    alphas = {point["alpha"] for point in points}
    absent = [alpha for alpha in (0, 1, finetuning["recommended"], _exported(finetuning)) if alpha not in alphas]
    return f"has no point for alpha {absent[0]}" if absent else ""


def exams_of(finetuning: Mapping[str, Any]) -> list[str]:
    """The exams that its scores are of, by name, each once."""
    return list(dict.fromkeys(name.split("/")[1] for name in [*finetuning["new"], *finetuning["guard"]]))


def label(metric: str) -> str:
    """exam/own/i2t_r1 as "own, image to text R@1"."""
    _, exam, value = metric.split("/", 2)
    return f"{exam}, {_NAMES.get(value, value)}"


def _shown(finetuning: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The points that are compared: start, recommended, what was asked for instead, end."""
    points = {point["alpha"]: point for point in finetuning["points"]}
    chosen = {"start": 0, "recommended": finetuning["recommended"], "exported": _exported(finetuning), "end": 1}
    if chosen["exported"] in (0, finetuning["recommended"], 1):
        del chosen["exported"]
    return {name: points[alpha] for name, alpha in chosen.items()}


def _exported(finetuning: Mapping[str, Any]) -> float:
    return float(finetuning.get("exported", finetuning["recommended"]))


def _compared(before: object, *after: object) -> list[Cell]:
    cells = [Cell(percent(before) if is_number(before) else "-")]
    for value in after:
        cells.append(Cell(percent(value) if is_number(value) else "-"))
        cells.append(Cell(_points(value - before) if is_number(value) and is_number(before) else "-"))
    return cells


def _points(share: float) -> str:
    """A difference in points, with its sign."""
    return "0.0" if abs(share) < 0.0005 else f"{100 * share:+.1f}"


def _recommended(finetuning: Mapping[str, Any]) -> str:
    because = str(finetuning.get("because") or "not recorded why")
    told = f"Recommended is alpha {finetuning['recommended']:g}: {because}."
    if _exported(finetuning) != finetuning["recommended"]:
        told += f" Exported, as was asked for, is alpha {_exported(finetuning):g}; the scores of this run are its."
    if "end_step" in finetuning:
        told += f" The end is step {finetuning['end_step']:,}, the best by {finetuning['end_by']}."
    return told


def _all_alphas(finetuning: Mapping[str, Any]) -> Table:
    points, guarded = finetuning["points"], bool(finetuning["guard"])
    columns = [Column("alpha"), Column("new data, mean"), *([Column("guard, mean")] if guarded else [])]
    rows = [
        [
            Cell(f"{point['alpha']:g}"),
            Cell(percent(point["new"])),
            *([Cell(percent(point["guard"]))] if guarded else []),
        ]
        for point in points
    ]
    return Table(columns, rows, [n for n, point in enumerate(points) if point["alpha"] == finetuning["recommended"]])


def _plot(finetuning: Mapping[str, Any]) -> Plot:
    guarded = bool(finetuning["guard"])
    points = [(100 * p["guard"] if guarded else p["alpha"], 100 * p["new"]) for p in finetuning["points"]]
    alphas = [p["alpha"] for p in finetuning["points"]]
    says, bound = "a dot an alpha", None
    if guarded:
        says += "; to the right is what is kept, up is what is learned"
        least = 100 * (_shown(finetuning)["start"]["guard"] - finetuning["most_loss"])
        if min(x for x, _ in points) < least:  # a line far from all points would leave them little room
            says, bound = f"{says}; left of the dotted line more is lost than allowed", least
    axes = ("guard, mean, percent" if guarded else "alpha", "new data, mean, percent")
    marked = _marked(alphas, finetuning["recommended"])
    return Plot("From start to end", says, path_plot(points, marked, axes, bound))


def _marked(alphas: Sequence[float], recommended: float) -> list[Marked]:
    """The places to point out; one label where two of them are one."""
    names = {0.0: "start", 1.0: "end"}
    places = dict.fromkeys([0, recommended, 1])
    marked = []
    for alpha in places:
        says = [names[alpha]] if alpha in names else []
        says += ["recommended"] if alpha == recommended else []
        text = f"{' and '.join(says)}, alpha {alpha:g}"
        marked.append(Marked(alphas.index(alpha), text, alpha == recommended))
    return marked
