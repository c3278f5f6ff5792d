"""How a csv, tsv or jsonl is written: its delimiter, its encoding, and whether its first line names the columns."""

import csv
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from dataclasses import replace
from pathlib import Path

from align_train.data.own_pairs.pictures import names_picture
from align_train.data.testsets.table_files import DELIMITERS, Layout, kind

_TRIED = (",", ";", "\t", "|")
_NAMED = {"tab": "\t", "\\t": "\t"}


def layout_of(path: Path, delimiter: str | None) -> tuple[Layout, list[str]]:
    """The layout by what is in the file, and lines that say what is not as the ending of its name says.

    Args:
        path: of a table.
        delimiter: one character, or `tab`; None takes that which makes most columns of the first line.

    Raises:
        OSError: the file cannot be read.
        ValueError: the delimiter is no character.
    """
    if kind(path) == ".parquet":
        return Layout(), []
    layout, told = _encoded(path)
    if kind(path) == ".jsonl":
        return layout, told
    usual, given = DELIMITERS[kind(path)], delimiter and _NAMED.get(delimiter, delimiter)
    if given is not None and (len(given) != 1 or given in '"\r\n'):
        raise ValueError(f"pairs.delimiter is {delimiter!r}: give one character, or tab")
    with path.open(newline="", encoding=layout.encoding, errors="replace") as file:
        line = next((line for line in file if line.strip()), "")
    chosen = given or max((usual, *_TRIED), key=lambda each: (_has_picture(line, each), len(_cells(line, each))))
    if chosen != usual and not given:
        told.append(f"{path.name}: {chosen!r} divides its columns. Change with pairs.delimiter=CHARACTER")
    names: tuple[str, ...] = ()
    if _has_picture(line, chosen):
        names = tuple(f"column {number}" for number in range(1, len(_cells(line, chosen)) + 1))
        told.append(
            f"{path.name}: the first line names an image, so it is a row, and the columns are called "
            f"{', '.join(names)}. Change by writing a line of names above it"
        )
    return replace(layout, delimiter=chosen, names=names), told


def _encoded(path: Path) -> tuple[Layout, list[str]]:
    """UTF-8; UTF-16 where the file begins with its mark; Windows-1252 where no line has letters of UTF-8."""
    with path.open("rb") as file:
        if file.read(2) in (BOM_UTF16_LE, BOM_UTF16_BE):
            return Layout(encoding="utf-16"), [f"{path.name}: read as UTF-16, by the mark it begins with"]
        file.seek(0)
        good = bad = 0
        first = ""
        for number, line in enumerate(file, 1):
            if not line.isascii():
                try:
                    line.decode()
                    good += 1
                except UnicodeDecodeError as error:
                    bad += 1
                    first = first or f"line {number} has the byte 0x{line[error.start]:02x}, which is no UTF-8"
    if not bad:
        return Layout(), []
    if good:
        problem = f"{path.name}: {bad:,} lines are not UTF-8 as the others are ({first}): left out and counted"
        return Layout(errors="surrogateescape"), [problem]
    return Layout(encoding="cp1252", errors="surrogateescape"), [  # some bytes are no letter there either
        f"{path.name}: {first}, so it is read as Windows-1252. Where letters are wrong, write it again in UTF-8"
    ]


def _cells(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
    except csv.Error:  # a cell that is too long
        return []


def _has_picture(line: str, delimiter: str) -> bool:
    return any(map(names_picture, _cells(line, delimiter)))
