"""What `align-train doctor` finds of the shards on each node, beside what rank 0's node has."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from hydra.utils import instantiate
from omegaconf import DictConfig

from align_train.data import Reading, Source, read_sources
from align_train.data.inspection.sources import shard_sizes
from align_train.data.inspection.throughput import ReadFacts, read_bytes
from align_train.data.storage.shards import Shard
from align_train.distributed import gather_objects, rank

READ_SECONDS = 0.5  # for which shards are read to measure it


@dataclass(frozen=True)
class NodeShards:
    """The shards as a node sees them.

    Attributes:
        count: how many different ones the settings name there.
        names: a hash of their names.
        missing: those out of reach, with the reason, of these and of what rank 0's node has; looked for where there are
            several nodes.
        others: names of those that rank 0's node does not list.
        sizes: bytes here and on rank 0's node of those that differ in size.
        read: how fast they were read; None where there are none.
        error: why there are none.
    """

    count: int = 0
    names: str = ""
    missing: Mapping[str, str] = field(default_factory=dict)
    others: Sequence[str] = ()
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    read: ReadFacts | None = None
    error: str = ""


@dataclass(frozen=True)
class ShardList:
    """The different shards that the settings name on a node, as `shard_sizes` finds them; error says why none."""

    shards: Sequence[Shard] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    error: str = ""

    @property
    def digest(self) -> str:
        """Of the names in order, and the sizes."""
        told = [f"{shard} {self.sizes.get(str(shard))}" for shard in self.shards]
        return hashlib.sha256("\n".join(told).encode()).hexdigest()


def list_here(config: DictConfig, sources: Sequence[Source] | None, reading: Reading, look: bool) -> ShardList:
    """The shards as this node sees them.

    Args:
        config: of the command.
        sources: where they are known already.
        reading: of the settings.
        look: whether all of them are looked for.
    """
    try:
        sources = sources or read_sources(instantiate(config.data.train, _convert_="all"), reading.cache)
    except (ValueError, OSError) as error:
        return ShardList(error=str(error))
    shards = list({shard.address: shard for source in sources for shard in source.shards}.values())
    return ShardList(shards, *(shard_sizes(shards, config.shards, reading.stall_seconds) if look else ()))


def list_of_rank_zero(listed: ShardList | None) -> ShardList | None:
    """What rank 0 has listed, where a node lists something else; None where all list the same. All ranks must call."""
    digests = {digest for digest in gather_objects(listed and listed.digest) if digest}
    return gather_objects(listed if rank() == 0 else None)[0] if len(digests) > 1 else None


def shards_here(
    listed: ShardList, expected: ShardList | None, config: DictConfig, reading: Reading, turn: float
) -> NodeShards:
    """What this node sees of the shards that it lists, and of those that rank 0 does, where these are others.

    Args:
        listed: here.
        expected: by rank 0, if it is not the same.
        config: of the command.
        reading: of the settings.
        turn: share of the shards that is left for the end, so that nodes begin with different ones.
    """
    own = {str(shard) for shard in listed.shards}
    lacking = [shard for shard in expected.shards if str(shard) not in own] if expected else []
    found, away = shard_sizes(lacking, config.shards, reading.stall_seconds)
    listed_there = {str(shard) for shard in expected.shards} if expected else own
    others = [str(shard) for shard in listed.shards if str(shard) not in listed_there]
    there = {**listed.sizes, **found}
    sizes = {
        name: (there[name], size)
        for name, size in (expected.sizes if expected else {}).items()
        if there.get(name, size) != size
    }
    seen = NodeShards(
        count=len(listed.shards),
        names=hashlib.sha256("\n".join(map(str, listed.shards)).encode()).hexdigest()[:12],
        missing={**listed.missing, **away},
        others=others,
        sizes=sizes,
        error=listed.error,
    )
    if listed.error:
        return seen
    whole = [shard for shard in listed.shards if str(shard) not in seen.missing]
    return replace(seen, read=read_bytes(whole, READ_SECONDS, reading.stall_seconds, config.seed, turn))
