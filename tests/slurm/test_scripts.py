"""The scripts of slurm/ on a real cluster, each submitted from a folder that is not the checkout's."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import drawn_image
from fetching import job_of, state
from metadata import parquet

from slurm.cluster import PREFIX, Cluster, clear_away, locked
from slurm.job import Job

SCRIPTS = Path(__file__).parents[2] / "slurm"
TRAIN, FINETUNE, PREPARE, EVALUATE = (SCRIPTS / f"{n}.sbatch" for n in ("train", "finetune", "prepare", "evaluate"))
TWO_BY_TWO = ("--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1")

TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--output=doctor.log")
DOCTOR = """#!/usr/bin/env bash
source ENVIRONMENT/bin/activate
look() { # BATCH_SIZE FOLDER_OF_NODE_1 FOLDER_OF_NODE_2
  srun --kill-on-bad-exit=1 bash -c 'folders=("${@:2}"); align-train doctor data=shards model=align_tiny \\
    data.workers=0 seconds=1 device=cpu data.batch_size=$1 \\
    "data.train.pairs.shards=SHARDS/${folders[$SLURM_PROCID]}/*.tar"' look "$@"
}
look 16 train train
echo "sound: $?"
look 15 train elsewhere
echo "broken: $?"
"""

Words = Callable[..., list[str]]


def completed(job: Job, seconds: float = 120) -> Job:
    """The job, when it has ended well."""
    assert job.wait(seconds).name == "COMPLETED", job.text()
    return job


@pytest.fixture(scope="module")
def trained(running_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, words: Words) -> Path:
    """The run folder of a training by two ranks on each of two nodes."""
    folder = tmp_path_factory.mktemp("submitted here")
    job = completed(running_cluster.submit(TRAIN, *words(), options=TWO_BY_TWO, folder=folder))
    assert job.log == folder / f"align_train-{job.id}.log"
    return folder / "outputs" / "slurm" / f"align_train-{job.id}"


def test_training_on_two_nodes(trained: Path) -> None:
    assert json.loads((trained / "result.json").read_text())["steps"] == 6
    assert "batch 16 = 4 ranks x" in next(trained.parents[2].glob("*.log")).read_text()
    with (trained / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == sorted(set(steps))


def test_fine_tuning_and_evaluating_on_two_nodes(cluster: Cluster, trained: Path, tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number}.jpg").write_bytes(drawn_image(number))
    rows = [f"{number}.jpg,drawing {number}" for number in range(40)]
    (tmp_path / "pairs.csv").write_text("\n".join(["photo,caption", *rows]))
    brief = ["max_steps=2", "schedule.warmup_steps=1", "examine_every=2", "forgetting.alphas=[0,1]", "data.workers=0"]
    small = ["data.batch_size=16", "exams=[own_pairs]", "forgetting.guard=[]", "report=false", "export=false"]
    words = [f"start.model={trained}", "pairs.path=pairs.csv", *brief, *small, "trainer.accelerator=cpu"]
    tuned = completed(cluster.submit(FINETUNE, *words, options=("--nodes=2", "--cpus-per-task=1"), folder=tmp_path))
    run = tmp_path / "outputs" / "slurm" / f"align_finetune-{tuned.id}"
    assert json.loads((run / "result.json").read_text())["steps"] == 2
    shards = run / "pairs" / "validation" / "*.tar"
    exam = ["exams=[retrieval_shards]", f"exams.pairs.data.shards={shards}", "device=cpu", f"checkpoint={trained}"]
    given = ("--nodes=2", "--cpus-per-task=1", "--job-name=exam=[1], mine")
    scored = completed(cluster.submit(EVALUATE, *exam, options=given, folder=tmp_path))
    assert (tmp_path / "outputs" / "slurm" / f"exam__1___mine-{scored.id}").is_dir()
    assert "pairs" in json.loads((trained / "result.json").read_text())["exams"]


def test_doctor_on_two_nodes(cluster: Cluster, drawn_shards: Path, tmp_path: Path) -> None:
    script = tmp_path / "doctor.sbatch"
    script.write_text(DOCTOR.replace("SHARDS", str(drawn_shards)).replace("ENVIRONMENT", sys.prefix))
    said = completed(cluster.submit(script, options=TWO_NODES, folder=tmp_path)).text()
    assert "sound: 0" in said
    assert re.search(r"^node1: rank 0\n", said, re.MULTILINE)
    assert re.search(r"^node2: rank 1\n", said, re.MULTILINE)
    assert "broken: 1" in said
    assert "wrong: node2 finds no shards: " in said
    assert "wrong: data.batch_size is 15 over all ranks, but there are 2 ranks" in said


def test_what_a_killed_cluster_has_left_is_cleared_away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left, used, other = (tmp_path / name for name in (f"{PREFIX}1", f"{PREFIX}2", "other"))
    for folder in (left, used, other):
        folder.mkdir()
    lock = locked(used)
    assert lock is not None
    clear_away()
    os.close(lock)
    assert set(tmp_path.iterdir()) == {used, other}


# Preparing


@pytest.fixture(scope="module")
def served(running_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the metadata of twelve images; odd ones come when its file `released` is there."""
    folder = tmp_path_factory.mktemp("served")
    order = (0, 2, 4, 6, 1, 3, 8, 10, 12, 14, 5, 7)
    rows = [{"id": number, "url": f"http://127.0.0.1:8000/{number}.jpg"} for number in order]
    parquet(folder / "metadata.parquet", rows)
    running_cluster.start("server", sys.executable, str(Path(__file__).with_name("slow_server.py")), str(folder))
    # until somebody listens on port 8000 (0x1F40): an image that is asked for earlier is lost
    running_cluster.wait_until(lambda: ":1F40 " in running_cluster.run("cat", "/proc/net/tcp"), 60, "the server")
    return folder


def source(served: Path, folder: Path) -> list[str]:
    """Overrides of `align-train prepare` that fetch into FOLDER: four tasks, of which the odd ones hold odd images."""
    limits = "source.fetch.limits"
    return [
        "source=coyo", "rules=none", f"source.metadata={served}/metadata.parquet", f"source.folder={folder}",
        "source.fetch.permissions.networks=[127.0.0.1/32]", "source.fetch.rows_per_task=3", "source.fetch.processes=1",
        "source.fetch.images.size=32", f"{limits}.total_seconds=60", f"{limits}.retries=0",
    ]  # fmt: skip


def worker(job: Job) -> int:
    """The process that fetches, which is the last that the program has started."""
    return job.processes()[-1]


def test_array_of_which_two_elements_are_killed_makes_the_same_shards(
    cluster: Cluster, served: Path, tmp_path: Path
) -> None:
    (served / "released").touch()
    alone = cluster.submit(PREPARE, *source(served, tmp_path / "whole"), options=["--mem=1G"], folder=tmp_path)
    assert "100.0 %" in completed(alone).text()
    (served / "released").unlink()

    words = source(served, tmp_path / "parts")
    completed(cluster.submit(PREPARE, *words, "source.steps=[select]", folder=tmp_path))
    array = cluster.submit(PREPARE, *words, options=["--array=0-1", "--output=%x-%A_%a.log"], folder=tmp_path)
    elements = [array.element(number) for number in range(2)]
    for number, element in enumerate(elements):  # each has done the first of its two tasks
        element.wait_until((tmp_path / "parts" / "shards" / f"{2 * number:05d}.parquet").exists, 60, "a finished task")
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts" / "shards").glob("*.tar")}
    elements[0].kill()
    os.kill(worker(elements[1]), signal.SIGKILL)
    (served / "released").touch()
    for element in elements:
        assert completed(element).state().restarts == 1
        assert "failure 1 in a row of at most 3; to be queued again" in element.text()
    assert not list(tmp_path.glob(".align_prepare-*"))  # the counts of failures
    assert len(first) == 2
    assert {path: path.stat().st_mtime_ns for path in first} == first
    assert state(job_of(tmp_path / "parts")) == state(job_of(tmp_path / "whole"))


def test_time_limit_queues_again_and_scancel_does_not(cluster: Cluster, served: Path, tmp_path: Path) -> None:
    (served / "released").unlink(missing_ok=True)
    job = cluster.submit(PREPARE, *source(served, tmp_path / "coyo"), options=["--mem=1G"], folder=tmp_path)
    job.wait_until((tmp_path / "coyo" / "shards" / "00000.parquet").exists, 60, "a finished task")
    job.signal("USR1", "--batch")  # as Slurm does before the time limit
    job.wait_for("warned that its end is near; to be queued again")
    job.wait_until(lambda: job.state().name == "PENDING", 60, "its place in the queue")
    job.wait_until(job.processes, 60, "its second start")
    job.cancel()
    assert job.wait().name == "CANCELLED"
    assert job.text().count("queued again") == job.state().restarts == 1


def test_each_script_asks_for_the_warning_that_it_waits_for() -> None:
    asked = {
        path.stem: re.findall(r"^#SBATCH --signal=(\S+)$", path.read_text(), re.M) for path in SCRIPTS.glob("*.sbatch")
    }
    assert asked == {"prepare": ["B:USR1@120"], "train": ["USR1@120"], "finetune": ["USR1@120"], "evaluate": []}


def test_only_failures_in_a_row_are_counted(cluster: Cluster, tmp_path: Path) -> None:
    program = tmp_path / "environment" / "bin" / "align-train"
    program.parent.mkdir(parents=True)
    (program.parent / "activate").write_text('PATH="${BASH_SOURCE[0]%/*}:$PATH"\n')
    program.write_text('#!/bin/sh\nexit $(echo "1 1 143 1 143 0" | cut -d" " -f$((SLURM_RESTART_COUNT + 1)))\n')
    program.chmod(0o755)
    given = [f"--export=ALL,ALIGN_TRAIN_ENV={program.parents[1]}", "--mem=1G"]
    job = completed(cluster.submit(PREPARE, options=given, folder=tmp_path), 180)
    assert job.state().restarts == 5
    said = re.findall(r"(failure \d|stopped)", job.text())
    assert said == ["failure 1", "failure 2", "stopped", "failure 1", "stopped"]
    assert not list(tmp_path.glob(".align_prepare-*"))


def test_checkout_with_a_space_in_its_path_and_a_job_that_may_not_be_queued_again(
    cluster: Cluster, tmp_path: Path
) -> None:
    copied = tmp_path / "a checkout" / "slurm"
    shutil.copytree(SCRIPTS, copied)
    (tmp_path / "a checkout" / ".venv").symlink_to(sys.prefix)
    given = ["--export=ALL,ALIGN_TRAIN_ENV=", "--mem=1G", "--no-requeue"]
    job = cluster.submit(copied / "prepare.sbatch", "source=nothing", options=given, folder=tmp_path)
    assert job.wait().exit_code == 1
    assert "Could not find 'source/nothing'" in job.text()
    assert "Slurm does not queue this job again" in job.text()
    (tmp_path / "a checkout" / ".venv").unlink()
    for name in ("prepare", "train", "finetune", "evaluate"):
        lost = cluster.submit(copied / f"{name}.sbatch", options=given, folder=tmp_path)
        assert lost.wait().exit_code == 1
        assert f"{name}.sbatch: no environment in {copied}/../.venv on node" in lost.text()
        assert "set ALIGN_TRAIN_ENV" in lost.text()


Called = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def call(tmp_path: Path) -> Called:
    """Call a script as Slurm would, without one: srun runs what it is given, scontrol queues nothing."""
    tools = {
        "srun": '#!/bin/sh\nwhile [ "${1#-}" != "$1" ]; do shift; done\nexec "$@"\n',
        "scontrol": '#!/bin/sh\n[ "$1" = requeue ] || echo "   Command=$COMMAND name=value"\n',
        "align-train": '#!/bin/sh\n[ "$STATUS" != USR1 ] || kill -s USR1 $PPID\nexit ${STATUS#USR}\n',
        "activate": "",
    }
    (tmp_path / "bin").mkdir()
    for name, text in tools.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    known = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    known |= {"PATH": path, "ALIGN_TRAIN_ENV": str(tmp_path), "COMMAND": "(null)", "SLURM_JOB_ID": "7"}

    def called(script: Path, **facts: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(script)], env={**known, **facts}, cwd=tmp_path, capture_output=True, text=True, check=False
        )

    return called


@pytest.mark.parametrize("status", ["143", "USR1"])
def test_starts_that_end_at_once_are_not_queued_again_for_ever(call: Called, status: str, tmp_path: Path) -> None:
    (tmp_path / ".align_prepare-7.stops").write_text("of an older job\n" * 9)
    said = [call(PREPARE, SLURM_RESTART_COUNT=str(n), STATUS=status).stdout for n in range(10)]
    assert all("; to be queued again" in each for each in said[:9])
    assert "10 starts in a row had less than 10 minutes each: give more --time" in said[9]
    assert "; not queued again" in said[9]
    assert not list(tmp_path.glob(".align_prepare-*"))


def test_a_start_that_worked_for_ten_minutes_forgets_those_that_ended_at_once(call: Called, tmp_path: Path) -> None:
    stops = tmp_path / ".align_prepare-7.stops"
    stops.write_text("stopped by Slurm on node1\n" * 9)
    worked = call(PREPARE, SLURM_RESTART_COUNT="9", STATUS="143", SECONDS="600")
    assert "stopped by Slurm; to be queued again" in worked.stdout
    assert not stops.exists()
    call(PREPARE, SLURM_RESTART_COUNT="10", STATUS="143")
    assert len(stops.read_text().splitlines()) == 1
    failed = call(PREPARE, SLURM_RESTART_COUNT="11", STATUS="1")
    assert "failure 1 in a row of at most 3; to be queued again" in failed.stdout
    assert stops.exists()
    assert call(PREPARE, SLURM_RESTART_COUNT="12", STATUS="0").returncode == 0
    assert not list(tmp_path.glob(".align_prepare-*"))


@pytest.mark.parametrize("script", [TRAIN, FINETUNE, PREPARE, EVALUATE], ids=lambda script: script.stem)
def test_a_script_that_cannot_tell_where_it_lies_says_so(call: Called, script: Path) -> None:
    for command in ("(null)", "/home/me/copy.sh"):  # fed by stdin, and under another name
        lost = call(script, ALIGN_TRAIN_ENV="", COMMAND=command)
        assert lost.returncode == 1
        assert f"{script.name}: cannot tell where this script lies" in lost.stdout
        assert "set ALIGN_TRAIN_ENV" in lost.stdout


def test_array_that_leaves_parts_out_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    array = cluster.submit(PREPARE, options=["--array=1-2", "--output=%a.log"], folder=tmp_path)
    for number in (1, 2):
        assert array.element(number).wait().exit_code == 2
        assert "as in --array=0-15" in array.element(number).text()


# One after the other


def chained(cluster: Cluster, folder: Path, *words: str) -> tuple[dict[str, Job], Path]:
    """The jobs by name, and the run folder."""
    said = cluster.run(str(SCRIPTS / "chain.sh"), *words, folder=folder)
    jobs = {name: cluster.job(number) for name, number in re.findall(r"^(\w+) +job (\d+)", said, re.MULTILINE)}
    return jobs, folder / re.findall("run folder: (.*)", said)[0]


def test_chain_from_links_to_an_evaluated_model(cluster: Cluster, served: Path, tmp_path: Path) -> None:
    (served / "released").touch()
    shards = tmp_path / "links" / "shards" / "*.tar"
    train = ["experiment=tiny", "data=shards", f"data.train.pairs.shards={shards}", "data.batch_size=8", "max_steps=2"]
    less = [
        "schedule.warmup_steps=1",
        "data.workers=0",
        "report=false",
        "export=false",
        "trainer.accelerator=cpu",
        "checkpoint_every=1",
    ]
    exam = ["exams=[retrieval_shards]", f"exams.pairs.data.shards={shards}", "device=cpu"]
    prepare = ["--array=0-1", "--mem=1G", *source(served, tmp_path / "links")]
    jobs, run = chained(cluster, tmp_path, *prepare, "--", "--nodes=2", *train, *less, "--", *exam)
    assert list(jobs) == ["select", "fetch", "summary", "train", "evaluate"]
    for job in [jobs["select"], *(jobs["fetch"].element(n) for n in (0, 1)), *list(jobs.values())[2:]]:
        completed(job)
    assert "100.0 %" in jobs["summary"].text()
    assert "pairs" in json.loads((run / "result.json").read_text())["exams"]


def test_chain_ends_where_a_job_fails_three_times(cluster: Cluster, tmp_path: Path) -> None:
    jobs, run = chained(cluster, tmp_path, "source=nothing")
    failed = jobs["prepare"].wait()
    assert (failed.name, failed.restarts) == ("FAILED", 2)
    assert "failure 3 in a row of at most 3; not queued again" in jobs["prepare"].text()
    assert {jobs[name].wait().name for name in ("train", "evaluate")} == {"CANCELLED"}
    assert not run.exists()


def test_chains_have_run_folders_of_their_own_and_all_jobs_or_none(cluster: Cluster, tmp_path: Path) -> None:
    first, run = chained(cluster, tmp_path, "--hold", "--output=%x of %j.txt")
    assert run == tmp_path / "outputs" / "slurm" / f"chain-{first['prepare'].id}"
    assert first["prepare"].log == tmp_path / f"align_prepare of {first['prepare'].id}.txt"
    following = int(first["evaluate"].id) + 1
    (tmp_path / "outputs" / "slurm" / f"chain-{following}").mkdir(parents=True)
    assert chained(cluster, tmp_path, "--hold")[1].name == f"chain-{following}-2"
    with pytest.raises(AssertionError, match=f"invalid partition (?s:.*)cancelled {following + 3}, since not all"):
        chained(cluster, tmp_path, "--hold", "--", "--partition=none")
    assert cluster.job(str(following + 3)).state().name == "CANCELLED"
    for wrong in ("-N2", "--nodes"):
        with pytest.raises(AssertionError, match=f"{wrong}: give an option of sbatch as --NAME=VALUE"):
            chained(cluster, tmp_path, wrong)
    assert "slurm/chain.sh [words for prepare] --" in cluster.run(str(SCRIPTS / "chain.sh"), "--help")
