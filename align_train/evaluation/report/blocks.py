"""What a report is made of, whatever it is written as. All texts are plain: who writes them escapes them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path


@dataclass(frozen=True)
class Column:
    """A column of a table: its head, what it has in common with its neighbours, and whether it holds numbers."""

    head: str
    group: str = ""
    numbers: bool = True


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: what it says.
        below: what is said less loudly: an interval, a chance.
        link: an address that the text leads to.
        share: drawn as a bar where drawing is possible, 0 to 1.
    """

    text: str
    below: str = ""
    link: str = ""
    share: float | None = None


@dataclass(frozen=True)
class Table:
    """Rows of cells under columns; `marked` are the numbers of the rows to point out."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    marked: Collection[int] = ()

    def groups(self) -> list[tuple[str, int]]:
        """The groups of neighbouring columns: name and how many columns."""
        return [(name, len(list(columns))) for name, columns in groupby(column.group for column in self.columns)]


@dataclass(frozen=True)
class Text:
    """A paragraph; `loud` for what must not be overlooked."""

    text: str
    loud: bool = False


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Plot:
    """A drawing: a title, what it shows, and its SVG element."""

    title: str
    says: str
    svg: str


@dataclass(frozen=True)
class Photo:
    """A picture in a PNG file: a title and what it shows."""

    title: str
    says: str
    path: Path


@dataclass(frozen=True)
class Code:
    """Text that keeps its lines."""

    text: str


@dataclass(frozen=True)
class Heading:
    """Of a part of a section."""

    text: str


Block = Table | Text | Facts | Plot | Photo | Code | Heading


@dataclass(frozen=True)
class Section:
    """Blocks under a title; `folded` ones are shown on demand."""

    title: str
    blocks: Sequence[Block]
    folded: bool = False


@dataclass(frozen=True)
class Document:
    """A report: a title, a sentence, sections."""

    title: str
    summary: str
    sections: Sequence[Section]


def aligned(table: Table) -> str:
    """The table for a terminal: columns of one width, numbers to the right; `below` in brackets."""
    texts = [[f"{cell.text} ({cell.below})" if cell.below else cell.text for cell in row] for row in table.rows]
    lines = [[column.head for column in table.columns], *([text.replace("\n", " ") for text in row] for row in texts)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    groups: list[tuple[str, int]] = []
    for name, columns in table.groups():
        start = sum(count for _, count in groups)
        room = sum(widths[start : start + columns]) + 2 * (columns - 1)
        for extra in range(len(name) - room):
            widths[start + extra % columns] += 1
        groups.append((f" {name} ".center(max(room, len(name)), "-") if name else " " * room, columns))
    out = []
    for line in lines:
        cells = zip(line, widths, table.columns, strict=True)
        out.append("  ".join(f"{text:{'>' if column.numbers else '<'}{width}}" for text, width, column in cells))
    if any(column.group for column in table.columns):
        out.insert(0, "  ".join(name for name, _ in groups))
    return "\n".join(line.rstrip() for line in out)
