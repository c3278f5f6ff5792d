"""Images that lie as bytes in parquet files."""

import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from align_train.data.testsets.sets import digest, file_identity

KEPT = 2  # row groups in memory: exams read in order


class Row(NamedTuple):
    """Where a row lies: number of the file, of the row group in it, and of the row in that."""

    file: int
    group: int
    row: int


class ParquetImages:
    """N images, of which those are in memory whose row groups were read last.

    Args:
        keys: name of each in the set.
        files: parquet files.
        column: of bytes, or of structs with bytes, in each file.
        rows: where each image lies.
    """

    def __init__(self, keys: Sequence[str], files: Sequence[str], column: str, rows: Sequence[Row]) -> None:
        self.keys, self.files, self.column, self.rows = tuple(keys), tuple(files), column, tuple(rows)
        self._start()

    @property
    def identity(self) -> str:
        """Of the files, as `file_identity`, the column and the rows."""
        return digest([self.column, *map(file_identity, self.files), *map(str, self.rows)])

    def read(self, number: int) -> bytes:
        """The bytes of an image; OSError where the file cannot be read."""
        file, group, row = self.rows[number]
        with self._lock:  # who waits most often wants the same group
            if (file, group) not in self._groups:
                while len(self._groups) >= KEPT:
                    del self._groups[next(iter(self._groups))]
                with pq.ParquetFile(self.files[file]) as opened:
                    self._groups[file, group] = _contents(opened, group, self.column)
            contents = self._groups[file, group]
        return bytes(contents[row].as_py())

    def where(self, number: int) -> str:
        """Its name and file."""
        return f"{self.keys[number]} in {self.files[self.rows[number].file]}"

    def _start(self) -> None:
        self._groups: dict[tuple[int, int], pa.ChunkedArray] = {}  # the one read last comes last
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_groups", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()


def contents_of(files: Sequence[str], column: str) -> Iterator[tuple[Row, bytes | None]]:
    """Every row of the files with its bytes, None where it has none; a row group is in memory at a time."""
    for number, file in enumerate(files):
        with pq.ParquetFile(file) as opened:
            for group in range(opened.num_row_groups):
                for row, content in enumerate(_contents(opened, group, column)):
                    yield Row(number, group, row), content.as_py()


def _contents(file: pq.ParquetFile, group: int, column: str) -> pa.ChunkedArray:
    struct = pa.types.is_struct(file.schema_arrow.field(column).type)
    if not struct:
        return file.read_row_group(group, columns=[column])[column]
    table = file.read_row_group(group, columns=[f"{column}.bytes"])
    return pa.chunked_array([part.field("bytes") for part in table[column].chunks], pa.binary())
