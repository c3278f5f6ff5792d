"""What happens to jobs on a real cluster, and what a training makes of it: the same curve as if nothing had."""

import csv
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from align_train.cli.attempts import read_attempts
from align_train.engine import read_checkpoint
from slurm.cluster import Cluster
from slurm.job import Job
from slurm.paced import PLACES, Pace

HERE = Path(__file__).parent
TRAIN = HERE.parents[1] / "slurm" / "train.sbatch"
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1")
ONE_NODE = ("--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=1")
STEPS = 30

pytestmark = pytest.mark.timeout(900)  # some are started seven times

Submit = Callable[..., Job]


@pytest.fixture(scope="session")
def pace(tmp_path_factory: pytest.TempPathFactory) -> Pace:
    """That of all trainings of this file."""
    return Pace(tmp_path_factory.mktemp("pace"))


@pytest.fixture(scope="session")
def submit(running_cluster: Cluster, words: Callable[..., list[str]], pace: Pace) -> Submit:
    """Submit slurm/train.sbatch for a paced training."""

    def submitted(folder: Path, *more: str, options: tuple[str, ...] = TWO_NODES, script: Path = TRAIN) -> Job:
        pace.forget()
        given = words("training._target_=slurm.paced.PacedTraining", f"max_steps={STEPS}", "validate_every=10", *more)
        export = f"--export=ALL,PACE={pace.folder},PYTHONPATH={HERE.parent},PYTHON={sys.executable}"
        return running_cluster.submit(script, *given, options=(*options, export), folder=folder)

    return submitted


def run_of(job: Job) -> Path:
    """The folder that the job's training writes to."""
    return job.log.parent / "outputs" / "slurm" / f"align_train-{job.id}"


def curve(run: Path) -> list[tuple[int, str]]:
    """Step and loss of each row of metrics.csv."""
    with (run / "metrics.csv").open() as file:
        return [(int(row["step"]), row["loss"]) for row in csv.DictReader(file)]


@pytest.fixture(scope="session")
def undisturbed(submit: Submit, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, str]]:
    """The curve of a training by a rank on each of two nodes, to which nothing happens."""
    job = submit(tmp_path_factory.mktemp("undisturbed"), "checkpoint_every=100")
    assert job.wait(180).name == "COMPLETED", job.text()
    found = curve(run_of(job))
    assert [step for step, _ in found] == list(range(STEPS + 1))
    return found


def held(job: Job, pace: Pace, step: int, number: int, place: str = "forward") -> None:
    """Wait until a rank stands still in a step, which the others wait for."""
    job.wait_until(lambda: pace.is_held(step, number, place), 120, f"rank {number} held at step {step}")


def test_a_training_survives_whatever_happens_to_its_job(
    cluster: Cluster, submit: Submit, pace: Pace, undisturbed: list[tuple[int, str]], tmp_path: Path
) -> None:
    words = ("checkpoint_every=4", "recovery.failures=2", "data.workers=1", "logger=wandb")
    job = submit(tmp_path, *words, options=(*TWO_NODES, "--partition=low"))
    run = run_of(job)
    pace.hold(5, 1)

    # the warning before a time limit, or any USR1, finds one rank in front of an exchange and the other in it
    held(job, pace, 5, 1)
    pace.hold(9, 0, "backward")
    job.signal("USR1")
    pace.release(5)
    job.wait_for(r"again: yes, stopped at step 6 \(REQUEUE\)")

    # a job of a partition that comes first needs the nodes
    held(job, pace, 9, 0, "backward")
    pace.hold(13, 1)
    (tmp_path / "brief.sh").write_text("#!/bin/sh\n")
    urgent = ("--partition=high", "--nodes=2", "--exclusive")
    other = cluster.submit(tmp_path / "brief.sh", options=urgent, folder=tmp_path)
    job.wait_until(lambda: pace.is_signalled(9), 60, "the warning of a preemption")
    pace.release(9)
    job.wait_for(r"again: yes, stopped at step 10 \(REQUEUE\)")
    assert other.wait().name == "COMPLETED"

    # a node is gone: Slurm queues the job again, and what came after the last checkpoint is done again
    held(job, pace, 13, 1)
    pace.hold(14, 0)
    cluster.set_node("node2", "DOWN")
    job.wait_until(lambda: job.state().restarts == 3, 60, "its third restart")
    job.wait_until(lambda: not job.processes(0) + job.processes(1), 60, "the end of its processes")
    pace.release(13)
    cluster.set_node("node2", "RESUME")

    # somebody queues it again: SIGTERM, and a few seconds
    held(job, pace, 14, 0)
    pace.hold(17, 1)
    job.requeue()
    job.wait_until(lambda: pace.is_signalled(14), 60, "SIGTERM")
    pace.release(14)

    # a rank is killed, as the kernel does where memory is short
    held(job, pace, 17, 1)
    pace.hold(21, 0)
    job.kill(1)
    pace.release(17)
    job.wait_for(r"again: yes, failure 1 of at most 2 at step 17: ")

    # its time is up
    held(job, pace, 21, 0)
    cluster.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=2")
    job.wait_until(lambda: pace.is_signalled(21), 100, "the warning of the time limit")
    cluster.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")
    pace.release(21)
    job.wait_for(r"again: yes, stopped at step 22 \(REQUEUE\)")

    assert job.wait(180).name == "COMPLETED", job.text()
    assert curve(run) == undisturbed
    attempts = read_attempts(run)
    assert job.state().restarts == len(attempts) - 1 == 6
    assert [each.first_step for each in attempts] == [0, 6, 10, 12, 15, 16, 22]
    assert len(re.findall("again: yes", job.text())) == 4  # the others were Slurm's doing
    assert len({path.name.split("-")[3] for path in run.glob("wandb/offline-run-*")}) == 1


def test_another_number_of_nodes_goes_on_with_the_same_pairs(
    cluster: Cluster, submit: Submit, pace: Pace, undisturbed: list[tuple[int, str]], tmp_path: Path
) -> None:
    words = ["hydra.run.dir=run", "checkpoint_every=100"]
    two = submit(tmp_path, *words)
    pace.hold(15, 1)
    held(two, pace, 15, 1)
    two.cancel()  # SIGTERM, and a few seconds
    pace.release(15)
    assert two.wait().name == "CANCELLED"
    two.wait_for("stopped by SIGTERM at step 16")
    assert "again:" not in two.text()
    # as many parts of a batch as there were, or dropout would draw other numbers
    one = submit(tmp_path, *words, "step.micro_batch=8", options=ONE_NODE)
    assert one.wait(180).name == "COMPLETED", one.text()
    assert [each.first_step for each in read_attempts(tmp_path / "run")] == [0, 16]
    found = curve(tmp_path / "run")
    assert found[:16] == undisturbed[:16]
    assert [step for step, _ in found] == [step for step, _ in undisturbed]
    one_rank, two_ranks = ([float(loss) for _, loss in each[16:] if loss] for each in (found, undisturbed))
    assert one_rank == pytest.approx(two_ranks, abs=2e-4)  # sums in another order, over 14 updates
    drawn = [read_checkpoint(tmp_path / "run")["PairData"]["order"]["drawn"]]
    assert drawn == [16 * STEPS]


def test_a_signal_before_training_queues_the_job_again(
    cluster: Cluster, submit: Submit, undisturbed: list[tuple[int, str]], tmp_path: Path
) -> None:
    job = submit(tmp_path)
    job.wait_until(lambda: all(job.processes(rank) for rank in range(2)), 60, "its ranks")
    job.signal("USR1")
    job.wait_for("again: yes")
    assert job.wait(180).name == "COMPLETED", job.text()
    assert job.state().restarts == 1
    assert curve(run_of(job)) == undisturbed


def test_a_step_that_always_fails_ends_the_job_and_says_why(submit: Submit, pace: Pace, tmp_path: Path) -> None:
    job = submit(tmp_path, "recovery.failures=2", "checkpoint_every=2", options=ONE_NODE)
    pace.fail(5)
    assert job.wait(180).name == "FAILED"
    assert job.state().restarts == 1
    last = job.text().rstrip().splitlines()[-1]
    assert re.match(r"again: no, 2 attempts in a row ended at step 5 or before \(RuntimeError: step 5 never", last)


def test_wrong_settings_are_tried_once(submit: Submit, tmp_path: Path) -> None:
    for word, says in (("data.batch_size=0", "ValueError"), ("experiment=nothing", "no settings, exit status 1")):
        job = submit(tmp_path, word, options=ONE_NODE)
        assert job.wait().name == "FAILED"
        assert job.state().restarts == 0
        assert f"again: no, it would fail again: {says}" in job.text().rstrip().splitlines()[-1]


def test_twenty_signals_find_ranks_apart_and_none_hangs(
    cluster: Cluster, submit: Submit, pace: Pace, tmp_path: Path
) -> None:
    """Two ranks in one process each, that train, are stopped and go on twenty times."""
    job = submit(tmp_path, "max_steps=100", "checkpoint_every=100", options=(), script=HERE / "many_stops.sh")
    stops = [(3 * number, number // 3 % 2, PLACES[number % 3]) for number in range(20)]
    for stop in stops:
        pace.hold(*stop)
    for step, number, place in stops:
        held(job, pace, step, number, place)
        job.signal("USR1")
        job.wait_until(lambda step=step: pace.is_signalled(step), 60, "SIGUSR1")  # type: ignore[misc]
        pace.release(step)
        job.wait_for(f"stopped by SIGUSR1 at step {step + (2 if place == 'end' else 1)};")
    assert job.wait().name == "COMPLETED"
