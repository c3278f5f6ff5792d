"""A path through points with some of them named, no name over another or over the path."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import cos, pi, sin
from typing import Any

from align_train.evaluation.report.plots import FAINT, INK, SERIES, figure_of, literal, plain_axes, svg_of

WIDER = 1.15  # the page's font may be wider than the one that is measured here
CLEAR = 7  # pixels around a name: the radius of a marked point
LEAST = 1.0  # that an axis is long: what is nearer together is to look near


@dataclass(frozen=True)
class Marked:
    """A point to name: its number, what it is called, whether it is the one that matters."""

    number: int
    text: str
    loud: bool = False


def path_plot(
    points: Sequence[tuple[float, float]], marked: Sequence[Marked], axes_names: tuple[str, str], bound: float | None
) -> str:
    """An SVG element: the points connected in their order.

    Args:
        points: x and y.
        marked: which of them are named.
        axes_names: of x and y.
        bound: where a vertical line is drawn; None for none.
    """
    figure = figure_of(6.2, 4.2)
    axes = figure.add_subplot()
    axes.plot(*zip(*points, strict=True), "o-", color=SERIES[0], linewidth=1.4, markersize=4)
    for each in marked:
        colour, size = (SERIES[1], 10) if each.loud else (SERIES[0], 7.5)
        axes.plot(*points[each.number], "o", color=colour, markersize=size, zorder=4 if each.loud else 3)
    if bound is not None:
        axes.axvline(bound, color=FAINT, linestyle=":", linewidth=1.2)
    for values, limit in zip(zip(*points, strict=True), (axes.set_xlim, axes.set_ylim), strict=True):
        low, high = min(values), max(values)
        beyond = max(0.15 * (high - low), (LEAST - (high - low)) / 2)
        limit(low - beyond, high + beyond)
    axes.ticklabel_format(useOffset=False)
    plain_axes(axes, "both")
    axes.set_xlabel(axes_names[0])
    axes.set_ylabel(axes_names[1])
    _name(axes, points, marked, bound)
    return svg_of(figure, f"Path of {axes_names[1]} over {axes_names[0]}")


def _name(axes: Any, points: Sequence[tuple[float, float]], marked: Sequence[Marked], bound: float | None) -> None:
    """Each name near its point, where it covers least of the path, the points and other names."""
    import numpy as np

    axes.figure.draw_without_rendering()  # the layout, so that places on the figure are known
    places = axes.transData.transform(points)
    steps = np.linspace(0, 1, 60)[:, None]
    lines = list(pairwise(places))
    if bound is not None:
        lines.append(tuple(axes.transData.transform([(bound, y) for y in axes.get_ylim()])))
    drawn = np.concatenate([places, *(a + steps * (b - a) for a, b in lines)])
    for each in marked:
        looks = {"color": INK, "fontweight": "bold" if each.loud else "normal", "ha": "center", "va": "center"}
        text = axes.annotate(literal(each.text), points[each.number], (0, 0), textcoords="offset points", **looks)
        box = text.get_window_extent()
        size = np.array([WIDER * box.width, box.height])
        centre = min(
            (places[each.number] + offset for offset in _offsets(size)),
            key=lambda centre: _covered(centre, size, drawn, axes.get_window_extent()),
        )
        text.set_position((centre - places[each.number]) * 72 / axes.figure.dpi)
        fill = centre + size / 2 * np.stack(np.meshgrid(*[np.linspace(-1, 1, 21)] * 2), -1).reshape(-1, 2)
        drawn = np.concatenate([drawn, fill])


def _offsets(size: Any) -> Iterator[Any]:
    """Where a box of this size may lie around a point, from its centre, nearest first; pixels."""
    import numpy as np

    for away in (11, 16, 22, 30, 40):
        for turn in range(16):
            direction = np.array([cos(pi * turn / 8), sin(pi * turn / 8)])
            yield direction * (away + size / 2)


def _covered(centre: Any, size: Any, drawn: Any, inside: Any) -> int:
    """How much of what is drawn a box covers; all of it for one that leaves the axes."""
    low, high = centre - size / 2, centre + size / 2
    if (low < inside.min).any() or (high > inside.max).any():
        return len(drawn)
    return int(((drawn > low - CLEAR) & (drawn < high + CLEAR)).all(1).sum())
