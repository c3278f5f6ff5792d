"""Which columns are no negatives of a row, because they show the same image or the same caption."""

import torch
from torch import Tensor


def duplicates(ids: Tensor, own: slice) -> Tensor:
    """Bool (n, B): True where column j has an id of row i, of any kind, and is not the row's own column.

    Args:
        ids: (B, K) int64, K kinds of identity of each column.
        own: which n columns belong to the rows.
    """
    same = ids[own, 0, None] == ids[:, 0]
    for kind in range(1, ids.shape[1]):
        same |= ids[own, kind, None] == ids[:, kind]
    same[:, own].fill_diagonal_(False)
    return same


def check_ids(ids: Tensor, columns: int) -> None:
    """Raise ValueError unless ids are int64 (columns, K) with K >= 1."""
    if ids.dtype != torch.int64 or ids.ndim != 2 or len(ids) != columns or ids.shape[1] == 0:
        raise ValueError(
            f"ids must be int64 of shape (B, K): for each of the {columns} columns K >= 1 identities, such as of the "
            f"image and of the caption; got {ids.dtype} of shape {tuple(ids.shape)}"
        )
