"""The columns of csv, tsv, jsonl and parquet files."""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

DELIMITERS = {".csv": ",", ".tsv": "\t"}
KINDS = (*DELIMITERS, ".jsonl", ".parquet")
TOGETHER = 16  # rows of parquet that become Python objects at a time: they may hold whole image files


def header(path: Path, delimiter: str | None = None) -> list[str]:
    """Names of the columns: of jsonl, those of its first line.

    Raises:
        ValueError: the file is not what its ending says, or has no row that names columns.
        OSError: it cannot be read.
    """
    if path.suffix == ".parquet":
        return list(_schema(path).names)
    first = next(_rows(path, delimiter), None)
    if first is None:
        raise ValueError(f"{path} is empty: its first line should name the columns")
    return list(first)


def values(path: Path, column: str, delimiter: str | None = None) -> list[Any]:
    """The values of a column, None where a row has none; errors as `header`."""
    if path.suffix == ".parquet":
        try:
            return list(pq.read_table(path, columns=[column])[column].to_pylist())
        except (pa.ArrowException, KeyError) as error:
            raise _unreadable(path, error) from error
    rows = [row.get(column) for row in _rows(path, delimiter)]
    return rows if path.suffix == ".jsonl" else rows[1:]  # without the names


def rows(path: Path, columns: Sequence[str] | None = None, delimiter: str | None = None) -> Iterator[dict[str, Any]]:
    """The rows as they are read, of parquet the named columns alone and a row group in memory; errors as `header`."""
    if path.suffix == ".parquet":
        yield from _parquet_rows(path, columns)
        return
    read = _rows(path, delimiter)
    if path.suffix != ".jsonl":
        next(read, None)  # the names
    yield from read


def holds_files(path: Path, column: str) -> bool:
    """Whether a column holds the files themselves: bytes, or the struct of `datasets` with bytes in it."""
    if path.suffix != ".parquet":
        return False
    kind = _schema(path).field(column).type
    if pa.types.is_struct(kind):
        return "bytes" in {kind.field(number).name for number in range(kind.num_fields)}
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


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


def _rows(path: Path, delimiter: str | None) -> Iterator[dict[str, Any]]:
    """A row at a time; of csv and tsv the first one maps the names to themselves."""
    read = _json_rows(path) if path.suffix == ".jsonl" else _csv_rows(path, delimiter or DELIMITERS[path.suffix])
    try:
        yield from read
    except (csv.Error, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def _csv_rows(path: Path, delimiter: str) -> Iterator[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        names: list[str] = []
        for row in reader:
            names = names or row
            if len(row) != len(names) and row:
                raise ValueError(
                    f"{path}: line {reader.line_num} has {len(row)} fields and the first line {len(names)}: put texts "
                    f"with {delimiter!r} in quotes, or set delimiter"
                )
            if row:
                yield dict(zip(names, row, strict=True))


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}: line {number} is no JSON ({error}): write one object a line") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}: line {number} is {type(row).__name__}: write one object a line")
            yield row


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is not readable {path.suffix[1:]} ({error}): write it again, or correct its ending")
