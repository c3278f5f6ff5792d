"""Slices of the selected rows, by number, across the parquet files that hold them."""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq


class _File(NamedTuple):
    """A file as it is now: what was read of it holds until it is written anew."""

    path: Path
    modified: int  # nanoseconds
    size: int  # bytes


class _Group(NamedTuple):
    """A row group: its file, its number in it, and its rows among all rows of the selection."""

    file: _File
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
    return pa.concat_tables(parts, promote_options="permissive").combine_chunks()


def _groups(folder: Path) -> list[_Group]:
    return _groups_of(
        tuple(_File(path, path.stat().st_mtime_ns, path.stat().st_size) for path in selected_files(folder))
    )


@lru_cache(maxsize=4)
def _groups_of(files: tuple[_File, ...]) -> list[_Group]:
    groups: list[_Group] = []
    stop = 0
    for file in files:
        with pq.ParquetFile(file.path) as parquet:
            for number in range(parquet.metadata.num_row_groups):
                start, stop = stop, stop + parquet.metadata.row_group(number).num_rows
                groups.append(_Group(file, number, start, stop))
    return groups or [_Group(files[0], 0, 0, 0)]


@lru_cache(maxsize=1)
def _read_group(file: _File, number: int) -> pa.Table:
    """A row group; the last one is kept, since the next task most often begins in it."""
    with pq.ParquetFile(file.path) as parquet:
        return parquet.read_row_group(number)
