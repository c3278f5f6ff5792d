"""The only door to torch.distributed. With one process every function answers without it.

Shapes: b rows on this rank, B = b x world_size rows in all, D columns.
"""

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, 0 to world_size - 1."""
    return dist.get_rank() if world_size() > 1 else 0


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, local: Tensor) -> Tensor:
        parts = [torch.empty_like(local) for _ in range(world_size())]
        dist.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        # A row is a column of every rank's share of the loss, so its gradient is the sum of what all ranks say of it.
        # DDP then takes the mean over ranks, which leaves the gradient of one big batch.
        own = torch.empty_like(gradient[: len(gradient) // world_size()])
        dist.reduce_scatter(own, list(gradient.contiguous().chunk(world_size())))
        return own


def gather_rows(local: Tensor) -> Tensor:
    """All ranks' rows in rank order, differentiable: (b, D) to (B, D).

    Followed by each rank's share of the loss and DDP's mean of the gradients, this equals one process with the whole
    batch, forward and backward (tests/test_distributed.py).

    Raises:
        ValueError: the ranks bring different numbers of rows; on all of them, before one waits for the others.
    """
    if world_size() == 1:
        return local
    counts = [torch.empty(1, dtype=torch.int64, device=local.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(local)], device=local.device))
    brought = torch.cat(counts).tolist()
    if len(set(brought)) > 1:
        raise ValueError(
            f"the ranks bring {', '.join(map(str, brought))} pairs to one batch: a loss over all of them needs as many "
            "of each, so leave out the last, incomplete batch or fill it up"
        )
    return _GatherRows.apply(local)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, local: Tensor) -> Tensor:
        total = local.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def sum_over_ranks(local: Tensor) -> Tensor:
    """The sum of every rank's tensor, differentiable; the same shape on all ranks."""
    return _SumOverRanks.apply(local) if world_size() > 1 else local


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on all ranks when it is true on one: how ranks agree to stop at a step boundary."""
    return flag if world_size() == 1 else bool(sum_over_ranks(torch.tensor(float(flag), device=device)) > 0)


def gather_objects(value: T) -> list[T]:
    """Every rank's value, in rank order; every rank must call it, with something that pickles."""
    parts: list[Any] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(parts, value)
    return parts


def gather_counts(counts: dict[str, int]) -> dict[str, int]:
    """Counts by name, summed over all ranks; every rank must call it."""
    parts = gather_objects(dict(counts))
    return {name: sum(part.get(name, 0) for part in parts) for name in {name for part in parts for name in part}}
