"""Slices of the selected rows, by number, across the parquet files that hold them."""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq


class _Group(NamedTuple):
    """A row group: its file, its number in it, and its rows among all rows of the selection."""

    file: Path
    number: int
    start: int
    stop: int


def selected_files(folder: Path) -> list[Path]:
    """The parquet files of a selection, in order; FileNotFoundError if there is none."""
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no selected rows: run the step `select` first")
    return files


def selected_rows(folder: Path) -> int:
    """Rows of a selection."""
    return _groups(folder)[-1].stop


def read_rows(folder: Path, start: int, count: int) -> pa.Table:
    """Rows number `start` to `start + count` of a selection, with all columns."""
    parts = [
        _read_group(group.file, group.number).slice(
            max(start - group.start, 0), start + count - max(start, group.start)
        )
        for group in _groups(folder)
        if group.start < start + count and start < group.stop
    ]
    return pa.concat_tables(parts).combine_chunks()


@lru_cache(maxsize=4)
def _groups(folder: Path) -> list[_Group]:
    groups: list[_Group] = []
    stop = 0
    for file in selected_files(folder):
        with pq.ParquetFile(file) as parquet:
            for number in range(parquet.metadata.num_row_groups):
                start, stop = stop, stop + parquet.metadata.row_group(number).num_rows
                groups.append(_Group(file, number, start, stop))
    return groups or [_Group(folder, 0, 0, 0)]


@lru_cache(maxsize=1)
def _read_group(file: Path, number: int) -> pa.Table:
    """A row group; the last one is kept, since the next task most often begins in it."""
    with pq.ParquetFile(file) as parquet:
        return parquet.read_row_group(number)
