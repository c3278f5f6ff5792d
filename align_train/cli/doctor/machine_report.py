"""What `align-train doctor` prints of the machine: a block of lines for each node, then what lies between them."""

from collections.abc import Iterator

from align_train.cli.doctor.host import HostFacts
from align_train.cli.doctor.machine import BLOCK, Machine, NodeShards
from align_train.cli.doctor.wording import line, ranks

SHOWN = ("align-train", "python", "torch", "cuda", "nccl", "lightning", "transformers")  # the others: doctor.json


def machine_report(machine: Machine) -> str:
    """All of it as text."""
    lines = [each for host, numbers in machine.hosts.items() for each in _host(machine, host, numbers)]
    return "\n".join([*lines, *_between(machine)])


def _host(machine: Machine, host: str, numbers: list[int]) -> Iterator[str]:
    facts = machine.ranks[numbers[0]]
    yield f"{host}: {ranks(numbers)}"
    yield line("cores", f"{_cores(machine, numbers)}; {facts.open_files:,} open files a process")
    yield line("memory", _room(facts.memory.free, facts.memory.total) + _shared(facts))
    devices = [device for number in numbers for device in machine.ranks[number].devices]
    told = [f"{gpu.name}: {_room(gpu.free, gpu.total)}" for gpu in devices] if machine.backend == "nccl" else []
    for number, device in enumerate(told or dict.fromkeys(device.name for device in devices)):
        yield line("" if number else "devices", device)
    if facts.unused:
        yield line("", f"GPUs that torch cannot use: {facts.unused}")
    if (seen := machine.shards.get(host)) is not None:
        yield line("shards", _shards(seen))
    if len(machine.ranks) > 1:
        ahead = max((machine.clocks[number] for number in numbers), key=abs)
        yield line("clock", f"{ahead:+,.3f} s from that of rank 0")


def _cores(machine: Machine, numbers: list[int]) -> str:
    counts = sorted({machine.ranks[number].cores for number in numbers})
    return f"{' to '.join(f'{count:,}' for count in (counts[0], counts[-1])[: len(counts)])} for each rank"


def _room(free: float, total: float) -> str:
    return f"{free / 1e9:,.1f} of {total / 1e9:,.1f} GB free"


def _shared(facts: HostFacts) -> str:
    room = facts.shared_memory
    return f"; /dev/shm {_room(room.free, room.total)}" if room else ""


def _shards(seen: NodeShards) -> str:
    if seen.error or seen.read is None:
        return seen.error
    read = seen.read
    broken = len(seen.missing) + len(read.broken)
    megabytes = read.bytes / 1e6
    speed = f"{megabytes / read.seconds:,.0f} MB/s, one after another ({megabytes:,.1f} MB of {read.shards:,})"
    return f"{seen.count:,}, {broken or 'none'} out of reach; {speed}"


def _between(machine: Machine) -> Iterator[str]:
    first, needs, many = machine.ranks[0], machine.needs, len(machine.ranks) > 1
    yield "runs"
    same = all(facts.versions == first.versions for facts in machine.ranks)
    shown = ", ".join(f"{name} {first.versions[name]}" for name in SHOWN if name in first.versions)
    where = ("the same on all ranks" if same else "not the same on all ranks") if many else ""
    yield line("versions", "; ".join(filter(None, (shown, where))))
    writable = sum(not facts.error for facts in machine.folders)
    seen = sum(facts.shares for facts in machine.folders)
    told = f"; {writable} of {len(machine.ranks)} ranks write there, {seen} see what rank 0 wrote" if many else ""
    yield line("folder", f"{machine.folder}: {machine.folders[0].free / 1e9:,.1f} GB free{told}")
    yield line("", f"the checkpoints that a run keeps take {needs.checkpoints / 1e9:,.2f} GB")
    if machine.bandwidth is not None and machine.block_bandwidth is not None:
        milliseconds = 1000 * (len(machine.ranks) - 1) * needs.gather / machine.bandwidth
        speed = f"{machine.block_bandwidth / 1e9:,.3g} GB/s with {BLOCK / 1e6:g} MB blocks ({machine.backend})"
        step = f"a step's {needs.gather / 1e6:,.3g} MB of each rank reach all in {milliseconds:,.3g} ms"
        yield line("gather", f"{speed}; {step}")
    yield ""
