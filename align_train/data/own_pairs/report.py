"""What was found in one's own pairs, to be read: short for a terminal, whole as Markdown."""

import html
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from align_train.data.inspection.pairs import Spread
from align_train.data.own_pairs.findings import RARE, Findings, Problem
from align_train.files import atomic_write

REPORT = "report.md"
BAR, SHOWN = 40, 100  # characters of the longest bar, and of a text
_MARKUP = re.compile(r"([\\`*\[\]|~#])")


@dataclass(frozen=True)
class _Rows:
    """Lines of columns; `more` stands below them where some are left out."""

    head: Sequence[str]
    rows: Sequence[Sequence[str | int]]
    more: str = ""


_Section = tuple[str, list[str | _Rows]]


def text(findings: Findings, told: Sequence[str], estimates: Sequence[str]) -> str:
    """For a terminal: what matters, with the first rows of each kind.

    Args:
        findings: of `check_pairs`.
        told: how the data is read, a line each.
        estimates: how long training takes, and how much memory, a line each.
    """
    lines = []
    for title, blocks in _sections(findings, told, estimates, most=3):
        shown = [line for block in blocks for line in ([plain(block)] if isinstance(block, str) else _columns(block))]
        lines += [f"{title if not number else '':<10}{line}".rstrip() for number, line in enumerate(shown)]
    return "\n".join(lines)


def write(findings: Findings, told: Sequence[str], estimates: Sequence[str], folder: Path) -> Path:
    """All of it as FOLDER/report.md; the arguments are those of `text`. Returns the path."""
    parts = ["# The pairs"]
    for title, blocks in _sections(findings, told, estimates, most=1000):
        parts.append(f"## {title.capitalize()}")
        parts += [_escaped(block) if isinstance(block, str) else _table(block) for block in blocks]
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / REPORT) as file:
        file.write(("\n\n".join(parts) + "\n").encode())
    return folder / REPORT


def _sections(findings: Findings, told: Sequence[str], estimates: Sequence[str], most: int) -> Iterator[_Section]:
    """All that is told; of rows and texts, at most so many."""
    if told:
        yield "data", list(told)
    yield "pairs", list(_pairs(findings))
    yield "skipped", list(_skipped(findings, most))
    if findings.images:
        yield "captions", list(_captions(findings, most))
        yield "images", list(_images(findings, most))
    if findings.classes:
        yield "classes", list(_classes(findings.classes, findings.rare_classes, most))
    if estimates:
        yield "estimates", list(estimates)


def _pairs(findings: Findings) -> Iterator[str]:
    rows, images, captions = findings.rows, findings.images, findings.captions
    yield f"{_many(images, 'image')} with {_many(captions, 'caption')}, from {_many(rows, 'row')}"
    how = {"given": ", as given", "cut": ", cut by the hash of the images", "none": ""}[findings.validation_from]
    yield f"{findings.training_images:,} to train on, {findings.validation_images:,} for validation{how}"
    if findings.in_both:
        yield f"{_many(findings.in_both, 'image')} of validation came among those to train on too: left out there"
    if findings.validation_images < 2:
        yield "note: with fewer than two images, validation says nothing"
    if findings.shards:
        megabytes = sum(findings.shards.values()) / 1e6
        yield f"written as {_many(len(findings.shards), 'shard')} of {megabytes:,.1f} MB in all"
    else:
        yield "note: these pairs were refused, and no shard was written"


def _skipped(findings: Findings, most: int) -> Iterator[str | _Rows]:
    if not findings.skipped:
        yield "no row"
    else:
        yield f"{sum(findings.skipped.values()):,} of {_many(findings.rows, 'row')}"
    by_reason: dict[str, list[Problem]] = defaultdict(list)
    for problem in findings.problems:
        by_reason[problem.reason].append(problem)
    for reason, count in findings.skipped.items():
        rows = [(problem.where, problem.detail) for problem in by_reason[reason][:most]]
        yield f"{reason}: {count:,}"
        yield _Rows(("where", "what"), rows, _more(count - len(rows)))
    if findings.empty_captions:
        yield f"of rows that are used, {_many(findings.empty_captions, 'empty caption')} left out"
    if findings.repeated_captions:
        yield f"{_many(findings.repeated_captions, 'caption')} came again with the same image: left out"


def _captions(findings: Findings, most: int) -> Iterator[str | _Rows]:
    facts = findings.text
    yield f"tokens a caption, [CLS] and [SEP] included: {_spread(facts.tokens)}"
    longest = max(facts.token_bins.values(), default=1)
    bars = [(name, count, _bar(count, longest)) for name, count in facts.token_bins.items()]
    yield _Rows(("tokens", "captions", ""), bars)
    if facts.unknown > 0:
        yield f"{facts.unknown:.1%} of the tokens are [UNK], which the vocabulary lacks"
    if findings.too_long:
        yield (
            f"{_many(findings.too_long, 'caption')} of more than {findings.max_tokens} tokens ({facts.cut:.1%}), "
            "which training cuts there"
        )
        rows = [tuple(example.rsplit(": ", 1)) for example in findings.too_long_examples[:most]]
        yield _Rows(("where", "length"), rows, _more(findings.too_long - len(rows)))
    if findings.shared_captions:
        yield f"{_many(findings.shared_captions, 'text')} on several images, {findings.sharing:,} captions in all:"
        yield "these are no negatives of each other under loss.skip_duplicates"
        frequent = [(_many(count, "image"), caption) for caption, count in facts.frequent.items()][:most]
        yield _Rows(("on", "caption"), frequent, _more(findings.shared_captions - len(frequent)))
    if findings.images > 1 and findings.shared_captions == 1 and findings.sharing == findings.captions:
        yield "note: all captions are the same text, and there is nothing to tell apart"


def _images(findings: Findings, most: int) -> Iterator[str | _Rows]:
    yield f"width: {_spread(findings.width)} pixels"
    yield f"height: {_spread(findings.height)} pixels"
    if findings.turned:
        yield f"{_many(findings.turned, 'image')} turned as EXIF says, and written anew as JPEG"
    if findings.small:
        small = _many(findings.small, "image")
        yield f"{small} with a side below the {findings.crop} pixels that the model sees: enlarged"
    if findings.duplicate_images:
        again = _many(findings.duplicate_rows, "row")
        yield f"{_many(findings.duplicate_images, 'image')} under several names: {again} with the bytes of another file"
        rows = [(example,) for example in findings.duplicate_examples[:most]]
        yield _Rows(("such as",), rows, _more(findings.duplicate_rows - len(rows)))
    if findings.label_conflicts:
        yield (
            f"note: {_many(findings.label_conflicts, 'row')} with an image that came under another class before; the "
            "first is kept, with the captions of both"
        )


def _classes(classes: Mapping[str, int], rare: Sequence[str], most: int) -> Iterator[str | _Rows]:
    counts = list(classes.values())
    most_images, ratio = _many(counts[0], "image"), counts[0] / counts[-1]
    yield f"{len(classes):,}, from {counts[-1]:,} to {most_images}: the largest is {ratio:.3g} times the smallest"
    rows: list[Sequence[str | int]] = [(name, count, _bar(count, counts[0])) for name, count in classes.items()]
    left_out = len(rows) - 2 * most
    if left_out > 0:
        rows = [*rows[:most], (f"({left_out:,} others)", "", ""), *rows[-most:]]
    yield _Rows(("class", "images", ""), rows)
    if rare:
        names = ", ".join(rare[:most])
        yield f"note: {len(rare):,} with fewer than {RARE} images: {names}{', ...' * (len(rare) > most)}"


def _columns(block: _Rows) -> list[str]:
    """The rows as lines: numbers to the right, the last column as long as it is."""
    texts = [[_cut(f"{cell:,}" if isinstance(cell, int) else cell) for cell in row] for row in block.rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = []
    for row, cells in zip(block.rows, texts, strict=True):
        padded = [
            text.rjust(width) if isinstance(cell, int) else text.ljust(width)
            for cell, text, width in zip(row, cells, widths, strict=True)
        ]
        lines.append(f"  {'  '.join(padded)}".rstrip())
    return [*lines, f"  {block.more}"] if block.more else lines


def _table(block: _Rows) -> str:
    numbers = [isinstance(cell, int) for cell in block.rows[0]] if block.rows else []
    rows = [block.head, ["---:" if number else "---" for number in numbers]]
    cells = [[f"{cell:,}" if isinstance(cell, int) else _escaped(cell) for cell in row] for row in block.rows]
    lines = [_piped(row) for row in (*rows, *cells)]
    return "\n".join([*lines, "", block.more] if block.more else lines)


def _piped(row: Iterable[str]) -> str:
    return f"| {' | '.join(row)} |"


def _escaped(text: str) -> str:
    """In one line, with nothing that Markdown or HTML would take for markup."""
    return _MARKUP.sub(r"\\\1", html.escape(plain(text), quote=False))


def _cut(text: str) -> str:
    """Both ends of the text: of a path, the end says more."""
    text = plain(text)
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]}…{text[1 - SHOWN // 2 :]}"


def plain(text: str) -> str:
    """In one line, without what moves a terminal's cursor."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))


def _spread(spread: Spread) -> str:
    return f"{spread.min:,} to {spread.max:,}, half up to {spread.median:,}, 95% up to {spread.p95:,}"


def _bar(count: int, most: int) -> str:
    return "█" * -(-BAR * count // most)


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _more(count: int) -> str:
    return f"and {count:,} more" if count > 0 else ""
