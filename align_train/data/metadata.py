"""What is known of a shard's pairs beside image and caption, for rules to look at."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from align_train.corpus.images import Unusable
from align_train.data.captions import read_json
from align_train.data.storage.shards import OpenFiles, Shard
from align_train.data.storage.tars import BrokenShard, Index
from align_train.records import Tally

PAIR = "_pair"  # the column that holds the row in the index


def metadata_of(shard: Shard, index: Index, rows: np.ndarray, columns: Sequence[str], dropped: Tally) -> pa.Table:
    """A row for each of the pairs of which something is known: its row in the index as `_pair`, and the columns.

    They come from the sidecar if it has them all, else from the json files in the tar. A column that neither has is
    not in the table.

    Args:
        shard: whose pairs.
        index: of the shard, with the kind `json`.
        rows: the pairs.
        columns: what is wanted.
        dropped: counts the pairs of which nothing is known: no_metadata, corrupt_json.

    Raises:
        BrokenShard: the sidecar is no parquet file, or the values of a column are of several types.
    """
    if shard.sidecar is not None:
        table = shard.metadata(["key", *columns])
        if {"key", *columns} <= set(table.column_names):
            return _by_key(table, index, rows, dropped)
    return _from_json(shard, index, rows, columns, dropped)


def _by_key(table: pa.Table, index: Index, rows: np.ndarray, dropped: Tally) -> pa.Table:
    keys, known = [index.keys[row] for row in rows], table["key"].to_pylist()
    if keys != known:  # what was tried and not written, what lacks a caption, another order
        place = {key: number for number, key in enumerate(known)}
        found = [number for number, key in enumerate(keys) if key in place]
        if lost := len(keys) - len(found):
            dropped["no_metadata"] += lost
        table, rows = table.take([place[keys[number]] for number in found]), rows[found]
    return table.append_column(PAIR, pa.array(rows))


def _from_json(shard: Shard, index: Index, rows: np.ndarray, columns: Sequence[str], dropped: Tally) -> pa.Table:
    files, documents, known = OpenFiles(1), [], []
    for row in rows.tolist():
        span = index.span("json", row)
        try:
            if span is None:
                raise Unusable("no_metadata", index.keys[row])
            where = f"{index.keys[row]} in {shard}"
            documents.append(read_json(files.read(shard.path, span, where), where))
            known.append(row)
        except Unusable as problem:
            dropped[problem.reason] += 1
    files.close()
    present = [column for column in columns if any(column in document for document in documents)]
    values = {column: _array(column, [document.get(column) for document in documents], shard) for column in present}
    return pa.table({PAIR: pa.array(known, pa.int64()), **values})


def _array(column: str, values: Sequence[Any], shard: Shard) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        kinds = ", ".join(f"{kind} {count} times" for kind, count in Counter(type(v).__name__ for v in values).items())
        raise BrokenShard(f"{shard}: {column} in its json files is {kinds}: write one type") from error
