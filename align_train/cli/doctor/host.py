"""What a process finds where it runs: devices, memory, versions, limits."""

import os
import resource
import shutil
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from align_train.distributed import world_size
from align_train.evaluation.measuring import device_name, software


@dataclass(frozen=True)
class Room:
    """What has bytes: how many are free, and how many there are."""

    name: str
    free: float
    total: float


@dataclass(frozen=True)
class HostFacts:
    """What a process finds where it runs.

    Attributes:
        host: the name of its node.
        cores: that it may use.
        memory: of the node, or of the part of it that it may use.
        shared_memory: /dev/shm, by which workers hand over batches; None for none.
        devices: its GPU, or all where there is one process; else the CPU.
        unused: why torch cannot use the GPUs that are there; empty where it can, or there are none.
        versions: of software, by name.
        open_files: how many it may have open.
    """

    host: str
    cores: int
    memory: Room
    shared_memory: Room | None
    devices: Sequence[Room]
    unused: str
    versions: dict[str, str]
    open_files: int


def host_facts(device: torch.device, kind: str) -> HostFacts:
    """What can be known without other ranks, by a rank with this device; `kind` is what was asked for."""
    gpu = device.type == "cuda"
    alone = gpu and world_size() == 1
    devices = [torch.device("cuda", number) for number in range(torch.cuda.device_count())] if alone else [device]
    memory = _memory()
    return HostFacts(
        host=socket.gethostname(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory=Room("memory", *memory),
        shared_memory=_shared_memory(),
        devices=[Room(device_name(each), *(torch.cuda.mem_get_info(each) if gpu else memory)) for each in devices],
        unused="" if gpu or kind == "cpu" else unused_gpus(kind),
        versions=versions(),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    )


def versions() -> dict[str, str]:
    """Of what training runs on, CUDA and NCCL included where torch has them."""
    cuda = torch.version.cuda
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if cuda and torch.cuda.is_available() else None
    return software() | {name: value for name, value in (("cuda", cuda), ("nccl", nccl)) if value}


def unused_gpus(kind: str) -> str:
    """Why torch uses no GPU, if there is one, or one is asked for; else nothing."""
    if not gpus_there() and kind != "cuda":
        return ""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles"):
        return "CUDA_VISIBLE_DEVICES hides them: unset it, or under Slurm ask for GPUs with --gpus-per-node"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # what torch says of a driver, or of itself
        return str(error).splitlines()[0]
    return "torch gives no reason"


def gpus_there() -> bool:
    """Whether the driver knows of GPUs, or Slurm has given some to this job."""
    known = any(Path("/proc/driver/nvidia/gpus").glob("*"))
    return known or os.environ.get("SLURM_GPUS_ON_NODE", "0") != "0"


def _memory() -> tuple[float, float]:
    """Bytes free and in all, of the machine, or of the part of it that this process may use."""
    total = free = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(OSError, StopIteration):  # Linux alone tells, and counts what caches hold as free
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    limit = _limit()
    return min(free, limit), min(total, limit)


def _limit() -> float:
    """Bytes of memory that the control group of this process may use (cgroup v2); infinite where there is no limit."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        own = Path("/sys/fs/cgroup") / next(line for line in lines if line.startswith("0::")).removeprefix("0::/")
        files = [place / "memory.max" for place in (own, *own.parents)]
        limits = [file.read_text().strip() for file in files if file.is_file()]
        return min((float(limit) for limit in limits if limit != "max"), default=float("inf"))
    return float("inf")


def _shared_memory() -> Room | None:
    with suppress(OSError):
        usage = shutil.disk_usage("/dev/shm")
        return Room("/dev/shm", usage.free, usage.total)
    return None
