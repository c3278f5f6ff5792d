"""What `align-train doctor` found of the machine, judged: what would break a run, and what may slow it."""

from collections.abc import Iterator, Sequence

from align_train.cli.doctor.machine import KEPT, Machine, ranks_by
from align_train.cli.doctor.shards import READ_SECONDS
from align_train.cli.doctor.wording import ranks

SKEW = 60.0  # seconds between two clocks; beyond them logs cannot be put in order, and certificates look expired
FILES = 1024  # that a process may have open, at least: shards, workers, connections
SLOW = 0.5  # of the fastest node's speed, below which a node is named
LONG = READ_SECONDS / 2  # seconds of reading below which a speed is an accident
NAMED = 3  # shards that a sentence names, or sentences of a kind
TAKEN = 0.1  # share of a GPU's memory that others may have


def machine_faults(machine: Machine) -> list[str]:
    """What would break a run: a sentence each, with host, rank or number, and the remedy."""
    faults = [*_versions(machine), *_devices(machine), *_folder(machine), *_shards(machine)]
    if machine.needs.split:
        faults.append(machine.needs.split)
    for number, (facts, ahead) in enumerate(zip(machine.ranks, machine.clocks, strict=True)):
        if abs(ahead) > SKEW:
            faults.append(
                f"the clock of {facts.host} (rank {number}) is {ahead:+,.0f} s from that of {machine.ranks[0].host}: "
                "have both follow one time server (chrony, ntpd), or logs and certificates will not be believed"
            )
    return faults


def machine_notes(machine: Machine) -> list[str]:
    """What a run goes on with, and users may want to know."""
    notes = []
    for host, numbers in machine.hosts.items():
        facts = machine.ranks[numbers[0]]
        if 0 <= facts.open_files < FILES:
            notes.append(f"{host}: a process may have {facts.open_files} files open: allow more with ulimit -n 4096")
        for gpu in (gpu for number in numbers for gpu in machine.ranks[number].devices):
            if gpu.free < (1 - TAKEN) * gpu.total and machine.backend == "nccl":
                notes.append(
                    f"{host}: {(gpu.total - gpu.free) / 1e9:,.1f} of {gpu.total / 1e9:,.1f} GB of its {gpu.name} are "
                    "taken: nvidia-smi says by whom"
                )
    reads = {host: seen.read for host, seen in machine.shards.items() if seen.read}
    speeds = {host: read.bytes / 1e6 / read.seconds for host, read in reads.items()}
    slowest = min(speeds, key=speeds.__getitem__)
    if speeds[slowest] < SLOW * max(speeds.values()) and reads[slowest].seconds > LONG:
        notes.append(
            f"{slowest} reads shards slowest, {speeds[slowest]:,.0f} MB/s where another node reads "
            f"{max(speeds.values()):,.0f}: all wait for it at every step"
        )
    return notes


def _versions(machine: Machine) -> Iterator[str]:
    names = dict.fromkeys(name for facts in machine.ranks for name in facts.versions)
    for name in names:
        found = ranks_by([facts.versions.get(name, "absent") for facts in machine.ranks])
        if len(found) > 1:
            where = ", ".join(f"{version} on {_on(machine, numbers)}" for version, numbers in found.items())
            yield f"{name} is {where}: install the same environment on all nodes, or start from a shared one"


def _devices(machine: Machine) -> Iterator[str]:
    for reason, numbers in ranks_by([facts.unused for facts in machine.ranks]).items():
        if reason:
            yield (
                f"no GPU can be used on {_on(machine, numbers)}: {reason.rstrip('.')}. Mend that (nvidia-smi should "
                "list GPUs, and torch be of a CUDA that the driver knows), or give device=cpu here and trainer=cpu in "
                "training"
            )
    for host, numbers in machine.hosts.items():
        facts = machine.ranks[numbers[0]]
        room, need = facts.shared_memory, machine.needs.pixels * len(numbers)
        if room and room.free < need:
            yield (
                f"{host}: /dev/shm has {room.free / 1e9:,.2f} GB free, and the workers of its {ranks(numbers)} hand "
                f"over at least {need / 1e9:,.2f} GB by it at a step: enlarge it (docker --shm-size, or a mount "
                "option), or set data.reading.use=threads"
            )


def _folder(machine: Machine) -> Iterator[str]:
    folders = machine.folders
    errors = ranks_by([facts.error for facts in folders])
    for error, numbers in errors.items():
        if error:
            yield (
                f"{machine.folder} cannot be written on {_on(machine, numbers)} ({error}): make it writable there, or "
                "name another folder with runs=... here and hydra.run.dir=... in training"
            )
    apart = [number for number, facts in enumerate(folders) if not facts.shares and not facts.error]
    if apart:
        yield (
            f"{machine.folder} on {_on(machine, apart)} is not the one of {machine.ranks[0].host}: what rank 0 writes "
            "is not seen there: write runs to a file system that all nodes share"
        )
    free, need = folders[0].free, machine.needs.checkpoints
    if free < need and not folders[0].error:  # where it cannot write, another folder is needed anyway
        yield (
            f"{machine.folder} has {free / 1e9:,.1f} GB free on {machine.ranks[0].host}, and a run keeps {KEPT} "
            f"checkpoints, {need / 1e9:,.1f} GB in all: free {(need - free) / 1e9:,.1f} GB, or write elsewhere"
        )


def _shards(machine: Machine) -> Iterator[str]:
    """What rank 0's node can read and another cannot; the former's own shards are judged with the data."""
    first = machine.ranks[0].host
    known = machine.shards[first]
    away = {**known.missing, **(known.read.broken if known.read else {})}
    for host, seen in machine.shards.items():
        broken = {**seen.missing, **(seen.read.broken if seen.read else {})}
        broken = {name: why for name, why in broken.items() if name not in away}
        if broken:
            none = "finds no shards: it " if len(broken) + len(away) >= known.count else ""
            told = [f"{name} ({why})" for name, why in broken.items()]
            yield (
                f"{host} {none}cannot read {len(broken):,} shards that {first} reads, such as {_some(told)}: mount or "
                "copy them there, for a rank that cannot read stops the run"
            )
        elif seen.error:
            yield f"{host} finds no shards: {seen.error}"
        elif seen.names != known.names:
            found = f"{seen.count:,} shards, and {first} {known.count:,}, of other names or in another order"
            if seen.others:
                found = f"{len(seen.others):,} shards that {first} does not, such as {_some(seen.others)}"
            yield f"{host} finds {found}: put them where all nodes see the same, or copy them to each"
        for name, (here, there) in list(seen.sizes.items())[:NAMED]:
            yield f"{name} has {here:,} bytes on {host} and {there:,} on {first}: copy it again"
        if len(seen.sizes) > NAMED:
            yield f"{len(seen.sizes) - NAMED:,} more shards differ in size on {host} and {first}: copy them again"


def _some(told: Sequence[str]) -> str:
    return ", ".join(told[:NAMED])


def _on(machine: Machine, numbers: Sequence[int]) -> str:
    """Hosts with their ranks: `node1 (ranks 0, 1)`."""
    parts = ((host, [number for number in here if number in numbers]) for host, here in machine.hosts.items())
    return ", ".join(f"{host} ({ranks(here)})" for host, here in parts if here)
