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
        width = embedded.rows.shape[1]
        values = pa.array(embedded.rows.contiguous().numpy().reshape(-1))
        hashes = embedded.hashes.numpy() if len(embedded.hashes) else None
        columns = {
            "key": pa.array(keys, pa.string()),
            "embedding": pa.FixedSizeListArray.from_arrays(values, width),
            "hash": pa.nulls(len(keys), pa.int64()) if hashes is None else pa.array(hashes),
            "lost": pa.array([embedded.lost.get(number) for number in range(len(keys))], pa.string()),
        }
        table = pa.table(columns).replace_schema_metadata({"align_train": json.dumps(self.facts, sort_keys=True)})
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            pq.write_table(table, temporary)

    def read(self, path: Path) -> Embedded:
        """What `write` wrote.

        Raises:
            ValueError: the file is something else.
        """
        try:
            table = pq.read_table(path, columns=["embedding", "hash", "lost"])
            column = table["embedding"].combine_chunks()
            rows = np.asarray(column.flatten(), np.float32).reshape(len(table), column.type.list_size)
        except Exception as error:
            raise ValueError(f"{path} holds no embeddings of align_train ({error}): remove it") from error
        lost = {number: why for number, why in enumerate(table["lost"].to_pylist()) if why is not None}
        hashes = np.asarray(table["hash"].drop_null().to_numpy(), np.int64)
        return Embedded(torch.from_numpy(rows.copy()), torch.from_numpy(hashes.copy()), lost)
