"""Starts of a run: counted in its folder, whose folder that is, and when a SLURM job is not queued again."""

import json
import multiprocessing
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align_train.cli import again
from align_train.cli.attempts import (
    DONE,
    Attempt,
    attempt,
    begin,
    end_unsettled,
    failures,
    read_attempts,
    told_failures,
    write_attempts,
)
from align_train.cli.jobs import Job
from align_train.cli.run_folders import folder_of, last_folder
from align_train.engine import Heartbeat

SLURM = {
    "SLURM_CLUSTER_NAME": "big", "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "b7", "SLURM_JOB_USER": "me",
    "SLURM_SUBMIT_DIR": "/home/me", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_SRUN_COMM_PORT": "1",
}  # fmt: skip


def job(restart: int = 0, **facts: str) -> Job:
    made = Job.current({**SLURM, "SLURM_RESTART_COUNT": str(restart), **facts})
    assert made is not None
    return made


def ended(reached: int | None, how: str = "", **more: Any) -> Attempt:
    """An attempt of the job that came so far."""
    first = None if reached is None else 0
    return Attempt("2026-01-01", "node1", 1, job().whose, [0, 0], "", first, reached, "2026-01-01", how, **more)


def fail(error: BaseException, folder: Path, steps: str) -> None:
    (folder / "steps.txt").write_text(steps)
    raise error


@pytest.fixture
def in_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Make this process one of a SLURM job's, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def enter(restart: int = 0, **facts: str) -> None:
        for name, value in {**SLURM, "SLURM_RESTART_COUNT": str(restart), **facts}.items():
            monkeypatch.setenv(name, value)

    enter()
    return enter


def test_outside_of_slurm_there_is_no_job() -> None:
    assert Job.current({"PATH": "/bin"}) is None
    assert job(2).turn == [2, 0]


def test_each_start_is_noted_with_how_it_ended(tmp_path: Path) -> None:
    with attempt(tmp_path, job(), 3):
        (tmp_path / "steps.txt").write_text("0 57     \n")
    with pytest.raises(ValueError, match="wrong"), attempt(tmp_path, job(1), 3):
        raise ValueError("wrong")
    with pytest.raises(SystemExit), attempt(tmp_path, job(2), 3):
        fail(SystemExit(75), tmp_path, "57 60\n")
    with pytest.raises(RuntimeError), attempt(tmp_path, job(3), 3):
        fail(RuntimeError("Connection closed by peer"), tmp_path, "60 61\n")
    with pytest.raises(OSError, match="disk"), attempt(tmp_path, None, 3):
        raise OSError("disk")
    found = read_attempts(tmp_path)
    assert [(each.first_step, each.reached, each.how, each.for_good) for each in found] == [
        (0, 57, DONE, False),
        (None, None, "ValueError: wrong", True),
        (57, 60, "REQUEUE", False),
        (60, 61, "RuntimeError: Connection closed by peer", False),
        (None, None, "OSError: disk", False),
    ]
    assert [list(each.turn) for each in found] == [[0, 0], [1, 0], [2, 0], [3, 0], [0, 0]]
    assert all(each.ended and each.most_failures == 3 for each in found)


def test_a_missing_file_is_a_wrong_path_until_a_start_has_trained(tmp_path: Path) -> None:
    def missing(turn: int, steps: str = "") -> bool:
        with pytest.raises(FileNotFoundError), attempt(tmp_path, job(turn), 9):
            fail(FileNotFoundError("no shard matches"), tmp_path, steps)
        return read_attempts(tmp_path)[-1].for_good

    assert missing(0)
    assert not missing(1, "0 3\n")
    assert not missing(2)


def test_equal_reasons_are_told_once() -> None:
    killed = [Attempt("", "", 1), Attempt("", "", 1), Attempt("", "", 1, how="OSError: disk")]
    assert told_failures(killed) == "3 attempts in a row ended before training began (killed, 2 times; OSError: disk)"
    assert told_failures(killed[:1]) == "1 attempt ended before training began (killed)"


def test_an_attempt_that_was_killed_says_how_far_it_came(tmp_path: Path) -> None:
    begin(tmp_path, job())
    (tmp_path / "steps.txt").write_text("10 42\n")
    assert [(each.reached, each.ended, each.told()) for each in read_attempts(tmp_path)] == [(42, None, "killed")]
    begin(tmp_path, job(1))
    assert [(each.first_step, each.reached) for each in read_attempts(tmp_path)] == [(10, 42), (None, None)]


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "attempts.json").write_text('[{"began"')
    with pytest.raises(ValueError, match=r"attempts\.json is damaged .*take it away"):
        read_attempts(tmp_path)


Holding = Callable[[Path, Job | None], AbstractContextManager[Any]]


def hold(folder: Path, of: Job | None, held: Any, go: Any) -> None:
    with attempt(folder, of, 3):
        (folder / "steps.txt").write_text("0 57")
        held.set()
        go.wait(60)


@pytest.fixture
def holding() -> Holding:
    """Another process that is at a run; it ends with the block."""
    context = multiprocessing.get_context("forkserver")

    @contextmanager
    def start(folder: Path, of: Job | None) -> Iterator[Any]:
        held, go = context.Event(), context.Event()
        other = context.Process(target=hold, args=(folder.absolute(), of, held, go))
        other.start()
        try:
            assert held.wait(60)
            yield other
        finally:
            go.set()
            other.join()

    return start


def test_two_processes_are_not_at_one_run(tmp_path: Path, holding: Holding) -> None:
    with holding(tmp_path, None):
        for of in (None, job(), job(1)):
            with (
                pytest.raises(ValueError, match=r"another process is at the run .*end it, or name"),
                attempt(tmp_path, of, 3),
            ):
                pass
    with attempt(tmp_path, None, 3):
        pass
    assert [each.how for each in read_attempts(tmp_path)] == [DONE, DONE]


def test_a_job_that_was_queued_again_does_not_wait_for_a_node_that_no_longer_answers(
    tmp_path: Path, holding: Holding
) -> None:
    killed = replace(ended(3), job={}, ended=None)  # long before, by a stranger
    write_attempts(tmp_path, [killed])
    (tmp_path / "steps.txt").write_text("0 3")
    with holding(tmp_path, job()):
        begin(tmp_path, job(1))
        with pytest.raises(RuntimeError, match="x"), attempt(tmp_path, job(1), 3):
            raise RuntimeError("x")
        with attempt(tmp_path, job(1, SLURM_STEP_ID="1"), 3):  # the next srun of the script
            pass
        noted = read_attempts(tmp_path)
        write_attempts(tmp_path, [*noted, replace(killed, host="node2", job=job().whose, turn=[1, 2])])
        with pytest.raises(ValueError, match="begun on node2"), attempt(tmp_path, job(1, SLURM_STEP_ID="3"), 3):
            pass
    # that node comes back, and what it notes is noted where it belongs
    assert [(each.reached, each.how) for each in read_attempts(tmp_path)] == [
        (3, ""),
        (57, DONE),
        (None, "RuntimeError: x"),
        (None, DONE),
        (None, ""),
    ]


@pytest.mark.usefixtures("in_job")
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("restart", [0, 1])
def test_two_sruns_of_a_job_are_not_at_one_run_at_once(holding: Holding, named: bool, restart: int) -> None:
    first, second = job(restart), job(restart, SLURM_STEP_ID="1", SLURM_SRUN_COMM_PORT="2")
    folder = Path("outputs/slurm/b7-7")
    write_attempts(folder, [ended(None)])
    if restart:
        write_attempts(folder, [replace(ended(None), ended=None)])  # killed
    with holding(folder, first):
        running = read_attempts(folder)
        told = f"begun on {re.escape(running[-1].host)} at {re.escape(running[-1].began)} UTC: end it"
        with pytest.raises(ValueError, match=told), attempt(folder if named else folder_of(second), second, 3):
            pass
        assert read_attempts(folder) == running
        assert (running[-1].reached, running[-1].ended) == (57, None)
    assert [(list(each.turn), each.how) for each in read_attempts(folder)[1:]] == [([restart, 0], DONE)]
    assert folder_of(second) == folder  # one after the other they may be
    with attempt(folder, second, 3):
        pass
    assert [(list(each.turn), each.how) for each in read_attempts(folder)[2:]] == [([restart, 1], DONE)]


@pytest.mark.usefixtures("in_job")
def test_a_second_srun_goes_on_after_one_that_was_killed() -> None:
    context = multiprocessing.get_context("forkserver")
    held, go = context.Event(), context.Event()
    folder, second = Path("outputs/slurm/b7-7"), job(SLURM_STEP_ID="1")
    other = context.Process(target=hold, args=(folder.absolute(), job(), held, go))
    other.start()
    assert held.wait(60)
    other.kill()
    other.join()
    with attempt(folder_of(second), second, 3):
        pass
    assert [(each.reached, each.told()) for each in read_attempts(folder)] == [(57, "killed"), (None, DONE)]


@pytest.mark.usefixtures("in_job")
def test_a_run_is_another_processs_no_more_once_its_settings_have_failed(holding: Holding) -> None:
    folder = folder_of(job())
    end_unsettled(folder, "ValueError: x")
    with holding(folder, None):
        pass
    assert [each.how for each in read_attempts(folder)] == ["no settings, ValueError: x", DONE]


@pytest.mark.parametrize("steps", [b"\0" * 15, b"10", b"", b"10 4\0\0", b"\xff\xfe 1", b"1 2 3"])
def test_damaged_steps_are_unknown(tmp_path: Path, steps: bytes) -> None:
    begin(tmp_path, job())
    (tmp_path / "steps.txt").write_bytes(steps)
    assert [(each.first_step, each.reached) for each in read_attempts(tmp_path)] == [(None, None)]
    heart, trainer = Heartbeat(tmp_path), SimpleNamespace(global_step=7)
    heart.on_train_start(trainer, None)  # type: ignore[arg-type]
    heart.on_train_end(trainer, None)  # type: ignore[arg-type]
    assert [(each.first_step, each.reached) for each in read_attempts(tmp_path)] == [(7, 7)]
    (tmp_path / "steps.txt").write_bytes(steps)
    begin(tmp_path, job(1))
    assert [each.reached for each in read_attempts(tmp_path)] == [None, None]


@pytest.mark.parametrize(
    ("reached", "count"),
    [([57], 1), ([57, 57], 2), ([57, 50, 57], 3), ([57, 58], 1), ([57, 57, 58, 58], 2), ([None, None], 2), ([], 0)],
)
def test_failures_count_from_where_the_run_last_came_further(reached: list[int | None], count: int) -> None:
    assert len(failures([ended(step) for step in reached])) == count


def test_a_stop_is_no_failure_and_forgives_none() -> None:
    tries = [ended(57), ended(20, "REQUEUE"), ended(57, "RuntimeError: x"), ended(57, "END")]
    assert [each.told() for each in failures(tries)] == ["killed", "RuntimeError: x"]
    assert not failures([*tries, ended(58, "REQUEUE")])


@pytest.mark.parametrize(
    ("attempts", "status", "yes", "says"),
    [
        ([], 1, False, "did not begin"),
        ([ended(None, "killed by SIGUSR1")], 138, True, "failure 1 of at most 3 before training: killed by SIGUSR1"),
        ([ended(None, most_failures=2), ended(None)], 138, False, "2 attempts in a row ended before training"),
        ([ended(57, "REQUEUE")], 75, True, r"stopped at step 57 \(REQUEUE\)"),
        ([ended(None, "REQUEUE")], 75, True, "before training"),
        ([ended(57, "END")], 143, True, "END"),
        ([ended(57, "INTERRUPT")], 130, False, "INTERRUPT"),
        ([ended(57, "REQUEUE")] * 10, 75, True, "at step 57"),
        ([ended(57, "REQUEUE")] * 11, 75, False, "10 starts in a row came no further; give more time"),
        ([ended(None, "REQUEUE")] * 10, 75, False, "10 starts in a row"),
        ([*[ended(57, "REQUEUE")] * 10, ended(58, "REQUEUE")], 75, True, "at step 58"),
        ([ended(57, DONE)], 1, False, "is done"),
        ([ended(None, "ValueError: x", for_good=True)], 1, False, "would fail again: ValueError: x"),
        ([ended(57, most_failures=3)], 137, True, "failure 1 of at most 3 at step 57: killed"),
        ([ended(57), ended(57), ended(56, most_failures=3)], 137, False, "3 attempts in a row ended at step 57 or"),
        ([ended(None), ended(None, most_failures=2)], 1, False, "2 attempts in a row ended before training"),
    ],
)
def test_again(attempts: list[Attempt], status: int, yes: bool, says: str) -> None:
    told, why = again.verdict(attempts, status, job())
    assert told == yes
    assert re.search(says, why)


def test_the_last_word_in_the_log(
    in_job: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = folder_of(job())
    with pytest.raises(SystemExit), attempt(folder, job(), 3):
        raise SystemExit(75)
    with pytest.raises(SystemExit) as end:
        again.main(["75", "experiment=tiny", "resume=auto"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("again: yes, stopped before training (REQUEUE); run folder outputs/slurm")
    in_job(1)
    with pytest.raises(SystemExit) as end:
        again.main(["1", "experiment=tiny"])
    assert end.value.code == 1
    assert "again: no, the run did not begin" in capsys.readouterr().out
    with attempt(tmp_path / "own", job(1), 3):
        pass
    with pytest.raises(SystemExit) as end:
        again.main(["1", f"hydra.run.dir={tmp_path / 'own'}"])
    assert "the run is done; run folder" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="usage"):
        again.main(["failed"])


@pytest.mark.parametrize("named", [[], ["hydra.run.dir=own"]])
def test_starts_that_sigusr1_killed_before_python_are_counted(
    in_job: Callable[..., None], named: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    ends = []
    for restart in range(3):
        in_job(restart)
        with pytest.raises(SystemExit) as end:
            again.main(["138", "resume=auto", *named])
        ends.append(end.value.code)
    assert ends == [0, 0, 1]
    assert "again: no, 3 attempts in a row ended before training began (killed by SIGUSR1" in capsys.readouterr().out


def test_an_error_is_not_replaced_by_the_full_disk_that_keeps_it_from_being_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    def trained() -> None:
        monkeypatch.setattr("align_train.cli.attempts.write_attempts", full)
        raise RuntimeError("first")

    with pytest.raises(RuntimeError, match="first"), attempt(tmp_path, None, 3):
        trained()
    assert "No space left on device" in caplog.text


@pytest.mark.usefixtures("in_job")
def test_without_srun_a_first_start_takes_no_folder_for_its_own() -> None:
    alone = job(SLURM_SRUN_COMM_PORT="")
    assert folder_of(alone) == Path("outputs/slurm/b7-7")
    assert folder_of(alone) == Path("outputs/slurm/b7-7-2")  # a job of the same id, after Slurm's records were wiped
    assert folder_of(job(1, SLURM_SRUN_COMM_PORT="")) == Path("outputs/slurm/b7-7-2")


def test_without_srun_further_processes_need_the_folder(in_job: Callable[..., None]) -> None:
    in_job(SLURM_PROCID="1")
    with pytest.raises(ValueError, match=r"job 7 share no srun .* give hydra\.run\.dir"):
        folder_of(job(SLURM_SRUN_COMM_PORT=""))


@pytest.mark.usefixtures("in_job")
def test_a_look_at_the_folder_notes_nothing() -> None:
    assert folder_of(job(), looks=True) == Path("outputs/slurm/b7-7")
    assert not Path("outputs").exists()


@pytest.mark.usefixtures("in_job")
@pytest.mark.parametrize(
    ("name", "folder"),
    [("a/b", "a_b-7"), ("${x}", "__x_-7"), ("é 1", "é_1-7"), ('"\\', "__-7"), ("lr=0.1", "lr=0.1-7")],
)
def test_a_jobs_name_becomes_that_of_a_folder(name: str, folder: str) -> None:
    assert folder_of(job(SLURM_JOB_NAME=name), looks=True) == Path("outputs/slurm") / folder


@pytest.mark.usefixtures("in_job")
def test_a_job_has_one_folder_at_each_of_its_starts() -> None:
    assert folder_of(job()) == Path("outputs/slurm/b7-7")
    assert folder_of(job(1)) == Path("outputs/slurm/b7-7")
    assert folder_of(job(1)) == Path("outputs/slurm/b7-7")  # another process of the same start
    assert len(read_attempts(Path("outputs/slurm/b7-7"))) == 2
    assert last_folder(job(1)) == Path("outputs/slurm/b7-7")
    assert last_folder(job(2)) is None


@pytest.mark.usefixtures("in_job")
@pytest.mark.parametrize("facts", [{}, {"SLURM_CLUSTER_NAME": "other"}, {"SLURM_JOB_USER": "you"}])
def test_a_stranger_with_the_same_id_has_another_folder(facts: dict[str, str]) -> None:
    """Job ids come again: with the same name and user, the first start of the second job says that it is another."""
    folder_of(job())
    folder_of(job(1))
    facts = {**facts, "SLURM_SRUN_COMM_PORT": "9"}
    assert folder_of(job(0, **facts)) == Path("outputs/slurm/b7-7-2")
    assert folder_of(job(1, **facts)) == Path("outputs/slurm/b7-7-2")
    assert len(read_attempts(Path("outputs/slurm/b7-7"))) == 2


def test_a_rank_does_not_take_a_strangers_folder_for_that_of_its_first(
    in_job: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the stranger had the same turn, and the first process has not come to note this one."""
    folder_of(job(1, SLURM_SRUN_COMM_PORT="1111"))
    in_job(1, SLURM_PROCID="1")
    mine = job(1, SLURM_SRUN_COMM_PORT="2222")
    monkeypatch.setattr("align_train.processes.time.sleep", lambda seconds: begin(Path("outputs/slurm/b7-7-2"), mine))
    assert folder_of(mine) == Path("outputs/slurm/b7-7-2")


@pytest.mark.usefixtures("in_job")
def test_a_folder_that_nobody_noted_anything_in_is_no_jobs() -> None:
    Path("outputs/slurm/b7-7").mkdir(parents=True)
    assert folder_of(job(3)) == Path("outputs/slurm/b7-7-2")


@pytest.mark.usefixtures("in_job")
def test_a_job_that_slurm_itself_queues_again_ends_after_as_many_failures(tmp_path: Path) -> None:
    for restart in range(2):
        begin(tmp_path, job(restart))  # and the node is gone
    with attempt(tmp_path, job(2), 3), (tmp_path / "steps.txt").open("w") as file:
        file.write("0 5")
    for restart in range(3, 6):
        begin(tmp_path, job(restart))
    with (
        pytest.raises(ValueError, match=r"3 attempts .*before training began .*failures=3"),
        attempt(tmp_path, job(6), 3),
    ):
        pass
    with attempt(tmp_path, job(0, SLURM_JOB_ID="8"), 3):  # another job tries anew
        pass


def test_other_ranks_note_nothing(in_job: Callable[..., None], tmp_path: Path) -> None:
    in_job(SLURM_PROCID="1")
    with attempt(tmp_path / "run", job(), 3):
        pass
    assert not (tmp_path / "run").exists()


def test_the_heartbeat_says_where_training_began_and_where_it_is(tmp_path: Path) -> None:
    class Trainer:
        global_step = 1000

    trainer, heart = Trainer(), Heartbeat(tmp_path)
    heart.on_train_start(trainer, None)  # type: ignore[arg-type]
    trainer.global_step = 1001
    heart.on_train_batch_end(trainer, None, None, None, 0)  # type: ignore[arg-type]
    begun = [Attempt("", "", 0)]
    write_attempts(tmp_path, begun)
    assert (read_attempts(tmp_path)[0].first_step, read_attempts(tmp_path)[0].reached) == (1000, 1001)
    heart.on_exception(trainer, None, ValueError())  # type: ignore[arg-type]
    trainer.global_step = 900  # back to a checkpoint, with a new trainer
    heart = Heartbeat(tmp_path)
    heart.on_train_start(trainer, None)  # type: ignore[arg-type]
    assert (read_attempts(tmp_path)[0].first_step, read_attempts(tmp_path)[0].reached) == (1000, 1001)
    for step, furthest in ((1001, 1001), (1002, 1002)):
        trainer.global_step = step
        heart.on_train_batch_end(trainer, None, None, None, 0)  # type: ignore[arg-type]
        assert read_attempts(tmp_path)[0].reached == furthest
    heart.on_train_end(trainer, None)  # type: ignore[arg-type]
    assert json.loads((tmp_path / "attempts.json").read_text())[0]["reached"] is None
