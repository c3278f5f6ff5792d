"""Rows a second that a stream filters: rules on Arrow batches, against `datasets` row by row, in one run.

    python benchmarks/synthetic_coyo.py FOLDER --rows 2000000 --files 2
    python benchmarks/stream_filter.py FOLDER [--rounds 3]

Both read the same file through `datasets` streaming with the same columns and keep the same rows.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from datasets import disable_progress_bars, load_dataset
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from align_train.corpus.select.plan import Plan
from align_train.corpus.select.row_filter import RowFilter
from align_train.corpus.stream import CoyoStream
from align_train.shipped import config_folder

COLUMNS = ["id", "url", "text", "width", "height", "word_count"]


def kept_row_by_row(file: str, rows: int) -> Iterator[int]:
    """Ids of the first `rows` rows that the paper's rules keep, judged by a Python function."""
    stream = load_dataset("parquet", data_files=[file], split="train", streaming=True, columns=COLUMNS).take(rows)
    for row in stream.filter(_align_paper):
        yield row["id"]


def _align_paper(row: dict) -> bool:
    short, long = sorted((row["width"], row["height"]))
    return short > 200 and long < 3 * short and 3 <= row["word_count"] <= 20


def kept_by_batch(file: str, rows: int, stream: CoyoStream) -> Iterator[int]:
    """The same ids by the named rules."""
    with RowFilter(Plan.of(stream.rules)) as row_filter:
        for table in islice(stream._blocks(file), rows // stream.block):
            yield from row_filter.kept(table)[0]["id"].to_pylist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    disable_progress_bars()
    file = str(sorted(given.folder.glob("*.parquet"))[0])
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        rules = instantiate(compose("prepare", ["rules=[align_paper_rows]"]).rules, _convert_="all")
    stream = CoyoStream(file, rules)
    few, many = stream.block, 20 * stream.block
    assert list(kept_row_by_row(file, few)) == list(kept_by_batch(file, few, stream))
    slow, fast = [], []
    for _ in range(given.rounds):
        clock = time.perf_counter()
        sum(1 for _ in kept_row_by_row(file, few))
        slow.append(few / (time.perf_counter() - clock))
        clock = time.perf_counter()
        sum(1 for _ in kept_by_batch(file, many, stream))
        fast.append(many / (time.perf_counter() - clock))
        print(f"row by row {slow[-1]:,.0f} rows/s, by batch {fast[-1]:,.0f} rows/s, {fast[-1] / slow[-1]:.0f} times")
    ratio = statistics.median(f / s for f, s in zip(fast, slow, strict=True))
    print(f"median: {statistics.median(slow):,.0f} and {statistics.median(fast):,.0f} rows/s, {ratio:.0f} times")


if __name__ == "__main__":
    main()
