"""`align-train doctor` of the machine: what ranks find, alone, in twos and under Slurm, and what it calls wrong."""

import io
import json
import os
import socket
import time
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
import torch
from conftest import drawn_pair, on_ranks
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from reading import sources, write_tar

from align_train.cli.doctor import host as doctor_host
from align_train.cli.doctor import machine as doctor_machine
from align_train.cli.doctor import ranks as doctor_ranks
from align_train.cli.doctor import shards as doctor_shards
from align_train.cli.doctor.host import HostFacts, Room, host_facts, unused_gpus
from align_train.cli.doctor.machine import FolderFacts, Machine, Needs, look_at_machine
from align_train.cli.doctor.machine_report import machine_report
from align_train.cli.doctor.ranks import asked_ranks, check_visible, told_to_wait
from align_train.cli.doctor.shards import NodeShards, list_here, shards_here
from align_train.cli.doctor.verb import check_settings, doctor
from align_train.cli.doctor.verdict import machine_faults, machine_notes
from align_train.corpus.shards import write_shards
from align_train.data import Reading, inspection
from align_train.data.inspection.throughput import ReadFacts, read_bytes
from align_train.data.storage.cache import Cache
from align_train.data.storage.shards import Shard
from align_train.distributed import rank
from align_train.processes import check_job_name
from align_train.shipped import config_folder

CPU = torch.device("cpu")


def settings(folder: Path, *words: str) -> Any:
    """The command's settings, of the toy model."""
    given = [
        "data=shards", "model=align_tiny", f"folder={folder}/out", f"runs={folder}/runs", "data.batch_size=32",
        f"data.train.pairs.shards={folder}/shards", "data.workers=0", "seconds=0.1", "device=cpu", *words,
    ]  # fmt: skip
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return compose("doctor", given)


# What is wrong


@pytest.fixture
def facts() -> HostFacts:
    """Of a sound process on node1."""
    return HostFacts(
        host="node1",
        cores=8,
        memory=Room("memory", 50e9, 64e9),
        shared_memory=Room("/dev/shm", 20e9, 32e9),
        devices=[Room("H100", 79e9, 80e9)],
        unused="",
        versions={"python": "3.12.1", "torch": "2.13.0", "nccl": "2.27"},
        open_files=4096,
    )


@pytest.fixture
def machine(facts: HostFacts) -> Machine:
    """Two sound nodes of two ranks."""
    seen = NodeShards(7, "abc", read=ReadFacts(2, 100_000_000, 0.5, {}))
    other = replace(facts, host="node2")
    return Machine(
        ranks=[facts, facts, other, other],
        clocks=[0.0, 0.001, -0.2, -0.2],
        folder="/runs",
        folders=[FolderFacts("", True, 30e9)] * 4,
        shards={"node1": seen, "node2": seen},
        needs=Needs(checkpoints=6_000_000_000, gather=1_000_000, pixels=5_000_000_000),
        bandwidth=3e9,
        block_bandwidth=20e9,
        backend="nccl",
    )


def rank_two(machine: Machine, **changes: Any) -> list[HostFacts]:
    """The ranks, of which the third is changed."""
    ranks = list(machine.ranks)
    ranks[2] = replace(ranks[2], **changes)
    return ranks


def test_sound_nodes_have_no_faults(machine):
    assert machine_faults(machine) == machine_notes(machine) == []


def test_versions_that_differ_are_named_with_their_ranks(machine, facts):
    ranks = rank_two(machine, versions={**facts.versions, "torch": "2.12.0"})
    (fault,) = machine_faults(replace(machine, ranks=ranks))
    assert fault.startswith("torch is 2.13.0 on node1 (ranks 0, 1), node2 (rank 3), 2.12.0 on node2 (rank 2): install")
    ranks = rank_two(machine, versions={name: facts.versions[name] for name in ("python", "torch")})
    (fault,) = machine_faults(replace(machine, ranks=ranks))
    assert "nccl is 2.27 on" in fault
    assert "absent on node2 (rank 2)" in fault


def test_a_clock_that_is_far_off_is_named(machine):
    assert machine_faults(replace(machine, clocks=[0, 59, -59, 0])) == []
    (fault,) = machine_faults(replace(machine, clocks=[0, 0, -75, 0]))
    assert fault.startswith("the clock of node2 (rank 2) is -75 s from that of node1: have both follow one time server")


def test_too_little_disk_is_a_fault_of_rank_0_alone(machine):
    full, empty = FolderFacts("", True, 4e9), FolderFacts("", True, 30e9)
    assert machine_faults(replace(machine, folders=[empty, full, full, full])) == []
    (fault,) = machine_faults(replace(machine, folders=[full, empty, empty, empty]))
    assert fault == (
        "/runs has 4.0 GB free on node1, and a run keeps 3 checkpoints, 6.0 GB in all: free 2.0 GB, or write elsewhere"
    )


def test_a_folder_that_cannot_be_written_or_is_not_shared(machine):
    fine, denied, apart = (
        FolderFacts(why, shares, 30e9) for why, shares in (("", True), ("denied", True), ("", False))
    )
    (fault,) = machine_faults(replace(machine, folders=[fine, fine, denied, denied]))
    nothing = FolderFacts("denied", True, 0.0)  # of which one fault is enough
    assert len(machine_faults(replace(machine, folders=[nothing] * 4))) == 1
    assert fault.startswith("/runs cannot be written on node2 (ranks 2, 3) (denied): make it writable there, or name")
    (fault,) = machine_faults(replace(machine, folders=[fine, fine, apart, apart]))
    assert fault.startswith("/runs on node2 (ranks 2, 3) is not the one of node1: what rank 0 writes is not seen there")


def test_gpus_that_torch_cannot_use(machine):
    ranks = [*machine.ranks[:2], *(replace(each, unused="driver too old.") for each in machine.ranks[2:])]
    (fault,) = machine_faults(replace(machine, ranks=ranks))
    assert fault.startswith(
        "no GPU can be used on node2 (ranks 2, 3): driver too old. Mend that (nvidia-smi should list GPUs"
    )


def test_too_little_shared_memory_is_counted_over_the_ranks_of_a_node(machine, facts):
    docker = replace(facts, shared_memory=Room("/dev/shm", 9e9, 32e9))
    faults = machine_faults(replace(machine, ranks=[docker, docker, *machine.ranks[2:]]))
    assert len(faults) == 1
    assert faults[0].startswith(
        "node1: /dev/shm has 9.00 GB free, and the workers of its ranks 0, 1 hand over at least"
    )
    assert "10.00 GB" in faults[0]
    none = replace(machine.needs, pixels=0)
    assert machine_faults(replace(machine, ranks=[docker, docker, *machine.ranks[2:]], needs=none)) == []


def test_shards_that_one_node_alone_cannot_read(machine):
    first, other = machine.shards["node1"], replace(machine.shards["node2"], missing={"a.tar": "missing"})
    (fault,) = machine_faults(replace(machine, shards={"node1": first, "node2": other}))
    assert fault.startswith("node2 cannot read 1 shards that node1 reads, such as a.tar (missing): mount or copy them")
    slow = replace(other, missing={}, read=ReadFacts(1, 0, 1.0, {"b.tar": "OSError: stale"}))
    (fault,) = machine_faults(replace(machine, shards={"node1": first, "node2": slow}))
    assert "such as b.tar (OSError: stale)" in fault
    many = replace(other, missing={f"{number}.tar": "missing" for number in range(5)})
    (fault,) = machine_faults(replace(machine, shards={"node1": first, "node2": many}))
    assert "5 shards that node1 reads, such as 0.tar (missing), 1.tar (missing), 2.tar (missing): mount" in fault
    # what is missing everywhere is judged by data.reading.max_quarantined
    assert machine_faults(replace(machine, shards={"node1": other, "node2": other})) == []


def test_nodes_that_name_other_shards_or_none(machine):
    first, other = machine.shards["node1"], replace(machine.shards["node2"], count=5, names="def")
    (fault,) = machine_faults(replace(machine, shards={"node1": first, "node2": other}))
    assert fault.startswith("node2 finds 5 shards, and node1 7, of other names")
    more = replace(other, count=8, others=["c.tar"])
    (fault,) = machine_faults(replace(machine, shards={"node1": first, "node2": more}))
    assert fault.startswith("node2 finds 1 shards that node1 does not, such as c.tar: put them where all")
    (fault,) = machine_faults(replace(machine, shards={"node1": first, "node2": NodeShards(error="not allowed")}))
    assert fault == "node2 finds no shards: not allowed"
    away = {f"{number}.tar": "missing" for number in range(7)}
    empty = NodeShards(error="no shard matches: write the shards first", missing=away)
    (fault,) = machine_faults(replace(machine, shards={"node1": first, "node2": empty}))
    assert fault.startswith("node2 finds no shards: it cannot read 7 shards that node1 reads, such as 0.tar (missing)")
    assert "mount or copy them there" in fault
    assert "write" not in fault


def test_shards_of_another_size_are_named(machine):
    sizes = {f"{number}.tar": (100_000, 3_606_528) for number in range(5)}
    shards = {**machine.shards, "node2": replace(machine.shards["node2"], sizes=sizes)}
    faults = machine_faults(replace(machine, shards=shards))
    assert faults[0] == "0.tar has 100,000 bytes on node2 and 3,606,528 on node1: copy it again"
    assert len(faults) == 4
    assert faults[3] == "2 more shards differ in size on node2 and node1: copy them again"


def test_a_batch_that_cannot_be_dealt_out(machine):
    assert machine_faults(replace(machine, needs=replace(machine.needs, split="set 64"))) == ["set 64"]


def test_what_a_run_goes_on_with_is_a_note(machine):
    ranks = rank_two(machine, open_files=256, devices=[Room("H100", 20e9, 80e9)])
    slow = replace(machine.shards["node2"], read=ReadFacts(2, 9_000_000, 0.5, {}))
    worse = replace(machine, ranks=ranks, shards={**machine.shards, "node2": slow})
    assert machine_faults(worse) == []
    files, taken, slowest = machine_notes(worse)
    assert files == "node2: a process may have 256 files open: allow more with ulimit -n 4096"
    assert taken.startswith("node2: 60.0 of 80.0 GB of its H100 are taken")
    assert slowest.startswith("node2 reads shards slowest, 18 MB/s where another node reads 200")
    soon = replace(slow, read=ReadFacts(2, 900_000, 0.05, {}))  # so little says nothing
    assert len(machine_notes(replace(worse, shards={**machine.shards, "node2": soon}))) == 2


def test_the_report_has_a_block_for_each_node(machine):
    said = machine_report(machine)
    assert said.index("node1: ranks 0, 1\n") < said.index("node2: ranks 2, 3\n") < said.index("runs\n")
    for line in (
        "cores     8 for each rank; 4,096 open files a process",
        "memory    50.0 of 64.0 GB free; /dev/shm 20.0 of 32.0 GB free",
        "devices   H100: 79.0 of 80.0 GB free\n            H100: 79.0 of 80.0 GB free",
        "shards    7, none out of reach; 200 MB/s, one after another (100.0 MB of 2)",
        "clock     -0.200 s from that of rank 0",
        "versions  python 3.12.1, torch 2.13.0, nccl 2.27; the same on all ranks",
        "folder    /runs: 30.0 GB free; 4 of 4 ranks write there, 4 see what rank 0 wrote",
        "the checkpoints that a run keeps take 6.00 GB",
        "gather    20 GB/s with 4 MB blocks (nccl); a step's 1 MB of each rank reach all in 1 ms",
    ):
        assert f"  {line}\n" in said


# One process


@pytest.fixture
def shards(make_shards):
    return make_shards(48, 8)


def test_one_process_answers_too(shards, tmp_path, capsys):
    doctor(settings(tmp_path, "data.train.pairs.repeat=2"))
    found = json.loads((tmp_path / "out" / "doctor.json").read_text())["machine"]
    (facts,) = found["ranks"]
    assert facts["host"] == socket.gethostname()
    assert facts["cores"] >= 1
    assert 0 < facts["memory"]["free"] <= facts["memory"]["total"]
    assert facts["versions"]["torch"] == torch.__version__
    assert (found["clocks"], found["bandwidth"]) == ([0.0], None)
    assert found["shards"][facts["host"]]["count"] == 6  # each once
    assert found["shards"][facts["host"]]["read"]["bytes"] == sum(file.stat().st_size for file in shards.glob("*.tar"))
    assert list((tmp_path / "runs").iterdir()) == []  # nothing is left
    assert f"{facts['host']}: rank 0\n" in capsys.readouterr().out


def test_the_look_at_the_machine_can_be_left_out(shards, tmp_path, capsys):
    doctor(settings(tmp_path, "machine=false"))
    assert json.loads((tmp_path / "out" / "doctor.json").read_text())["machine"] is None
    assert not (tmp_path / "runs").exists()
    assert "cores" not in capsys.readouterr().out


def test_what_is_wrong_with_the_machine_ends_the_command_with_1(shards, tmp_path, capsys):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(SystemExit) as stop:
        doctor(settings(tmp_path))
    assert stop.value.code == 1
    assert f"wrong: {tmp_path}/runs cannot be written on {socket.gethostname()} (rank 0)" in capsys.readouterr().out


def test_checkpoints_are_weights_and_two_moments_thrice(shards, tmp_path):
    config = settings(tmp_path)
    (source,) = sources(pairs=shards)
    needs = look_at_machine(config, [source], Reading(), CPU).needs
    from hydra.utils import instantiate

    model = instantiate(config.model, _convert_="all")
    weights, buffers = (sum(v.numel() * 4 for v in values()) for values in (model.parameters, model.buffers))
    assert needs.checkpoints == pytest.approx(3 * (3 * weights + buffers), rel=1e-6)
    assert needs.gather == 2 * 32 * config.model.projection_dim * 4
    assert needs.pixels == 0
    more = look_at_machine(settings(tmp_path, "data.workers=2", "gather_mb=0.5"), [source], Reading(), CPU).needs
    assert (more.gather, more.pixels) == (500_000, 32 * 3 * config.model.preprocessing.crop**2)


@pytest.mark.parametrize(
    "word", ["device=tpu", "gather_mb=-1", "gather_mb=much", "devices=0", "devices=-1", "num_nodes=0"]
)
def test_settings_out_of_range_are_named(tmp_path, word):
    with pytest.raises(ValueError, match=f"{word.partition('=')[0]} is "):
        check_settings(settings(tmp_path, word))


def test_gpus_that_are_hidden_or_without_a_driver_are_told(monkeypatch):
    def fail():
        raise RuntimeError("no driver\nmore")

    monkeypatch.setattr(torch.cuda, "init", fail)
    monkeypatch.setattr(doctor_host, "gpus_there", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert unused_gpus("auto") == ""
    assert unused_gpus("cuda") == "no driver"
    monkeypatch.setattr(doctor_host, "gpus_there", lambda: True)
    assert unused_gpus("auto") == "no driver"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert unused_gpus("auto").startswith("CUDA_VISIBLE_DEVICES hides them: unset it")
    assert host_facts(CPU, "cpu").unused == ""


def test_one_process_looks_at_all_gpus_and_a_rank_at_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: f"GPU {gpu.index}")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (gpu.index, 80))
    facts = host_facts(torch.device("cuda"), "auto")
    assert facts.devices == [Room(f"GPU {number}", number, 80) for number in range(3)]
    monkeypatch.setattr(doctor_host, "world_size", lambda: 2)
    assert host_facts(torch.device("cuda", 1), "auto").devices == [Room("GPU 1", 1, 80)]


# Reading


def test_reading_stops_in_time_and_begins_where_its_turn_is(tmp_path):
    for number in range(4):
        write_tar(tmp_path / f"{number}.tar", [("a.jpg", bytes(10_000 * (number + 1)))])
    (source,) = sources(pairs=tmp_path)
    sizes = {file.stat().st_size for file in tmp_path.glob("*.tar")}
    assert read_bytes(source.shards * 2, 5.0, 20, seed=1).bytes == sum(sizes)
    first = {turn: read_bytes(source.shards, 1e-9, 20, 1, turn / 4).bytes for turn in range(4)}
    assert set(first.values()) == sizes  # one each, and each another


def test_what_cannot_be_read_is_told(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", [("a.jpg", b"x")])
    there, gone, folder = (Shard(tmp_path / name, Cache(tmp_path)) for name in ("a.tar", "b.tar", ""))
    facts = read_bytes([there, gone, folder], 5.0, 20, seed=1)
    assert facts.bytes == (tmp_path / "a.tar").stat().st_size
    assert facts.broken[f"{tmp_path}/b.tar"] == "missing"
    assert facts.broken[f"{tmp_path}"].startswith("IsADirectoryError")
    monkeypatch.setattr(inspection.throughput, "_read", lambda *_: time.sleep(0.3))
    facts = read_bytes([there] * 2 + [gone], 0.01, 0.05, seed=1)
    assert (facts.shards, list(facts.broken.values())) == (1, ["no answer for 0.05 seconds"])


def test_shards_far_away_are_read_and_not_kept(tmp_path):
    store = fsspec.filesystem("memory")
    store.pipe("/away/a.tar", bytes(5_000))
    facts = read_bytes([Shard("memory://away/a.tar", Cache(tmp_path / "cache"))], 5.0, 20, seed=1)
    assert (facts.bytes, facts.broken) == (5_000, {})
    assert not (tmp_path / "cache").exists()
    store.rm("/away", recursive=True)


def test_what_a_node_lacks_of_what_rank_0_lists_is_named(shards, tmp_path):
    config = settings(tmp_path)
    expected = list_here(config, None, Reading(), look=True)
    size = expected.sizes[f"{shards}/00002.tar"]
    assert list_here(settings(tmp_path, "data.train.pairs.repeat=3"), None, Reading(), True).digest == expected.digest
    with (shards / "00002.tar").open("r+b") as file:
        file.truncate(size // 2)
    (shards / "00004.tar").unlink()
    listed = list_here(config, None, Reading(), look=True)
    assert listed.digest != expected.digest
    seen = shards_here(listed, expected, config, Reading(), 0.0)
    assert (seen.count, seen.sizes) == (5, {f"{shards}/00002.tar": (size // 2, size)})
    assert seen.missing == {f"{shards}/00004.tar": "missing"}
    assert shards_here(expected, listed, config, Reading(), 0.0).others == [f"{shards}/00004.tar"]
    for file in shards.glob("*.tar"):
        file.unlink()
    seen = shards_here(list_here(config, None, Reading(), look=True), expected, config, Reading(), 0.0)
    assert (seen.count, len(seen.missing), seen.read) == (0, 6, None)
    assert seen.error


# Which ranks


@pytest.fixture
def step(monkeypatch):
    """The environment of a task that srun has started on two nodes, two on each."""
    for name, value in {
        "STEP_ID": "0", "NTASKS": "4", "NNODES": "2", "NTASKS_PER_NODE": "2", "JOB_NAME": "align-train", "PROCID": "3"
    }.items():  # fmt: skip
        monkeypatch.setenv(f"SLURM_{name}", value)
    return monkeypatch


NONE = OmegaConf.create({"devices": None, "num_nodes": None})


def test_ranks_are_those_of_srun_or_of_the_settings(step):
    assert asked_ranks(NONE) == (2, 2)
    assert asked_ranks(OmegaConf.create({"devices": 4, "num_nodes": 1})) == (4, 1)  # Lightning says what is wrong
    step.delenv("SLURM_STEP_ID")  # in the batch script itself
    assert asked_ranks(NONE) == (1, 1)
    assert asked_ranks(OmegaConf.create({"devices": 2, "num_nodes": None})) == (2, 1)


def test_tasks_that_lightning_takes_for_no_ranks_are_refused(step):
    step.setenv("SLURM_JOB_NAME", "interactive")
    with pytest.raises(ValueError, match=r"the job's name is interactive, .* give srun --job-name=align"):
        asked_ranks(NONE)
    step.setenv("SLURM_NTASKS", "1")
    check_job_name()  # a single process needs nothing of Lightning
    step.setenv("SLURM_NTASKS", "4")
    step.setenv("SLURM_JOB_NAME", "mine")
    step.delenv("SLURM_NTASKS_PER_NODE")
    with pytest.raises(ValueError, match="srun started 4 tasks, but not with --ntasks-per-node"):
        asked_ranks(NONE)


def test_more_ranks_than_gpus_are_refused(step):
    step.setattr(torch.cuda, "is_available", lambda: True)
    step.setattr(torch.cuda, "device_count", lambda: 1)
    check_visible("cpu", 2)
    with pytest.raises(ValueError, match=r"rank 3 on .* sees 1 GPU\(s\), and there are 2 ranks .* --gpus-per-node"):
        check_visible("auto", 2)


def test_a_rank_that_waits_for_others_says_so(step, capfd):
    step.setattr(doctor_ranks, "PATIENCE", 0.05)
    step.setenv("MASTER_ADDR", "node1")
    said, end = "", time.monotonic() + 10
    with told_to_wait(4):
        while not said and time.monotonic() < end:
            said = capfd.readouterr().err
    assert said.startswith(
        f"rank 3 on {socket.gethostname()} still waits for others of 4 ranks: check that all of them"
    )
    assert "reaches node1:" in said


def test_a_rank_that_waits_in_vain_gives_up_and_tells_how_to_know_who_is_missing(step, capfd):
    step.setattr(doctor_ranks, "LIMIT", 0.05)
    statuses: Queue[int] = Queue()
    step.setattr(os, "_exit", statuses.put)
    with told_to_wait(4):
        assert statuses.get(timeout=10) == 1
    assert "gives up: those of ranks 0 to 3 that do not say this are missing" in capfd.readouterr().err


# Two ranks


def ended(config: Any) -> tuple[str, str]:
    """How the command ends, and what it prints."""
    out = io.StringIO()
    with redirect_stdout(out):
        try:
            doctor(config)
            return "0", out.getvalue()
        except SystemExit as stop:
            return str(stop.code), out.getvalue()
        except Exception as error:  # noqa: BLE001 # it is what is looked at
            return f"{type(error).__name__}: {error}", out.getvalue()


def of_two(number: int, folder: Path) -> None:
    """One of two ranks: a sound look; one where all is wrong with rank 1; a rank that fails; no shards at all."""
    torch.set_num_threads(1)
    found = {"sound": ended(settings(folder, "devices=2", f"folder={folder}/sound", "gather_mb=0.1"))}
    other = folder / str(number)
    words = ["devices=2", f"runs={other}/runs", "data.batch_size=33", f"folder={folder}/wrong"]
    doctor_machine.SEEN_SECONDS = 0.1
    if number == 1:
        words.append(f"data.train.pairs.shards={folder}/shards/*1.tar")
        host, now, sizes = host_facts, time.time, doctor_shards.shard_sizes
        doctor_shards.shard_sizes = lambda *given: (dict.fromkeys(sizes(*given)[0], 100), {})
        doctor_machine.host_facts = lambda *given: replace(
            host(*given), host="other", versions={"torch": "0.1"}, unused="no driver"
        )
        doctor_machine.time = SimpleNamespace(time=lambda: now() + 75, monotonic=time.monotonic, sleep=time.sleep)
    found["wrong"] = ended(settings(folder, *words))
    if number == 1:
        doctor_machine.host_facts = lambda *_: 1 / 0
    found["failed"] = ended(settings(folder, "devices=2"))
    found["no shards"] = ended(settings(folder, "devices=2", "data.train.pairs.shards=nowhere.tar"))
    (folder / f"{number}.json").write_text(json.dumps({"rank": rank(), **found}))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what each rank saw."""
    folder = tmp_path_factory.mktemp("two")
    write_shards((drawn_pair(number) for number in range(64)), folder / "shards", "", 16)
    on_ranks(2, of_two, folder)
    return folder


def each(folder: Path, what: str) -> list[list[str]]:
    return [json.loads((folder / f"{number}.json").read_text())[what] for number in (0, 1)]


def test_two_ranks_look_together_and_the_first_tells(two):
    (code, said), (other, nothing) = each(two, "sound")
    assert (code, other, nothing) == ("0", "0", "")
    host = socket.gethostname()
    assert f"{host}: ranks 0, 1\n" in said
    assert "2 of 2 ranks write there, 2 see what rank 0 wrote" in said
    assert "0.1 MB of each rank reach all in" in said
    found = json.loads((two / "sound" / "doctor.json").read_text())
    assert found["wrong"] == []
    assert found["machine"]["bandwidth"] > 0
    assert found["machine"]["block_bandwidth"] > 0
    assert list(found["machine"]["shards"]) == [host]  # the first rank of a node reads
    assert abs(found["machine"]["clocks"][1]) < 5


def test_all_that_is_wrong_with_a_rank_is_told_with_its_host(two):
    (code, said), (other, _) = each(two, "wrong")
    assert (code, other) == ("1", "1")
    wrong = json.loads((two / "wrong" / "doctor.json").read_text())["wrong"]
    host = socket.gethostname()
    for start in (
        f"torch is {torch.__version__} on {host} (rank 0), 0.1 on other (rank 1)",
        "no GPU can be used on other (rank 1): no driver",
        f"{two}/0/runs on other (rank 1) is not the one of {host}",
        f"other finds 1 shards, and {host} 4",
        f"{two}/shards/00000.tar has 100 bytes on other and ",
        f"1 more shards differ in size on other and {host}",
        "data.batch_size is 33 over all ranks, but there are 2 ranks",
        "the clock of other (rank 1) is +75 s from that",
    ):
        assert any(fault.startswith(start) for fault in wrong), start
        assert f"wrong: {start}" in said


def test_a_rank_that_fails_does_not_leave_the_other_waiting(two):
    (first, _), (second, _) = each(two, "failed")
    assert first == "RuntimeError: ZeroDivisionError on rank 1: division by zero"
    assert second == "ZeroDivisionError: division by zero"
    assert all(end.startswith("FileNotFoundError: no shard matches") for end, _ in each(two, "no shards"))
