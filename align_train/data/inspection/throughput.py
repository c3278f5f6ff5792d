"""How fast a machine reads the bytes of shards, and whether it can read them at all."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from typing import BinaryIO, cast

import numpy as np

from align_train.data.crew import Crew
from align_train.data.storage.addresses import check_protocol, is_remote, local_path, shown
from align_train.data.storage.shards import Shard

_CHUNK = 4 << 20  # bytes that are asked for at a time


@dataclass(frozen=True)
class ReadFacts:
    """What was read of shards, one after another, from where they lie: from no cache, if the system can be told so.

    Attributes:
        shards: how many were begun.
        bytes: of them, which took `seconds`.
        seconds: of opening and reading.
        broken: those that could not be read, with the reason.
    """

    shards: int
    bytes: int
    seconds: float
    broken: Mapping[str, str]


def read_bytes(
    shards: Sequence[Shard], seconds: float, stall_seconds: float, seed: int, turn: float = 0.0
) -> ReadFacts:
    """Read different shards, in random order, for about so many seconds, or all there are if that takes less.

    Args:
        shards: here or far away; no copy is kept of those.
        seconds: after which no more is asked for.
        stall_seconds: without an answer, until a shard is given up, and with it the rest.
        seed: of the order.
        turn: share of the shards to leave for the end, so that machines begin with different ones.
    """
    addresses = list(dict.fromkeys(shard.address for shard in shards))
    order = np.roll(np.random.default_rng(seed).permutation(len(addresses)), -int(turn * len(addresses))).tolist()
    crew, start, bytes, begun, broken = Crew(1), time.perf_counter(), 0, 0, dict[str, str]()
    until = start + seconds
    for address in (addresses[number] for number in order):
        if begun and time.perf_counter() >= until:
            break
        begun += 1
        try:
            bytes += crew.submit(_read, address, until).result(seconds + stall_seconds)
        except FileNotFoundError:
            broken[shown(address)] = "missing"
        except TimeoutError:
            broken[shown(address)] = f"no answer for {stall_seconds:g} seconds"
            break
        except Exception as error:  # noqa: BLE001 # stores raise anything
            broken[shown(address)] = shown(f"{type(error).__name__}: {error}")
    return ReadFacts(begun, bytes, time.perf_counter() - start, broken)


def _read(address: str, until: float) -> int:
    """Bytes of a file that are read until then; one piece at least."""
    count = 0
    with _opened(address) as file:
        while piece := file.read(_CHUNK):
            count += len(piece)
            if time.perf_counter() >= until:
                break
    return count


def _opened(address: str) -> BinaryIO:
    if is_remote(address):
        import fsspec  # type: ignore[import-untyped]

        check_protocol(address)
        return cast(BinaryIO, fsspec.open(address, "rb").open())
    file = FileIO(local_path(address))
    if hasattr(os, "posix_fadvise"):  # pages of it that are in memory would be measured instead of the disk
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return cast(BinaryIO, file)
