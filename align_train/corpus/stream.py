"""Straight from the metadata to pairs: rows are read, judged by the rules, and their images fetched, without shards.

The same rules and the same fetcher as when shards are prepared. Memory is bounded by a row group of the metadata, which
is decoded at once, and by what the fetcher may hold. `datasets` is imported late, see `hf_dataset`.
"""

import atexit
import glob
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
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

PATIENCE = 100_000  # links in a row without an image: no bad luck, but a network that was lost some minutes ago


class Position(NamedTuple):
    """Where a part of the stream goes on: the epoch, which of its files, which block, which kept row."""

    epoch: int = 0
    file: int = 0
    block: int = 0
    row: int = 0


START = Position()


class _Block(NamedTuple):
    """The kept rows of a block, shuffled, where it lies, and what the rules dropped of it."""

    place: Position
    rows: list[dict[str, Any]]
    lost: Tally


class _Row(NamedTuple):
    """A kept row on its way through the fetcher; the rest as in Item."""

    key: str
    url: str
    caption: str
    dropped: Tally
    after: Position


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
        ValueError: a rule counts over the whole corpus, or the block is empty.
    """

    metadata: str | Sequence[str]
    rules: Mapping[str, Any]
    fetcher: Fetcher = field(default_factory=Fetcher)
    columns: Columns = field(default_factory=Columns)
    split: str = "train"
    seed: int = 0
    block: int = 32_768

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"data.stream.block is {self.block}: a block has at least 1 row")
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
        if len(given) == 1 and re.fullmatch(r"[\w.-]+/[\w.-]+(?<!\.parquet)", given[0]) and not Path(given[0]).exists():
            return _hub_files(given[0], self.split)
        return [file.path for file in find_metadata(given)]

    def check(self) -> None:
        """Find the files and look into the first, so that what is wrong is told before any process is started.

        Raises:
            ValueError: a column is missing, the split is, or a file is no whole parquet file.
            OSError: the metadata is not there.
        """
        self._columns_of(self.files[0])

    def items(self, start: Position = START, part: int = 0, parts: int = 1) -> Generator[Item, None, None]:
        """The rows of one of `parts` parts, without end, in an order that the seed fixes.

        Each part has its own files; where there are more parts than files, several take the blocks of one in turn.

        Raises:
            ValueError: a whole epoch keeps no row, or no link of it, or of 100,000 in a row, gives an image.
            OSError: a file cannot be read.
        """
        failed, alive = Tally(), start.epoch - _is_whole(start.epoch, start)  # since the last image; its epoch
        with ExitStack() as opened:
            rows = opened.enter_context(closing(self._rows(start, part, parts)))
            fetched = opened.enter_context(closing(self.fetcher.fetch((row, row.url) for row in rows)))
            # A thread that is still in Arrow or DuckDB when the interpreter ends would abort the process.
            atexit.register(opened.close)
            opened.callback(atexit.unregister, opened.close)
            for result in fetched:
                row, pair = result.key, None
                if result.image is not None:
                    pair = Pair(row.key, result.image.content, row.caption, {"url": row.url})
                    failed, alive = Tally(), row.after.epoch
                else:
                    row.dropped[result.reason] += 1
                    failed[result.reason] += 1
                    if row.after.epoch > alive + 1 or failed.total() >= PATIENCE:
                        raise ValueError(
                            f"{failed.total()} links of {self.metadata} in a row gave no image ({failed.described()}), "
                            f"the last was {row.url} ({result.detail}): check the network and "
                            "data.stream.fetcher.permissions, and go on with resume=RUN"
                        )
                yield Item(pair, row.dropped, row.after)

    def _rows(self, start: Position, part: int, parts: int) -> Generator[_Row, None, None]:
        """Kept rows with a caption, in order, without end."""
        dropped = Tally()
        with RowFilter(self._plan) as row_filter:
            for epoch in count(start.epoch):
                found = not _is_whole(epoch, start)
                with closing(_ahead(self._judged(row_filter, epoch, start, part, parts))) as blocks:
                    for block in blocks:
                        first = start.row if block.place[:3] == start[:3] else 0
                        dropped += Tally() if first else block.lost  # a run that stopped in this block has counted them
                        for row in self._usable(block, first, dropped):
                            found = True
                            yield row
                if not found:
                    raise ValueError(
                        f"of {self.metadata}, process {part + 1} of {parts} kept no row in a whole epoch (dropped: "
                        f"{dropped.described()}): loosen the rules, or, for little metadata, set fewer data.workers "
                        f"or data.stream.block below {self.block}"
                    )

    def _usable(self, block: _Block, first: int, dropped: Tally) -> Iterator[_Row]:
        """The rows from number `first` on that have a caption; the next that has one takes along what was dropped."""
        for number, row in enumerate(block.rows[first:], first + 1):
            if caption := clean_caption(row[self.columns.caption] or ""):
                key, url = str(row[self.columns.key]), row[self.columns.url] or ""
                yield _Row(key, url, caption, Tally(dropped), block.place._replace(row=number))
                dropped.clear()
            else:
                dropped["empty_caption"] += 1

    def _judged(
        self, row_filter: RowFilter, epoch: int, start: Position, part: int, parts: int
    ) -> Generator[_Block, None, None]:
        """The part's blocks of an epoch, from `start` on."""
        files, share, shares = self._own(part, parts)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(files))
        for number in range(start.file if epoch == start.epoch else 0, len(files)):
            for block, table in enumerate(self._blocks(files[order[number]])):
                place = Position(epoch, number, block)
                if block % shares == share and place >= start[:3]:
                    kept, lost = row_filter.kept(table)
                    yield _Block(place, self._shuffled(kept, place), lost)

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

        names = self._columns_of(file)
        path = file if "://" in file else glob.escape(file)
        options = {"columns": names, "batch_size": self.block}  # by default a batch is a row group, which may be empty
        rows = load_dataset("parquet", data_files=[path], split="train", streaming=True, **options)
        # Closed, not dropped: an abandoned reader thread can keep the process from ending.
        with closing(rows.with_format("arrow").iter(batch_size=self.block)) as blocks:
            try:
                yield from blocks
            except (pa.ArrowException, OSError) as error:
                raise OSError(f"{file} cannot be read to its end ({error}): is it whole, and still there?") from error

    def _columns_of(self, file: str) -> list[str]:
        """Those of the file that are needed; ValueError where one is missing."""
        wanted = {self.columns.key, self.columns.url, self.columns.caption, *self._plan.columns}
        present = open_metadata(file).schema.names
        self._plan.check_columns(file, present)
        if missing := sorted(wanted - set(present)):
            raise ValueError(
                f"{file} has no column {missing[0]}, it has {', '.join(present)}: name its columns in "
                "data.stream.columns"
            )
        return [name for name in present if name in wanted]

    def _shuffled(self, table: pa.Table, place: Sequence[int]) -> list[dict[str, Any]]:
        order = np.random.default_rng([self.seed, *place]).permutation(table.num_rows)
        columns = [self.columns.key, self.columns.url, self.columns.caption]
        return list(table.select(columns).take(order).to_pylist())


def _is_whole(epoch: int, start: Position) -> bool:
    """Whether an epoch is read from its beginning."""
    return start <= Position(epoch)


def _ahead(blocks: Generator[_Block, None, None]) -> Generator[_Block, None, None]:
    """The same, each read while the one before is used: while the fetcher waits for rows, its downloads stand still."""
    with closing(blocks), ThreadPoolExecutor(1, "align_train metadata") as reader:
        upcoming = reader.submit(next, blocks, None)
        while (block := upcoming.result()) is not None:
            upcoming = reader.submit(next, blocks, None)
            yield block


def _hub_files(name: str, split: str) -> list[str]:
    """Addresses of the files of a dataset of the hub."""
    from datasets import load_dataset_builder

    try:
        files = load_dataset_builder(name).config.data_files or {}
    except (OSError, ValueError, RuntimeError) as error:
        raise OSError(
            f"{name} is no folder here, and cannot be read as a dataset of the hub ({error}): check "
            "data.stream.metadata, and the network"
        ) from error
    if split not in files:
        raise ValueError(f"{name} has no split {split}, it has {', '.join(files)}: set data.stream.split")
    return list(files[split])
