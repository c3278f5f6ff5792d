"""What `align-train doctor` finds of the machine: each rank, each node, and what lies between them."""

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage
from statistics import median

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from align_train.cli.doctor.host import HostFacts, host_facts
from align_train.cli.doctor.shards import NodeShards, list_here, list_of_rank_zero, shards_here
from align_train.data import Reading, Source
from align_train.distributed import (
    all_gather_bytes_per_second,
    gather_objects,
    on_all_ranks,
    on_rank_zero,
    rank,
    world_size,
)

KEPT = 3  # checkpoints at a time: last.ckpt, best.ckpt, and one that is being written
BLOCK = 4_000_000  # bytes of each rank in a gather that tells of bandwidth: a step's few tell of latency
SEEN_SECONDS = 5.0  # until a file of another node must be there; network file systems take a while


@dataclass(frozen=True)
class Needs:
    """What a run asks of a machine.

    Attributes:
        checkpoints: bytes of the weights and two moments in float32, KEPT times.
        gather: bytes that each rank gives to the others at a step: its embeddings, or what gather_mb says.
        pixels: bytes of the images of a rank's share of a batch, which worker processes hand over; 0 without any.
        split: why the batch cannot be dealt out over the ranks, or empty.
    """

    checkpoints: int
    gather: int
    pixels: int
    split: str = ""


@dataclass(frozen=True)
class FolderFacts:
    """What a rank finds where runs are written: why it cannot write, or empty; whether it sees what rank 0 wrote."""

    error: str
    shares: bool
    free: float


@dataclass(frozen=True)
class Machine:
    """All of it, the same on all ranks.

    Attributes:
        ranks: what each found where it runs.
        clocks: seconds that each one's clock is ahead of rank 0's.
        folder: where runs are written.
        folders: what each rank finds of it.
        shards: by host.
        needs: what a run asks for.
        bandwidth: bytes a second that a rank receives in an all-gather of what a step gathers; None for one rank.
        block_bandwidth: the same with BLOCK bytes of each rank.
        backend: that gathers: nccl or gloo.
    """

    ranks: Sequence[HostFacts]
    clocks: Sequence[float]
    folder: str
    folders: Sequence[FolderFacts]
    shards: Mapping[str, NodeShards]
    needs: Needs
    bandwidth: float | None
    block_bandwidth: float | None
    backend: str

    @property
    def hosts(self) -> dict[str, list[int]]:
        """The ranks of each node."""
        return ranks_by([facts.host for facts in self.ranks])


def ranks_by(values: Sequence[str]) -> dict[str, list[int]]:
    """Which ranks have each of the values."""
    found: dict[str, list[int]] = {}
    for number, value in enumerate(values):
        found.setdefault(value, []).append(number)
    return found


def look_at_machine(config: DictConfig, sources: Sequence[Source], reading: Reading, device: torch.device) -> Machine:
    """All ranks must call it; `sources` are as rank 0 sees them."""
    needs = on_rank_zero(lambda: needs_of(config, reading))
    own = on_all_ranks(lambda: host_facts(device, config.device))
    hosts = ranks_by(gather_objects(own.host))
    turn = list(hosts).index(own.host) / len(hosts)
    first = hosts[own.host][0] == rank()
    known = sources if rank() == 0 else None
    listed = on_all_ranks(lambda: list_here(config, known, reading, len(hosts) > 1) if first else None)
    expected = list_of_rank_zero(listed)
    seen = on_all_ranks(lambda: shards_here(listed, expected, config, reading, turn) if listed else None)
    folder = Path(config.runs).absolute()
    return Machine(
        ranks=gather_objects(own),
        clocks=gather_objects(clock_ahead()),
        folder=str(folder),
        folders=gather_objects(folder_facts(folder)),
        shards={facts.host: part for facts, part in gather_objects((own, seen)) if part},
        needs=needs,
        bandwidth=all_gather_bytes_per_second(needs.gather, device),
        block_bandwidth=all_gather_bytes_per_second(BLOCK, device),
        backend="nccl" if device.type == "cuda" else "gloo",
    )


def needs_of(config: DictConfig, reading: Reading) -> Needs:
    """What a run of these settings asks for; of the model by its shapes alone."""
    from align_train.models.memory import virtual_batch  # brings much of transformers, which no other look needs

    with torch.device("meta"):
        model = instantiate(config.model, _convert_="all")
    weights, buffers = (sum(value.numel() for value in values()) for values in (model.parameters, model.buffers))
    local = -(-config.data.batch_size // world_size())
    by_memory = config.data.get("workers", 0) > 0 and reading.use == "processes"
    return Needs(
        checkpoints=KEPT * 4 * (3 * weights + buffers),
        gather=int(config.gather_mb * 1e6) if config.gather_mb else 2 * local * model.config.projection_dim * 4,
        pixels=local * 3 * model.preprocessing.crop**2 if by_memory else 0,
        split=undivided(config.data.batch_size, virtual_batch(model)),
    )


def undivided(batch_size: int, group_size: int | None) -> str:
    """Why a batch cannot be dealt out over several ranks, or nothing."""
    if world_size() == 1:
        return ""
    from align_train.engine.split import Split  # brings Lightning, which several ranks have brought already

    try:
        Split(batch_size, world_size(), None, group_size)
    except ValueError as error:
        return str(error)
    return ""


def clock_ahead() -> float:
    """Seconds that this rank's clock is ahead of rank 0's, give or take what leaving a barrier takes; of five times."""
    differences = []
    for _ in range(5):
        gather_objects(None)
        times = gather_objects(time.time())
        differences.append(times[rank()] - times[0])
    return median(differences)


def folder_facts(folder: Path) -> FolderFacts:
    """What a rank finds of a folder: each writes a file there, and looks for that of rank 0."""
    token, error = gather_objects(uuid.uuid4().hex)[0], ""
    first, own = (folder / f".doctor-{token}-{number}" for number in (0, rank()))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own.write_text(token)
    except OSError as problem:
        error = str(problem)
    written = not gather_objects(error)[0]
    shares = not written or within(SEEN_SECONDS, first.is_file)
    gather_objects(None)  # until all have looked
    with suppress(OSError):
        own.unlink(missing_ok=True)
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    return FolderFacts(error, shares, disk_usage(there).free)


def within(seconds: float, found: Callable[[], bool]) -> bool:
    """Whether it is found in time."""
    end = time.monotonic() + seconds
    while not found():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True
