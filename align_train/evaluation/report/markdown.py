"""A report as Markdown, as GitHub shows it. What comes from data cannot become markup."""

import re
from itertools import groupby
from urllib.parse import quote

from align_train.evaluation.report.blocks import (
    Block,
    Cell,
    Code,
    Document,
    Facts,
    Heading,
    Photo,
    Plot,
    Section,
    Table,
    Text,
)
from align_train.evaluation.report.content import is_hash

_MARKUP = re.compile(r"([\\`*\[\]|~#])")


def markdown(document: Document) -> str:
    """The document as text that ends with a line feed; plots are left to the page report.html."""
    parts = [f"# {escaped(document.title)}: report", escaped(document.summary)]
    for section in document.sections:
        parts += [f"## {section.title}", *_blocks(section)]
    return "\n\n".join(part for part in parts if part) + "\n"


def escaped(text: str) -> str:
    """The text in one line, with nothing that Markdown or HTML would take for markup."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKUP.sub(r"\\\1", text)


def _blocks(section: Section) -> list[str]:
    parts = []
    for drawn, blocks in groupby(section.blocks, key=lambda block: isinstance(block, Plot)):
        if drawn:
            titles = ", ".join(block.title.lower() for block in blocks if isinstance(block, Plot))
            parts.append(f"Drawn in [report.html](report.html): {titles}.")
        else:
            parts += map(_block, blocks)
    return parts


def _block(block: Block) -> str:
    match block:
        case Text(text, loud):
            out = f"**Attention: {escaped(text)}**" if loud else escaped(text)
        case Heading(text):
            out = f"### {escaped(text)}"
        case Facts(rows):
            out = "\n".join(f"- {escaped(name)}: {_value(value)}" for name, value in rows)
        case Table():
            out = _table(block)
        case Photo(title, _, path):
            out = f"![{escaped(title)}]({quote(path.name)})"
        case Code(text):
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
            out = f"{fence}\n{text.rstrip()}\n{fence}"
    return out


def _value(text: str) -> str:
    return f"`{text}`" if is_hash(text) else escaped(text)


def _table(table: Table) -> str:
    heads = [f"{column.group} {column.head}".strip() for column in table.columns]
    lines = [[escaped(head) for head in heads], ["---:" if column.numbers else "---" for column in table.columns]]
    for number, row in enumerate(table.rows):
        texts = [_cell(cell) for cell in row]
        lines.append([f"**{texts[0]}**", *texts[1:]] if number in table.marked else texts)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(cell: Cell) -> str:
    text = f"[{escaped(cell.text)}]({cell.link})" if cell.link else escaped(cell.text)
    return f"{text} ({escaped(cell.below)})" if cell.below else text
