"""The funnel report: how many rows came in, what each rule dropped, how many went out."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from align_train.files import atomic_path, atomic_write


@dataclass(frozen=True)
class Step:
    """One rule's part.

    Attributes:
        rule: its name.
        says: its expression, or what it does.
        nulls: what becomes of rows it cannot judge: keep or drop.
        unknown: rows that it cannot judge.
        alone: rows that it would drop if it were the only rule.
        in_order: rows that it drops of those that the rules before it keep.
    """

    rule: str
    says: str
    nulls: str
    unknown: int
    alone: int
    in_order: int


@dataclass(frozen=True)
class Funnel:
    """What a selection did.

    Attributes:
        rows: rows that came in.
        kept: rows that went out.
        steps: the rules, in order.
        sample: empty, or how a dry run chose the rows; counts over the corpus are then too low.
    """

    rows: int
    kept: int
    steps: tuple[Step, ...]
    sample: str = ""

    def described(self) -> str:
        """One line for a log."""
        dropped = ", ".join(f"{step.rule} {step.in_order:,}" for step in self.steps if step.in_order) or "none"
        return f"{self.kept:,} of {self.rows:,} rows kept ({_percent(self.kept, self.rows)}); dropped: {dropped}"

    def write(self, stem: Path, facts: dict[str, Any]) -> None:
        """STEM.json, STEM.md and STEM.png; `facts` go into the first."""
        stem.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(stem.with_suffix(".md")) as file:
            file.write(self.markdown().encode())
        with atomic_path(stem.with_suffix(".png")) as temporary:
            self.plot(temporary)
        with atomic_write(stem.with_suffix(".json")) as file:  # last: it says that all is done
            file.write(json.dumps({**asdict(self), **facts}, indent=1).encode())

    def markdown(self) -> str:
        """A table with a row for each rule."""
        lines = [
            "# Selection",
            "",
            *(
                [f"A dry run: {self.sample}. What rules count over the corpus is counted over these rows only.", ""]
                if self.sample
                else []
            ),
            "| rule | dropped in order | left | dropped alone | cannot tell (null) | keeps |",
            "|---|---|---|---|---|---|",
            f"| *rows in* | | {self.rows:,} | | | |",
        ]
        for step, left in zip(self.steps, self.left(), strict=True):
            unknown = f"{step.unknown:,}, {'kept' if step.nulls == 'keep' else 'dropped'}" if step.unknown else "0"
            says = step.says.replace("|", "\\|")
            lines.append(
                f"| {step.rule} | {step.in_order:,} ({_percent(step.in_order, self.rows)}) | {left:,} "
                f"| {step.alone:,} ({_percent(step.alone, self.rows)}) | {unknown} | {says} |"
            )
        lines.append(f"| *rows out* | | {self.kept:,} ({_percent(self.kept, self.rows)}) | | | |")
        return "\n".join([*lines, ""])

    def left(self) -> list[int]:
        """Rows left after each rule."""
        left = [self.rows]
        for step in self.steps:
            left.append(left[-1] - step.in_order)
        return left[1:]

    def plot(self, path: Path) -> None:
        """Two panels with a bar for each rule: the rows left after it, and the rows that it drops."""
        from matplotlib.figure import Figure

        names = ["rows in", *(_shortened(step.rule) for step in self.steps)]
        figure = Figure(figsize=(11, 1.6 + 0.4 * len(names)), layout="constrained")
        left, dropped = figure.subplots(1, 2, sharey=True)
        counts = [self.rows, *self.left()]
        self._bars(left, counts, height=0.7, color="#4477aa")
        self._counted(left, "rows left", [f"{count:,} ({_percent(count, self.rows)})" for count in counts])
        alone = [0, *(step.alone for step in self.steps)]
        in_order = [0, *(step.in_order for step in self.steps)]
        self._bars(dropped, alone, height=0.7, color="#ccbb44", label="dropped by the rule alone")
        self._bars(dropped, in_order, height=0.35, color="#aa3377", label="dropped in order (the numbers)")
        self._counted(dropped, "rows dropped", ["", *(f"{count:,}" for count in in_order[1:])])
        left.set_yticks(range(len(names)), names)
        left.invert_yaxis()
        figure.suptitle(f"{self.kept:,} of {self.rows:,} rows kept" + (" (dry run)" if self.sample else ""))
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
        figure.savefig(path, dpi=120, format="png")

    def _bars(self, axes: Any, counts: Sequence[int], **looks: Any) -> None:
        axes.barh(range(len(counts)), [100 * count / max(self.rows, 1) for count in counts], **looks)

    def _counted(self, axes: Any, title: str, labels: Sequence[str]) -> None:
        """Name the axes, and write a column of labels beside them, where no bar reaches."""
        axes.set_title(title, fontsize="medium")
        axes.set_xlim(0, 100)
        axes.set_xlabel("% of rows in")
        axes.spines[["top", "right"]].set_visible(False)
        for place, label in enumerate(labels):
            axes.text(1.02, place, label, transform=axes.get_yaxis_transform(), va="center")


def add_up(counts: Sequence[Sequence[int]]) -> list[int]:
    """The counts of several files together."""
    return [sum(column) for column in zip(*counts, strict=True)]


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "0 %"


def _shortened(name: str) -> str:
    return name if len(name) <= 32 else f"{name[:31]}…"
