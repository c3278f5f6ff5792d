"""Whether all ranks are about to read the same files."""

import hashlib
import socket
from collections.abc import Callable, Mapping, Sequence

from align_train.distributed import gather_objects, rank, world_size

NAMED = 3  # files that a message names


def check_same_files(files: Mapping[str, Sequence[str]], kind: str) -> None:
    """Make sure that all ranks are about to read the same; every rank must call it.

    Compared are the files' names alone, in order, as where a checkpoint's place is gone on from: folders may differ.

    Args:
        files: addresses by source, the same sources on all ranks.
        kind: what they are, for messages.

    Raises:
        ValueError: one rank has other files than rank 0, or in another order; on all ranks.
    """
    if world_size() == 1:
        return
    names = {source: [_name(address) for address in given] for source, given in files.items()}
    digests = {source: hashlib.sha256("\n".join(given).encode()).digest() for source, given in names.items()}
    told = gather_objects((socket.gethostname(), digests))
    expected = told[0][1]
    apart = [
        (number, source)
        for number, (_, each) in enumerate(told)
        for source in names
        if each[source] != expected[source]
    ]
    if not apart:
        return
    number, source = apart[0]
    lists = gather_objects(list(files[source]) if rank() in (0, number) else [])
    first, other = lists[0], lists[number]
    found = _apart(first, other, _name) or _apart(first, other, str) or "in another order"
    raise ValueError(
        f"rank {number} ({told[number][0]}) has {len(other):,} {kind} of {source} where rank 0 ({told[0][0]}) has "
        f"{len(first):,}: {found}. Put them where all nodes see the same, or copy "
        "them to each"
    )


def _name(address: str) -> str:
    return address.rpartition("/")[2]


def _apart(first: Sequence[str], other: Sequence[str], name: Callable[[str], str]) -> str:
    """What one of two lists has and the other lacks, or nothing."""
    said = []
    for where, wanted, there in (("missing there", first, other), ("missing on rank 0", other, first)):
        known = {name(address) for address in there}
        if lacking := [address for address in wanted if name(address) not in known]:
            more = f" and {len(lacking) - NAMED:,} more" if len(lacking) > NAMED else ""
            said.append(f"{where}: {', '.join(lacking[:NAMED])}{more}")
    return "; ".join(said)
