"""The scripts of slurm/ on a real cluster, each submitted from a folder that is not the checkout's."""

import csv
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import drawn_image
from fetching import job_of, state
from metadata import parquet

from slurm.cluster import Cluster
from slurm.job import Job

SCRIPTS = Path(__file__).parents[2] / "slurm"
TRAIN, FINETUNE, PREPARE, EVALUATE = (SCRIPTS / f"{n}.sbatch" for n in ("train", "finetune", "prepare", "evaluate"))
TWO_BY_TWO = ("--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1")

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
    completed(cluster.submit(EVALUATE, *exam, options=("--nodes=2", "--cpus-per-task=1"), folder=tmp_path))
    assert "pairs" in json.loads((trained / "result.json").read_text())["exams"]


# Preparing


@pytest.fixture(scope="module")
def served(running_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the metadata of twelve images; odd ones come when its file `released` is there."""
    folder = tmp_path_factory.mktemp("served")
    order = (0, 2, 4, 6, 1, 3, 8, 10, 12, 14, 5, 7)
    rows = [{"id": number, "url": f"http://127.0.0.1:8000/{number}.jpg"} for number in order]
    parquet(folder / "metadata.parquet", rows)
    running_cluster.start("server", sys.executable, str(Path(__file__).with_name("slow_server.py")), str(folder))
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
        assert "queued again after 0 restarts" in element.text()
    assert len(first) == 2
    assert {path: path.stat().st_mtime_ns for path in first} == first
    assert state(job_of(tmp_path / "parts")) == state(job_of(tmp_path / "whole"))


def test_time_limit_queues_again_and_scancel_does_not(cluster: Cluster, served: Path, tmp_path: Path) -> None:
    (served / "released").unlink(missing_ok=True)
    job = cluster.submit(PREPARE, *source(served, tmp_path / "coyo"), options=["--mem=1G"], folder=tmp_path)
    job.wait_until((tmp_path / "coyo" / "shards" / "00000.parquet").exists, 60, "a finished task")
    job.signal("USR1", "--batch")  # as Slurm does before the time limit
    job.wait_for("its time is up, status 138; queued again after 0 restarts")
    job.wait_until(lambda: job.state().name == "PENDING", 60, "its place in the queue")
    job.wait_until(job.processes, 60, "its second start")
    job.cancel()
    assert job.wait().name == "CANCELLED"
    assert job.text().count("queued again") == job.state().restarts == 1


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


def test_chain_ends_where_a_job_fails_four_times(cluster: Cluster, tmp_path: Path) -> None:
    jobs, run = chained(cluster, tmp_path, "source=nothing")
    failed = jobs["prepare"].wait()
    assert (failed.name, failed.restarts) == ("FAILED", 3)
    assert "not queued again after 3 restarts" in jobs["prepare"].text()
    assert {jobs[name].wait().name for name in ("train", "evaluate")} == {"CANCELLED"}
    assert not run.exists()
