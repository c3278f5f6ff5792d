"""Curves and intervals as SVG that takes its colours and its font from the page."""

import re
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from typing import Any

from align_train.evaluation.report.blocks import Plot
from align_train.evaluation.report.scores import is_number

# Stand-ins for colours of the page, which has others in the dark: matplotlib cannot name them itself.
INK, FAINT = "#fe0001", "#fe0002"
SERIES = tuple(f"#fd000{number}" for number in range(1, 7))
_OF_PAGE = {INK: "var(--ink)", FAINT: "var(--faint)"} | {c: f"var(--series-{n})" for n, c in enumerate(SERIES, 1)}

PAPER_TEMPERATURE = 1 / 64  # where the temperature of ALIGN's models ends: arXiv 2102.05918
# The score of each kind of exam that curves and intervals show.
HEADLINES = {"i2t_r1": "image to text R@1", "t2i_r1": "text to image R@1", "top1": "top-1", "r1": "R@1"}

Curves = Mapping[str, Sequence[tuple[int, float]]]


def training_plots(curves: Curves, batch_size: int | None) -> Iterator[Plot]:
    """Loss, temperature, learning rate, validation and exams over pairs seen; over steps if `batch_size` is None."""
    scale, axis = (batch_size, "pairs seen") if batch_size else (1, "step")

    def drawn(title: str, says: str, lines: Mapping[str, str], **looks: Any) -> Iterator[Plot]:
        if lines := {label: name for label, name in lines.items() if curves.get(name)}:
            points = {label: [(step * scale, value) for step, value in curves[name]] for label, name in lines.items()}
            yield Plot(title, says, _lines(f"{title} over {axis}", points, axis, **looks))

    yield from drawn("Loss", "of a batch, both ways summed", {"loss": "loss"})
    temperature = [value for _, value in curves.get("temperature", [])]
    near = bool(temperature) and min(temperature) < 2 * PAPER_TEMPERATURE
    says = "learned; the dotted line is 1/64, where the paper's ends" if near else "learned"
    reference = PAPER_TEMPERATURE if near else None
    yield from drawn("Temperature", says, {"temperature": "temperature"}, reference=reference)
    yield from drawn("Learning rate", "of the first weights", {"learning rate": "learning_rate"})
    says = "percent of the validation pairs; text to image is dashed"
    yield from drawn("Validation recall", says, _recalls(curves), percent=True)
    says = "percent, taken during training; text to image is dashed"
    yield from drawn("Exam scores", says, _exams(curves), percent=True)


def _recalls(curves: Curves) -> dict[str, str]:
    names = [name for name in curves if re.fullmatch(r"validation/(i2t|t2i)_r\d+", name)]
    ways = {"i2t": "image to text", "t2i": "text to image"}
    return {f"{ways[name[11:14]]} R@{name[16:]}": name for name in names}


def _exams(curves: Curves) -> dict[str, str]:
    found = [name.split("/") for name in curves if name.startswith("exam/") and name.count("/") == 2]
    return {f"{exam}, {HEADLINES[score]}": f"exam/{exam}/{score}" for _, exam, score in found if score in HEADLINES}


def interval_plot(exams: Mapping[str, Mapping[str, Any]]) -> Iterator[Plot]:
    """The first scores of each exam with their intervals and what chance gives; nothing without such a score."""
    shown = [
        (f"{name}, {HEADLINES[key]}", score)
        for name, exam in exams.items()
        for key, score in exam["scores"].items()
        if key in HEADLINES and score and is_number(score["value"])
    ]
    if not shown:
        return
    figure = figure_of(10.5, 0.7 + 0.32 * len(shown))
    axes = figure.add_subplot()
    for place, (_, score) in enumerate(shown):
        low, high = score.get("low"), score.get("high")
        if is_number(low) and is_number(high):
            axes.plot([100 * low, 100 * high], [place, place], color=SERIES[0], linewidth=4, alpha=0.35)
        axes.plot(100 * score["value"], place, "o", color=SERIES[0], markersize=6)
        if is_number(score.get("chance")):
            axes.plot(100 * score["chance"], place, "|", color=FAINT, markersize=11, markeredgewidth=1.5)
    axes.set_yticks(range(len(shown)), [literal(label) for label, _ in shown])
    axes.invert_yaxis()
    axes.set_xlim(-1, 101)
    plain_axes(axes, "x")
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("percent")
    says = "dot: score; bar: 95 % interval; stroke: chance"
    yield Plot("Scores at a glance", says, svg_of(figure, "Scores of the exams with 95 % intervals"))


def _lines(
    alt: str,
    lines: Mapping[str, Sequence[tuple[int, float]]],
    axis: str,
    percent: bool = False,
    reference: float | None = None,
) -> str:
    from matplotlib.ticker import EngFormatter

    alone = len(lines) == 1
    figure = figure_of(*((4.2, 2.8) if alone else (6.2, 3.2 + 0.2 * len(lines))))
    axes = figure.add_subplot()
    groups = list(dict.fromkeys(_group(label) for label in lines))
    for label, points in lines.items():
        x, y = zip(*points, strict=True)
        style = "--" if "text to image" in label else "-"
        marker = "o" if len(x) <= 30 else None
        colour = SERIES[groups.index(_group(label)) % len(SERIES)]
        values = [100 * value for value in y] if percent else y
        axes.plot(x, values, style, marker=marker, markersize=3.5, color=colour, linewidth=1.4, label=literal(label))
    if reference is not None:
        axes.axhline(reference, color=FAINT, linestyle=":", linewidth=1.2)
    plain_axes(axes, "both")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel(axis)
    axes.set_xlim(left=0)
    if percent or reference is not None:
        axes.set_ylim(bottom=0)
    if not alone:
        figure.legend(loc="outside lower left", frameon=False, labelcolor=INK)
    return svg_of(figure, alt)


def _group(label: str) -> str:
    """What the two directions of one score have in common: they share a colour."""
    return label.replace("text to image", "image to text")


def literal(text: str) -> str:
    """The text with no mathematics in it."""
    return text.replace("$", r"\$")


def figure_of(width: float, height: float) -> Any:
    """An empty figure without a background, of this size in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_visible(False)
    return figure


def plain_axes(axes: Any, grid: str) -> None:
    """No frame but the left and lower line, a faint grid, the page's ink."""
    axes.patch.set_visible(False)
    axes.grid(axis=grid, color=FAINT, alpha=0.35, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, color=FAINT, length=0 if grid == "x" else 3)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(INK)


def svg_of(figure: Any, alt: str) -> str:
    """The figure as an element for a page: no ids but those it uses itself, no size, colours of the page."""
    from matplotlib import rc_context

    buffer = StringIO()
    with rc_context({"svg.hashsalt": alt, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\n?", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    size = re.search(r'viewBox="[^"]*"', text)
    assert size is not None
    width = figure.get_figwidth()
    limits = (
        f"min-width: {0.65 * width:.1f}in; max-width: {1.3 * width:.1f}in"  # so that letters keep to a size to read
    )
    text = re.sub(r"<svg[^>]*>", f'<svg {size[0]} style="{limits}" role="img" aria-label="{alt}">', text, count=1)
    for stand_in, colour in _OF_PAGE.items():
        text = text.replace(stand_in, colour)
    return text.strip()
