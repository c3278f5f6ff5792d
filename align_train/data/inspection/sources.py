"""What sources are like, found out without training: whether shards are there, what they hold, how fast they read."""

import os
import time
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import cast

import numpy as np
from tqdm import tqdm

from align_train.batch import Batch
from align_train.data.crew import Crew
from align_train.data.loading import Loader
from align_train.data.opening import Opened, Opener
from align_train.data.sources import Source
from align_train.data.storage.addresses import check_protocol, is_remote, local_path, shown
from align_train.data.storage.shards import Shard
from align_train.records import Tally


@dataclass(frozen=True)
class ShardFacts:
    """Whether shards are there.

    Attributes:
        count: different shards.
        asked: how many of them were looked for.
        bytes: size of these.
        broken: those that are missing, empty or out of reach, with the reason.
    """

    count: int
    asked: int
    bytes: int
    broken: Mapping[str, str]


@dataclass(frozen=True)
class OpenedFacts:
    """What shards hold.

    Attributes:
        shards: how many were looked at.
        broken: those of them that cannot be used, or not to their end, with the reason.
        usable: pairs that are left for training.
        filtered: pairs that rules leave out, by rule.
        lost: pairs that cannot be used, by reason.
        per_shard: usable pairs of a shard: mean, min, max.
        epoch_pairs: pairs of an epoch of the source, each shard as often as it is listed.
        estimated: whether shards that were not opened are counted with the mean of the others.
        error: what training would stop with; empty for nothing.
    """

    shards: int
    broken: Mapping[str, str]
    usable: int
    filtered: Mapping[str, int]
    lost: Mapping[str, int]
    per_shard: Mapping[str, float]
    epoch_pairs: int
    estimated: bool
    error: str = ""


@dataclass(frozen=True)
class Epoch:
    """A sequence of pairs that has epochs of its own: how many pairs one has, and their share of a batch."""

    pairs: int
    share: float


@dataclass(frozen=True)
class SpeedFacts:
    """How fast batches came, and how many of which size there were."""

    images_per_second: float
    batches: int
    batch_size: int

    def epoch_seconds(self, sequences: Mapping[str, Epoch]) -> dict[str, float]:
        """How long an epoch of each sequence takes to read at this speed."""
        return {name: epoch.pairs / epoch.share / self.images_per_second for name, epoch in sequences.items()}


def check_shards(shards: Sequence[Shard], most: int, stall_seconds: float) -> ShardFacts:
    """Whether shards are there: those that `shard_sizes` looks for."""
    sizes, broken = shard_sizes(shards, most, stall_seconds)
    count = len({shard.address for shard in shards})
    return ShardFacts(count, len(sizes) + len(broken), sum(sizes.values()), broken)


def shard_sizes(shards: Sequence[Shard], most: int, stall_seconds: float) -> tuple[dict[str, int], dict[str, str]]:
    """Look for shards: all local ones, and of the remote ones at most `most`, evenly spread.

    Nothing is read. Once there was no answer for `stall_seconds`, nothing more is waited for.

    Returns:
        Bytes by name of those that are there, 0 where a web server does not tell; and those that are missing, empty or
        out of reach, with the reason.
    """
    addresses = list(dict.fromkeys(shard.address for shard in shards))
    remote = [address for address in addresses if is_remote(address)]
    spread = np.linspace(0, len(remote) - 1, min(most, len(remote))).round().astype(int).tolist()
    asked = [address for address in addresses if not is_remote(address)] + [remote[number] for number in spread]
    crew, patience = Crew(32), stall_seconds
    sizes, broken = dict[str, int](), dict[str, str]()
    answers = [crew.submit(_size, address) for address in asked]
    for address, answer in zip(asked, tqdm(answers, desc="look for shards", unit="shard", delay=3), strict=True):
        try:
            size = answer.result(patience)
        except FileNotFoundError as error:
            away = error.__cause__  # fsspec says so too of a web server that does not answer
            known = away is None or getattr(away, "status", 0) in (404, 410)
            broken[shown(address)] = "missing" if known else shown(f"{type(away).__name__}: {away}")
        except TimeoutError:
            broken[shown(address)], patience = f"no answer for {stall_seconds:g} seconds", 0.0
        except Exception as error:  # noqa: BLE001 # stores raise anything
            broken[shown(address)] = shown(f"{type(error).__name__}: {error}")
        else:
            if size == 0:
                broken[shown(address)] = "empty"
            else:
                sizes[shown(address)] = size or 0
    return sizes, broken


def _size(address: str) -> int | None:
    """Bytes of a file; None where a web server does not tell."""
    if not is_remote(address):
        return os.stat(local_path(address)).st_size
    from fsspec.core import url_to_fs  # type: ignore[import-untyped]

    check_protocol(address)
    store, path = url_to_fs(address)
    size: int | None = store.info(path).get("size")
    return size


def open_shards(
    source: Source, broken: Mapping[str, str], most: int, seed: int, stall_seconds: float
) -> tuple[dict[int, Opened], OpenedFacts]:
    """Open at most `most` different shards of a source, drawn at random; but those known to be broken are not opened.

    Returns:
        The opened shards by their numbers in the source, and what is known now.
    """
    numbers = {str(shard): number for number, shard in enumerate(source.shards)}
    drawn = sorted(np.random.default_rng(seed).permutation(list(numbers))[:most].tolist())
    opener, opened, error = Opener([source], stall_seconds, max_quarantined=1.0), {}, ""
    opener.quarantine.names.update({name: broken[name] for name in drawn if name in broken})
    wanted = [numbers[name] for name in drawn if name not in broken]
    crew = Crew(8)
    for number in wanted:
        crew.submit(source.shards[number].bring)  # the next ones come while one is opened
    try:
        for number in tqdm(wanted, desc="open shards", unit="shard", delay=3):
            opened.update(opener.open([number]))
    except (ValueError, TimeoutError) as problem:
        error = str(problem)
    crew.close()
    found = {name: len(opened[numbers[name]].rows) if numbers[name] in opened else 0 for name in drawn}
    dropped = Tally()
    for shard in opened.values():
        dropped.update(shard.dropped)
    times, total, estimated = Counter(map(str, source.shards)), sum(found.values()), len(drawn) < len(numbers)
    exact = sum(count * times[name] for name, count in found.items())
    return opened, OpenedFacts(
        shards=len(drawn),
        broken=dict(opener.quarantine.names),
        usable=total,
        filtered={reason: count for reason, count in dropped.items() if reason in source.rules},
        lost={reason: count for reason, count in dropped.items() if reason not in source.rules},
        per_shard={"mean": total / len(found), "min": min(found.values()), "max": max(found.values())},
        epoch_pairs=round(total / len(found) * len(source.shards)) if estimated else exact,
        estimated=estimated,
        error=error,
    )


def least_batches(workers: int) -> int:
    """Batches that a speed takes: the first of each worker, which begins with the work of starting, and a few more."""
    return max(workers, 1) + 3


def measure_speed(loader: Loader, seconds: float) -> SpeedFacts:
    """Read batches for about so many seconds, but a few at least and all at most, and use them for nothing.

    Not counted is the first batch of each worker. The loader must have `least_batches`.
    """
    least = least_batches(loader.workers)
    plans = loader.plans
    start = time.perf_counter()
    times = []
    with closing(cast(Generator[Batch], iter(loader))) as batches:
        for _ in tqdm(batches, "read batches", plans.stop, unit="batch", delay=3):
            times.append(time.perf_counter())
            if len(times) >= least and times[-1] - start >= seconds:
                break
    first = max(loader.workers, 1)
    counted = len(times) - first
    speed = counted * plans.batch_size / (times[-1] - times[first - 1])
    return SpeedFacts(speed, counted, plans.batch_size)
