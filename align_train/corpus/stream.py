"""Straight from the metadata to pairs: rows are read, judged by the rules, and their images fetched, without shards.

The same rules and the same fetcher as when shards are prepared. Memory is bounded by a block of rows and by what the
fetcher may hold. `datasets` is imported late, see `hf_dataset`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from align_train.corpus.captions import clean_caption
from align_train.corpus.fetch import Columns, Fetcher
from align_train.corpus.select.metadata import find_metadata, open_metadata
from align_train.corpus.select.plan import Plan
from align_train.corpus.select.row_filter import RowFilter
from align_train.records import Pair, Tally


class Position(NamedTuple):
    """Where a part of the stream goes on: the epoch, which of its files, which block, which kept row."""

    epoch: int = 0
    file: int = 0
    block: int = 0
    row: int = 0


START = Position()
_Row = tuple[dict[str, Any], Tally, Position]


@dataclass(frozen=True, slots=True)
class Item:
    """One row of the metadata on its way to training.

    Attributes:
        pair: image and caption; None where the row gave none.
        dropped: why it gave none, and the rows that the rules dropped before it, by rule.
        after: where to go on once this item is used.
    """

    pair: Pair | None
    dropped: Tally
    after: Position


@dataclass(frozen=True)
class CoyoStream:
    """Metadata behind links as an endless stream of pairs, cut into parts that share nothing.

    Args:
        metadata: a hub id such as kakaobrain/coyo-700m, or local parquet files, a folder or a glob.
        rules: which rows are kept, by name; only rules that look at one row.
        fetcher: gets the images.
        columns: names of the columns that matter.
        split: of the dataset, where `metadata` is a hub id.
        seed: of the order of files in each epoch, and of rows in each block.
        block: rows that are read, judged and shuffled together.

    Raises:
        ValueError: a rule counts over the whole corpus, or a column is missing.
    """

    metadata: str | Sequence[str]
    rules: Mapping[str, Any]
    fetcher: Fetcher = field(default_factory=Fetcher)
    columns: Columns = field(default_factory=Columns)
    split: str = "train"
    seed: int = 0
    block: int = 8192

    def __post_init__(self) -> None:
        if whole := self._plan.whole_corpus:
            raise ValueError(
                f"{', '.join(whole)} count over the whole corpus, which a stream does not see: select first with "
                "`align-train prepare source=coyo 'source.steps=[select]'` and stream FOLDER/selected with rules=none, "
                "or leave them out (rules=align_paper_rows)"
            )

    @cached_property
    def _plan(self) -> Plan:
        return Plan.of(self.rules)

    @cached_property
    def files(self) -> list[str]:
        """Paths or addresses of the parquet files."""
        given = [self.metadata] if isinstance(self.metadata, str) else list(self.metadata)
        if len(given) == 1 and re.fullmatch(r"[\w.-]+/[\w.-]+", given[0]) and not Path(given[0]).exists():
            from datasets import load_dataset_builder

            return list(load_dataset_builder(given[0]).config.data_files[self.split])
        return [file.path for file in find_metadata(given)]

    def items(self, start: Position = START, part: int = 0, parts: int = 1) -> Iterator[Item]:
        """The rows of one of `parts` parts, without end, in an order that the seed fixes.

        Each part has its own files; where there are more parts than files, several take the blocks of one in turn.
        """
        with closing(self.fetcher.fetch(self._rows(start, part, parts))) as fetched:
            for result in fetched:
                row, dropped, after = result.key
                pair = None
                if result.image is None:
                    dropped[result.reason] += 1
                else:
                    caption = clean_caption(row[self.columns.caption])
                    pair = Pair(
                        str(row[self.columns.key]), result.image.content, caption, {"url": row[self.columns.url]}
                    )
                yield Item(pair, dropped, after)

    def _rows(self, start: Position, part: int, parts: int) -> Iterator[tuple[_Row, str]]:
        """Kept rows with a caption, each with what was dropped since the one before, and where to go on after it."""
        dropped, last = Tally(), start.epoch
        with RowFilter(self._plan) as row_filter:
            for place, table in self._tables(start, part, parts):
                if place.epoch > last + 1:
                    raise ValueError(f"no row of {self.metadata} is kept in a whole epoch: {dropped.described()}")
                kept, lost = row_filter.kept(table)
                rows = self._shuffled(kept, place)
                first = start.row if place[:3] == start[:3] else 0
                dropped += Tally() if first else lost  # a run that stopped in this block has counted them
                for number in range(first, len(rows)):
                    row = rows[number]
                    if not clean_caption(row[self.columns.caption] or ""):
                        dropped["empty_caption"] += 1
                        continue
                    after = place._replace(row=number + 1)
                    yield (row, dropped, after), row[self.columns.url] or ""
                    dropped, last = Tally(), place.epoch

    def _tables(self, start: Position, part: int, parts: int) -> Iterator[tuple[Position, pa.Table]]:
        """The part's blocks from `start` on, epoch after epoch."""
        files, share, shares = self._own(part, parts)
        for epoch in count(start.epoch):
            found = epoch == start.epoch
            order = np.random.default_rng([self.seed, epoch]).permutation(len(files))
            for number in range(start.file if epoch == start.epoch else 0, len(files)):
                for block, table in enumerate(self._blocks(files[order[number]])):
                    place = Position(epoch, number, block)
                    if block % shares == share and place >= start[:3]:
                        found = True
                        yield place, table
            if not found:
                raise ValueError(
                    f"{parts} processes read {self.metadata} in blocks of {self.block} rows, and there is none for "
                    f"number {part}: set fewer data.workers, or a smaller data.stream.block"
                )

    def _own(self, part: int, parts: int) -> tuple[list[str], int, int]:
        """The files of a part, and which share of how many it has of their blocks."""
        files = self.files
        if parts <= len(files):
            return files[part::parts], 0, 1
        file = part % len(files)
        return [files[file]], part // len(files), len(range(file, parts, len(files)))

    def _blocks(self, file: str) -> Iterator[pa.Table]:
        """The rows of a file, `block` at a time, with the columns that are needed."""
        from datasets import load_dataset

        wanted = {self.columns.key, self.columns.url, self.columns.caption, *self._plan.columns}
        present = open_metadata(file).schema.names
        self._plan.check_columns(file, present)
        if missing := wanted - set(present):
            raise ValueError(f"{file} has no column {sorted(missing)[0]}: name its columns in data.stream.columns")
        names = [name for name in present if name in wanted]
        rows = load_dataset("parquet", data_files=[file], split="train", streaming=True, columns=names)
        # Closed, not dropped: an abandoned reader thread can keep the process from ending.
        with closing(rows.with_format("arrow").iter(batch_size=self.block)) as blocks:
            yield from blocks

    def _shuffled(self, table: pa.Table, place: Sequence[int]) -> list[dict[str, Any]]:
        order = np.random.default_rng([self.seed, *place]).permutation(table.num_rows)
        columns = [self.columns.key, self.columns.url, self.columns.caption]
        return list(table.select(columns).take(order).to_pylist())
