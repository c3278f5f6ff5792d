"""What is known of a shard's pairs beside image and caption, for rules to look at."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from align_train.corpus.images import Unusable
from align_train.data.captions import read_json
from align_train.data.storage.shards import OpenFiles, Shard
from align_train.data.storage.tars import BrokenShard, Index
from align_train.records import Tally

PAIR = "_pair"  # the column that holds the row in the index


def metadata_of(
    shard: Shard, index: Index, rows: np.ndarray, readers: Mapping[str, Sequence[str]], dropped: Tally
) -> pa.Table:
    """A row for each of the pairs of which something is known: its row in the index as `_pair`, and what rules read.

    The columns come from the sidecar if it has them all, else from the json files in the tar.

    Args:
        shard: whose pairs.
        index: of the shard, with the kind `json`.
        rows: the pairs.
        readers: the columns, with the names of the rules that read them.
        dropped: counts the pairs of which nothing is known: no_metadata, corrupt_json.

    Raises:
        BrokenShard: the sidecar is no parquet file, or the values of a column are of several types.
        ValueError: neither sidecar nor json has a column.
    """
    names = shard.sidecar_columns
    if {"key", *readers} <= set(names):
        return _by_key(shard.metadata(["key", *readers]), index, rows, dropped)
    documents = _documents(shard, index, rows, dropped)
    found = dict.fromkeys(name for document in documents.values() for name in document)
    for column in readers if documents or not len(rows) else ():
        if column not in found:
            raise ValueError(
                f"{shard} has no column {column}, which the rule {readers[column][0]} needs: its sidecar has "
                f"{', '.join(names) or 'none'}, its json files {', '.join(found) or 'nothing'}. Leave the rule out"
            )
    values = {column: _array(column, [d.get(column) for d in documents.values()], shard) for column in readers}
    return pa.table({PAIR: pa.array(documents, pa.int64()), **values})


def _by_key(table: pa.Table, index: Index, rows: np.ndarray, dropped: Tally) -> pa.Table:
    keys, known = [index.keys[row] for row in rows], table["key"].to_pylist()
    if keys != known:  # what was tried and not written, what lacks a caption, another order
        place = {key: number for number, key in enumerate(known)}
        found = [number for number, key in enumerate(keys) if key in place]
        if lost := len(keys) - len(found):
            dropped["no_metadata"] += lost
        table, rows = table.take([place[keys[number]] for number in found]), rows[found]
    return table.append_column(PAIR, pa.array(rows))


def _documents(shard: Shard, index: Index, rows: np.ndarray, dropped: Tally) -> dict[int, dict[str, Any]]:
    """The json files of the pairs, by row."""
    files, documents = OpenFiles(1), {}
    for row in rows.tolist():
        span, where = index.span("json", row), f"{index.keys[row]} in {shard}"
        try:
            if span is None:
                raise Unusable("no_metadata", where)
            documents[row] = read_json(files.read(shard.path, span, where), where)
        except Unusable as problem:
            dropped[problem.reason] += 1
    files.close()
    return documents


def _array(column: str, values: Sequence[Any], shard: Shard) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        kinds = ", ".join(f"{kind} {count} times" for kind, count in Counter(type(v).__name__ for v in values).items())
        raise BrokenShard(
            f"{shard}: {column} in its json files is {kinds}: write numbers of 64 bits, or one type"
        ) from error
