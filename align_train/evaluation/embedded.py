"""Embeddings of a test's images or texts, and the parquet files in which they are kept."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from align_train.data.testsets.sets import digest
from align_train.files import atomic_path
from align_train.records import Tally

NAMED = 5  # of the images that cannot be used
TOGETHER = 2048  # rows in a row group: five times their size is in memory when it is read


@dataclass(frozen=True)
class Embedded:
    """N images, or texts, embedded; on ranks other than the first, `lost` alone says something.

    Attributes:
        rows: float32 (N, D) on the CPU; an image that cannot be used has a row all the same, of a blank one.
        hashes: int64 (N,), XXH3 of the encoded images, 0 of one that could not be read; of texts none.
        lost: why images cannot be used, by number.
    """

    rows: Tensor
    hashes: Tensor
    lost: Mapping[int, str] = field(default_factory=dict)

    @property
    def usable(self) -> Tensor:
        """bool (N,)."""
        mask = torch.ones(len(self.rows), dtype=torch.bool)
        mask[list(self.lost)] = False
        return mask

    @property
    def dropped(self) -> Tally:
        """How many cannot be used, by reason."""
        return Tally(self.lost.values())

    @property
    def data_sha256(self) -> str:
        """Of the images' contents in their order, by way of their hashes."""
        return sha256(self.hashes.numpy().tobytes()).hexdigest()

    def check(self, keys: Sequence[str], name: str, skip: bool) -> None:
        """Raise ValueError where images cannot be used, unless they are to be skipped and others remain."""
        if not self.lost or (skip and len(self.lost) < len(keys)):
            return
        shown = ", ".join(keys[number] for number in sorted(self.lost)[:NAMED])
        remedy = (
            ""
            if skip
            else ": mend them, or leave them out and count them with skip_unusable=true in the exam's settings"
        )
        raise ValueError(
            f"{len(self.lost)} of the {len(keys):,} images of {name} cannot be used ({self.dropped.described()}), the "
            f"first are {shown}{remedy}"
        )


NO_HASHES = torch.empty(0, dtype=torch.int64)
NOTHING = Embedded(torch.empty(0, 0), NO_HASHES)


@dataclass(frozen=True)
class EmbeddingFolder:
    """Where embeddings are kept, in files whose names say of which model and of which images or texts they are.

    Attributes:
        path: the folder.
        facts: whatever an embedding depends on beside its image or text: weights, preprocessing, precision.
    """

    path: Path
    facts: Mapping[str, Any]

    def file(self, kind: str, name: str, asked: str) -> Path:
        """The file for `asked`, a digest of images or texts."""
        known = digest([json.dumps(self.facts, sort_keys=True), asked])[:16]
        return self.path / f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)}-{kind}-{known}.parquet"

    def write(self, path: Path, keys: Sequence[str], embedded: Embedded) -> None:
        """Columns key, embedding (list of D float32), hash (int64, null for texts), lost (why; null if it is not)."""
        kinds = {
            "key": pa.string(),
            "embedding": pa.list_(pa.float32(), embedded.rows.shape[1]),
            "hash": pa.int64(),
            "lost": pa.string(),
        }
        schema = pa.schema(kinds, {"align_train": json.dumps(self.facts, sort_keys=True)})
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            atomic_path(path) as temporary,
            # random numbers become no smaller, and another copy of all of them is what memory has no room for
            pq.ParquetWriter(temporary, schema, compression="none", use_dictionary=False) as file,
        ):
            for first in range(0, len(keys), TOGETHER):
                file.write_batch(_part(keys, embedded, slice(first, first + TOGETHER), schema))

    def read(self, path: Path) -> Embedded:
        """What `write` wrote.

        Raises:
            ValueError: the file is something else.
        """
        try:
            with pq.ParquetFile(path) as file:
                return _read(file)
        except Exception as error:
            raise ValueError(f"{path} holds no embeddings of align_train ({error}): remove it") from error


def _part(keys: Sequence[str], embedded: Embedded, part: slice, schema: pa.Schema) -> pa.RecordBatch:
    """Some of the rows, as they are written."""
    rows = embedded.rows[part].contiguous().numpy()
    numbers = range(len(keys))[part]
    columns = [
        pa.array(keys[part], pa.string()),
        pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1]),
        pa.array(embedded.hashes[part].numpy()) if len(embedded.hashes) else pa.nulls(len(numbers), pa.int64()),
        pa.array([embedded.lost.get(number) for number in numbers], pa.string()),
    ]
    return pa.record_batch(columns, schema=schema)


def _read(file: pq.ParquetFile) -> Embedded:
    """All rows, a part at a time."""
    total, width = file.metadata.num_rows, file.schema_arrow.field("embedding").type.list_size
    rows, hashes, lost = torch.empty(total, width), list[np.ndarray](), dict[int, str]()
    first = 0
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, columns=["embedding", "hash", "lost"])
        values = np.asarray(table["embedding"].combine_chunks().flatten(), np.float32)
        rows[first : first + len(table)] = torch.tensor(values).unflatten(0, (-1, width))
        hashes.append(table["hash"].drop_null().to_numpy())
        lost |= {number: why for number, why in enumerate(table["lost"].to_pylist(), first) if why is not None}
        first += len(table)
    return Embedded(rows, torch.from_numpy(np.concatenate([NO_HASHES.numpy(), *hashes])), lost)
