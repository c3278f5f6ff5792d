"""Dot products to rank by: exact in float32, block by block, with one rule for ties.

A wrong candidate that scores as high as the right one counts against the model. A matrix product adds up in an order
that depends on the place in the matrix, so equal embeddings may differ in the last digits of their scores. As high is
therefore

    score >= right score - TIE * eps * |query| * largest |candidate|

with eps the rounding of the type (2^-23 for float32, which makes 1.9e-6 for a cosine). Products of equal rows of 64 to
2,048 columns differed by up to 5 eps from the exact value.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

TIE = 16

# Scores are visited in blocks of so many rows and columns: 4 MB, which stay in a CPU's cache, or 64 MB on a GPU.
CPU_BLOCK = 1024
GPU_BLOCK = 4096


def block(device: torch.device) -> int:
    """Rows, and columns, of scores that are held at a time."""
    return CPU_BLOCK if device.type == "cpu" else GPU_BLOCK


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """No gradient, no autocast and no TF32 or bfloat16 in float32 products: they make ties of different scores."""
    cpu = torch.backends.mkldnn.matmul  # type: ignore[attr-defined] # torch 2.13 sets it where mypy does not look
    settings = (torch.backends.cuda.matmul, cpu)
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


def precision_of(*embeddings: Tensor) -> torch.dtype:
    """float32, or float64 if one of them is."""
    dtype = torch.float32
    for x in embeddings:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def wrong_scores(
    rows: Tensor, columns: Tensor, row_label: Tensor, column_label: Tensor
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Scores of all rows (N, D) with all columns (M, D), a block at a time: its rows, its columns, its scores.

    Right pairs, those of equal labels (N,) and (M,), have -inf, which is above nothing. Use it within `exact`.
    """
    size, dtype = block(rows.device), precision_of(rows, columns)
    for top in range(0, len(rows), size):
        across = slice(top, top + size)
        some = rows[across].to(dtype)
        for left in range(0, len(columns), size):
            down = slice(left, left + size)
            scores = some @ columns[down].to(dtype).T
            yield across, down, scores.masked_fill_(row_label[across, None] == column_label[down], -torch.inf)


def not_below(scores: Tensor, least: Tensor, dim: int) -> Tensor:
    """How many scores along `dim` reach `least`. One that is not a number does: overflow counts against the model."""
    return (~(scores < least)).sum(dim, dtype=torch.int32)


def right_scores(queries: Tensor, candidates: Tensor, right: Tensor) -> Tensor:
    """(Q,) in float64: the product of each query (Q, D) with its right candidate, candidates[right]."""
    scores = torch.empty(len(queries), dtype=torch.float64, device=queries.device)
    for part, some, index in zip(*(x.split(CPU_BLOCK) for x in (scores, queries, right)), strict=True):
        torch.sum(some.double() * candidates[index].double(), 1, out=part)
    return scores


def least_scores(best: Tensor, queries: Tensor, candidates: Tensor) -> Tensor:
    """(Q,) from where on a wrong candidate counts, given the best right scores (Q,): see the head of this file."""
    dtype = precision_of(queries, candidates)
    lengths = torch.linalg.vector_norm(queries, dim=1, dtype=dtype)
    longest = torch.linalg.vector_norm(candidates, dim=1, dtype=dtype).max()
    least = (best - TIE * torch.finfo(dtype).eps * lengths * longest).to(dtype)
    # Without a finite right score, all wrong ones count.
    return torch.where(least.isfinite(), least, torch.finfo(dtype).min)
