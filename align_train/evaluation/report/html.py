"""A report as one HTML page that needs no other file, no network and no script."""

from base64 import b64encode
from html import escape
from itertools import groupby
from pathlib import Path

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


def html(document: Document) -> str:
    """The whole page."""
    style = Path(__file__).with_name("page.css").read_text()
    links = "".join(f'<a href="#{_anchor(section)}">{escape(section.title)}</a>' for section in document.sections)
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(document.title)}: report</title>\n<style>\n{style}</style>\n</head>\n<body>",
            f"<header>\n<p>Report of a run</p>\n<h1>{escape(document.title)}</h1>\n<p>{escape(document.summary)}</p>",
            f"<nav>{links}</nav>\n</header>\n<main>",
            *map(_section, document.sections),
            "</main>\n</body>\n</html>\n",
        ]
    )


def _anchor(section: Section) -> str:
    return section.title.lower().replace(" ", "-")


def _section(section: Section) -> str:
    inner = []
    for drawn, blocks in groupby(section.blocks, key=lambda block: isinstance(block, Plot)):
        parts = "\n".join(map(_block, blocks))
        inner.append(f'<div class="plots">\n{parts}\n</div>' if drawn else parts)
    body, head = "\n".join(inner), f"<h2>{escape(section.title)}</h2>"
    if section.folded:
        body, head = f"<details>\n<summary>{head}</summary>\n{body}\n</details>", ""
    return f'<section id="{_anchor(section)}">\n{head}\n{body}\n</section>'


def _block(block: Block) -> str:
    match block:
        case Text(text, loud):
            out = f'<p class="loud">{escape(text)}</p>' if loud else f"<p>{escape(text)}</p>"
        case Heading(text):
            out = f"<h3>{escape(text)}</h3>"
        case Facts(rows):
            out = f"<dl>\n{''.join(f'<dt>{escape(name)}</dt><dd>{_value(value)}</dd>' for name, value in rows)}\n</dl>"
        case Table():
            out = _table(block)
        case Plot(title, says, svg):
            out = f"<figure>\n<figcaption><b>{escape(title)}</b> {escape(says)}</figcaption>\n{svg}\n</figure>"
        case Photo(title, says, path):
            source = f"data:image/png;base64,{b64encode(path.read_bytes()).decode()}"
            picture = f'<img src="{source}" alt="{escape(says)}">'
            out = f"<figure>\n<figcaption><b>{escape(title)}</b></figcaption>\n{picture}\n</figure>"
        case Code(text):
            out = f"<pre>{escape(text)}</pre>"
    return out


def _value(text: str) -> str:
    """A value; of a hash the first digits, the rest on demand."""
    if not is_hash(text):
        return escape(text)
    return f'<details class="hash"><summary><code>{text[:12]}…</code></summary><code>{text}</code></details>'


def _table(table: Table) -> str:
    groups = "".join(
        f'<th colspan="{columns}" scope="colgroup">{escape(name)}</th>' if name else f'<td colspan="{columns}"></td>'
        for name, columns in table.groups()
    )
    named = any(column.group for column in table.columns)
    kinds = [' class="number"' if column.numbers else "" for column in table.columns]
    heads = "".join(
        f'<th scope="col"{kind}>{escape(column.head)}</th>' for column, kind in zip(table.columns, kinds, strict=True)
    )
    rows = []
    for number, row in enumerate(table.rows):
        cells = "".join(f"<td{kind}>{_cell(cell)}</td>" for cell, kind in zip(row, kinds, strict=True))
        rows.append(f'<tr class="marked">{cells}</tr>' if number in table.marked else f"<tr>{cells}</tr>")
    top = f'<tr class="groups">{groups}</tr>\n' if named else ""
    body = "\n".join(rows)
    parts = [f"<thead>\n{top}<tr>{heads}</tr>\n</thead>", f"<tbody>\n{body}\n</tbody>"]
    return "\n".join(['<div class="wide">\n<table>', *parts, "</table>\n</div>"])


def _cell(cell: Cell) -> str:
    text = escape(cell.text)
    if cell.link:
        text = f'<a href="{escape(cell.link)}">{text}</a>'
    if cell.share is not None:
        text = f'<span class="bar" style="--share: {100 * cell.share:.1f}%">{text}</span>'
    below = "".join(f"<small>{escape(part)}</small>" for part in cell.below.split("; ")) if cell.below else ""
    return f"{text}{below}"
