"""The only door to torch.distributed. With one process every function answers without it.

Shapes: b rows on this rank, B = b x world_size rows in all, D columns.
"""

import atexit
import time
import warnings
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

T = TypeVar("T")


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@atexit.register
def leave() -> None:
    """Leave the other processes, if there are any: gloo's threads abort a process that ends with them, now and then."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


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


class Ballot:
    """The largest of each number over all ranks, asked for at once and counted in the background.

    Reading the result waits for what was given to the device before the ballot, and for nothing that came after.

    Args:
        numbers: float (n,) on the device; every rank must ask, in the same order among its other collectives.
    """

    def __init__(self, numbers: Tensor) -> None:
        counted = numbers.detach().clone()
        pending = dist.all_reduce(counted, dist.ReduceOp.MAX, async_op=True) if world_size() > 1 else None
        self._pending, self._result = pending, counted
        self._there: torch.cuda.Event | None = None
        if counted.is_cuda:
            aside = torch.cuda.Stream(counted.device)
            aside.wait_stream(torch.cuda.current_stream(counted.device))
            with torch.cuda.stream(aside):
                if pending is not None:
                    pending.wait()  # on a GPU: the stream waits, not the process
                self._result = torch.empty(counted.shape, pin_memory=True).copy_(counted, non_blocking=True)
                self._there = torch.cuda.Event()
                self._there.record()
            counted.record_stream(aside)

    def result(self) -> list[float]:
        """The largest numbers, the same on all ranks."""
        if self._there is not None:
            self._there.synchronize()
        elif self._pending is not None:
            self._pending.wait()
        self._pending = None  # what a process still holds of it at its end is taken down too late
        return cast(list[float], self._result.tolist())


def gather_objects(value: T) -> list[T]:
    """Every rank's value, in rank order; every rank must call it, with something that pickles."""
    parts: list[Any] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(parts, value)
    return parts


def on_all_ranks(work: Callable[[], T]) -> T:
    """What `work` gives here; an error on one rank is one on all, before any waits for the others."""
    if world_size() == 1:
        return work()
    result: T | None = None
    failed: Exception | None = None
    told: Exception | None = None
    try:
        result = work()
    except (ValueError, OSError) as error:  # what a user can cause
        failed = told = error
    except Exception as error:  # noqa: BLE001 # the others must not wait for a rank that is gone
        failed, told = error, RuntimeError(f"{type(error).__name__} on rank {rank()}: {error}")
    for each in gather_objects(told):
        if each is not None:
            raise failed or each
    return cast(T, result)


def on_rank_zero(work: Callable[[], T]) -> T:
    """What `work`, done on rank 0 alone, gives, on all ranks; it must pickle. Errors as in `on_all_ranks`."""
    return cast(T, gather_objects(on_all_ranks(lambda: work() if rank() == 0 else None))[0])


def gather_counts(counts: dict[str, int]) -> dict[str, int]:
    """Counts by name, summed over all ranks; every rank must call it."""
    parts = gather_objects(dict(counts))
    return {name: sum(part.get(name, 0) for part in parts) for name in {name for part in parts for name in part}}


def shard(model: nn.Module, parts: Iterable[nn.Module], methods: Iterable[str], mesh: DeviceMesh) -> None:
    """Deal every weight out over the ranks of a mesh of one dimension (FSDP2), in place; state-dict keys stay.

    A part's weights are gathered for its forward and for its backward pass and put away after it, those outside of
    any part while one of the methods runs. Each rank gets its share of the gradients' mean over ranks, as under DDP.
    Scalars cannot be dealt out: every rank keeps them, and gets the same mean. Buffers stay as they are.

    Args:
        model: not used before; its weights contiguous, and equal on all ranks.
        parts: modules of it that are computed one after the other.
        methods: names of what is called of the model, and nothing else of it may be.
        mesh: of all ranks.
    """
    # Batch norm's result is a view; that would matter to code that changes a part's result in place, and there is none.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    scalars = {weight for weight in model.parameters() if weight.ndim == 0}
    for part in parts:
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True, ignored_params=scalars)
    for method in methods:
        register_fsdp_forward_method(model, method)
    for scalar in scalars:
        scalar.register_post_accumulate_grad_hook(_take_mean_gradient)


def _take_mean_gradient(weight: Tensor) -> None:
    assert weight.grad is not None
    dist.all_reduce(weight.grad)
    weight.grad /= world_size()


def is_sharded(model: nn.Module) -> bool:
    """True after `shard`."""
    return any(isinstance(weight, DTensor) for weight in model.parameters())


def own_part(value: Tensor) -> Tensor:
    """What this rank has of a tensor that may be dealt out."""
    return value.to_local() if isinstance(value, DTensor) else value


def gathered(value: Any) -> Any:
    """A dealt-out tensor whole, on the CPU of rank 0 (None on others); anything else as it is. All ranks must call."""
    if not isinstance(value, DTensor):
        return value
    whole = value.full_tensor()
    return whole.cpu() if rank() == 0 else None


def dealt_out_as(whole: Any, example: Any) -> Any:
    """This rank's share of a tensor that all have, if `example` is dealt out; asks no other rank."""
    if not isinstance(example, DTensor):
        return whole
    return distribute_tensor(whole.to(example.device), example.device_mesh, example.placements, src_data_rank=None)


def all_gather_bytes_per_second(size: int, device: torch.device) -> float | None:
    """What the slowest rank receives a second when each gives `size` bytes to all others; None with one process.

    The median of five gathers after a first one, which makes the connections. All ranks must call it.
    """
    if world_size() == 1:
        return None
    own = torch.zeros(size, dtype=torch.uint8, device=device)
    parts, seconds = [torch.empty_like(own) for _ in range(world_size())], []
    for _ in range(6):
        start = time.perf_counter()
        dist.all_gather(parts, own)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return (world_size() - 1) * size / max(gather_objects(median(seconds[1:])))
