"""The columns of csv, tsv, jsonl and parquet files."""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

DELIMITERS = {".csv": ",", ".tsv": "\t", ".txt": ","}
KINDS = (".csv", ".tsv", ".jsonl", ".parquet")
TOGETHER = 16  # rows of parquet that become Python objects at a time: they may hold whole image files


@dataclass(frozen=True)
class Layout:
    """How a csv or tsv is written; of a jsonl the encoding counts alone.

    Attributes:
        delimiter: between columns; None for that of the file's ending.
        encoding: as `open` takes it.
        errors: `strict`, or `surrogateescape` for rows that are `Broken` where bytes are not of the encoding.
        names: of the columns, where the first row has values; none where it has the names.
    """

    delimiter: str | None = None
    encoding: str = "utf-8-sig"
    errors: str = "strict"
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Broken:
    """A row that cannot be read: a reason to count it under, and a sentence with its line."""

    reason: str
    detail: str


def kind(path: Path) -> str:
    """The ending in lower case, with its dot: one of KINDS for a table."""
    return path.suffix.lower()


def header(path: Path, delimiter: str | None = None) -> list[str]:
    """Names of the columns: of jsonl, those of its first line.

    Raises:
        ValueError: the file is not what its ending says, or has no row that names columns.
        OSError: it cannot be read.
    """
    if kind(path) == ".parquet":
        return list(_schema(path).names)
    first = next(_whole_rows(path, delimiter), None)
    if first is None:
        raise ValueError(f"{path} is empty: its first line should name the columns")
    return list(first)


def values(path: Path, column: str, delimiter: str | None = None) -> list[Any]:
    """The values of a column, None where a row has none; errors as `header`."""
    if kind(path) == ".parquet":
        try:
            return list(pq.read_table(path, columns=[column])[column].to_pylist())
        except (pa.ArrowException, KeyError) as error:
            raise _unreadable(path, error) from error
    rows = [row.get(column) for row in _whole_rows(path, delimiter)]
    return rows if kind(path) == ".jsonl" else rows[1:]  # without the names


def rows(
    path: Path, columns: Sequence[str] | None = None, layout: Layout = Layout()
) -> Iterator[dict[str, Any] | Broken]:
    """The rows as they are read, of parquet the named columns alone and a row group in memory; errors as `header`."""
    if kind(path) == ".parquet":
        yield from _parquet_rows(path, columns)
        return
    read = _rows(path, layout)
    if kind(path) != ".jsonl":
        next(read, None)  # the names
    yield from read


def class_names(path: Path, column: str) -> tuple[str, ...]:
    """Names of the classes that a column has numbers of, as `datasets` writes them into parquet; none elsewhere."""
    if kind(path) != ".parquet":
        return ()
    try:
        features = json.loads((_schema(path).metadata or {})[b"huggingface"])["info"]["features"]
        names = features[column]["names"] if features[column]["_type"] == "ClassLabel" else ()
    except (KeyError, TypeError, ValueError):  # another writer's, or another kind of column
        return ()
    return tuple(map(str, names))


def holds_files(path: Path, column: str) -> bool:
    """Whether a column holds the files themselves: bytes, or the struct of `datasets` with bytes in it."""
    if kind(path) != ".parquet":
        return False
    held = _schema(path).field(column).type
    if pa.types.is_struct(held):
        return "bytes" in {held.field(number).name for number in range(held.num_fields)}
    return bool(pa.types.is_binary(held) or pa.types.is_large_binary(held))


def _schema(path: Path) -> pa.Schema:
    try:
        return pq.read_schema(path)
    except pa.ArrowException as error:
        raise _unreadable(path, error) from error


def _parquet_rows(path: Path, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(TOGETHER, columns=columns and list(columns)):
                yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise _unreadable(path, error) from error


def _whole_rows(path: Path, delimiter: str | None) -> Iterator[dict[str, Any]]:
    """As `_rows`, of which none may be broken."""
    for row in _rows(path, Layout(delimiter)):
        if isinstance(row, Broken):
            raise ValueError(row.detail)
        yield row


def _rows(path: Path, layout: Layout) -> Iterator[dict[str, Any] | Broken]:
    """A row at a time; of csv and tsv the first one maps the names to themselves."""
    read = _json_rows(path, layout) if kind(path) == ".jsonl" else _csv_rows(path, layout)
    try:
        yield from read
    except UnicodeError as error:
        raise _unreadable(path, error) from error


def _csv_rows(path: Path, layout: Layout) -> Iterator[dict[str, Any] | Broken]:
    delimiter, names = layout.delimiter or DELIMITERS[kind(path)], list(layout.names)
    if names:
        yield dict(zip(names, names, strict=True))
    with path.open(newline="", encoding=layout.encoding, errors=layout.errors) as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True, skipinitialspace=True)
        while True:
            line = reader.line_num + 1
            try:
                row = next(reader, None)
            except csv.Error as error:  # the reader goes on behind it
                end = f" to {reader.line_num}, which one quote holds together" if reader.line_num > line else ""
                yield Broken("broken_row", str(_unreadable(path, error, f"line {line}{end}: ")))
                continue
            if row is None:
                return
            if not row:
                continue
            if not names:
                names = _names(path, row)
                row = names
            if not any(row[len(names) :]):  # empty ones, as spreadsheets write behind the last column
                row = row[: len(names)]
            if len(row) != len(names):
                detail = (
                    f"{path}: line {reader.line_num} has {len(row)} fields and the first line {len(names)}: put texts "
                    f"with {delimiter!r} in quotes, or set delimiter"
                )
                yield Broken("ragged_row", detail)
            else:
                yield _encoded(path, reader.line_num, "".join(row)) or dict(zip(names, row, strict=True))


def _names(path: Path, row: Sequence[str]) -> list[str]:
    """The names of the columns in a first row; one without a name is called by its number."""
    names = [name.strip() or f"column {number}" for number, name in enumerate(row, 1)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path} has several columns called {' and '.join(twice)}: give each a name of its own")
    return names


def _json_rows(path: Path, layout: Layout) -> Iterator[dict[str, Any] | Broken]:
    with path.open(encoding=layout.encoding, errors=layout.errors) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            if broken := _encoded(path, number, line):
                yield broken
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield Broken("broken_row", f"{path}: line {number} is no JSON ({error}): write one object a line")
                continue
            if isinstance(row, dict):
                yield row
            else:
                detail = f"{path}: line {number} is {type(row).__name__}: write one object a line"
                yield Broken("broken_row", detail)


def _encoded(path: Path, line: int, text: str) -> Broken | None:
    """What is wrong with a text that has bytes of another encoding, as `surrogateescape` leaves them."""
    if any("\udc80" <= letter <= "\udcff" for letter in text):
        return Broken("unreadable_text", f"{path}: line {line} is not UTF-8: write it again in UTF-8")
    return None


def _unreadable(path: Path, error: Exception, place: str = "") -> ValueError:
    return ValueError(
        f"{path} is not readable {kind(path)[1:]} ({place}{error}): write it again, or correct its ending"
    )
