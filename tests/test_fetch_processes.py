"""Fetching in processes that are killed, interrupted, not alone or out of disk space: in the end the same files."""

import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from fetching import job_of, run_here, state

from align_train.corpus.fetch.commit import claimed, task_files
from align_train.corpus.images import ImageSettings

pytest_plugins = ["bad_server"]

RUN = "import pickle, sys; from align_train.corpus.fetch import run_job; run_job(pickle.load(sys.stdin.buffer))"


@pytest.fixture
def gate(bad_server, monkeypatch):
    """/gated/7.jpg is /ok/7.jpg as soon as `gate.open` is set; each request for it releases `gate.waiting` once."""

    class Gate:
        open, waiting = threading.Event(), threading.Semaphore(0)

        def wait(self, count):
            for _ in range(count):
                assert self.waiting.acquire(timeout=60)

    def answer_gated(handler, name):
        Gate.waiting.release()
        Gate.open.wait()
        handler.answer_ok(name)

    monkeypatch.setattr(bad_server.RequestHandlerClass, "answer_gated", answer_gated, raising=False)
    yield Gate()
    Gate.open.set()  # before the server waits for its threads


@pytest.fixture
def start():
    """Start a command in a process group of its own; what is left of it at the end is killed."""
    started = []

    def begin(words, given=b""):
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        # A test run in the background ignores Ctrl-C, and what it starts would too.
        heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        process = subprocess.Popen(words, **pipes, start_new_session=True, preexec_fn=heeding)  # noqa: PLW1509
        started.append(process)
        process.stdin.write(given)
        process.stdin.flush()
        return process

    yield begin
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def start_job(start, job):
    return start([sys.executable, "-c", RUN], pickle.dumps(job))


def start_command(start, job):
    """The same by the command line."""
    settings = job.settings
    return start(
        [
            *(sys.executable, "-m", "align_train", "prepare", "source=coyo", "source.steps=[fetch]", "rules=none"),
            *(f"source.folder={job.shards.parent}", "source.metadata=none", f"hydra.run.dir={job.shards.parent}/log"),
            f"source.fetch.rows_per_task={settings.rows_per_task}",
            f"source.fetch.processes={settings.processes}",
            f"source.fetch.permissions.networks={list(settings.permissions.networks)}".replace("'", ""),
            *(f"source.fetch.images.{name}={value}" for name, value in vars(settings.images).items()),
        ]
    )


def ended(process):
    """Exit code and what it said, once it and every process that it started is gone: all hold the pipe."""
    _, said = process.communicate(timeout=60)
    return process.returncode, said.decode()


def workers(process):
    """The processes that it started to fetch."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.fixture
def halted(bad_server, gate, tmp_path):
    """A job of 6 tasks and what it comes to. Its links 7 and 10, in tasks 2 and 3, are answered when the gate opens."""
    urls = [f"{bad_server.url}/{'gated' if n in (7, 10) else 'ok'}/{n}.jpg" for n in range(17)]
    gate.open.set()
    done = state(run_here(job_of(tmp_path / "whole", urls)))
    gate.wait(2)
    gate.open.clear()
    bad_server.hits.clear()
    return job_of(tmp_path / "job", urls, processes=2), done


def finished(job):
    return [index for index in range(job.tasks) if job.finished(index)]


# Killed


@pytest.mark.parametrize("everyone", [True, False], ids=["with its workers", "alone"])
def test_killed_in_the_middle_and_started_again_nothing_is_lost_or_fetched_twice(
    start, gate, bad_server, halted, everyone
):
    job, done = halted
    process = start_job(start, job)
    gate.wait(2)  # both workers are in the middle of a task
    again = {f"/{'gated' if n in (7, 10) else 'ok'}/{n}.jpg" for n in range(6, 12)}
    bad_server.wait_for(again)  # and have asked for all of it
    assert len(workers(process)) == 2
    if everyone:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    assert ended(process)[0] == -signal.SIGKILL  # workers that live on would hold its pipes
    assert finished(job) == [0, 1]
    assert {index for index, path in task_files(job.shards) if path.name.startswith(".")} == {2, 3}
    for index in range(6):
        with claimed(job.shards / f"{index:05d}") as ours:
            assert ours
    gate.open.set()
    assert ended(start_job(start, job))[0] == 0 if everyone else run_here(job)
    assert state(job) == done
    assert {path for path, hits in bad_server.hits.items() if hits == 2} == again & {*bad_server.hits}
    assert bad_server.hits.total() <= 17 + 6


def test_killed_at_any_step_a_retry_leaves_the_old_shard_or_the_new(bad_server, start, tmp_path):
    job = job_of(tmp_path / "base", [f"{bad_server.url}/{path}" for path in ("ok/1.jpg", "404-then-ok", "404")])
    run_here(job)  # with a failure that another attempt mends
    shutil.copytree(tmp_path / "base", tmp_path / "new")
    old, new = state(job), state(run_here(job_of(tmp_path / "new", retry_failed=True)))
    code, said = ended(start([sys.executable, "-c", KILLED, str(tmp_path)], pickle.dumps(job)))
    assert code == 0, said
    folders = list(tmp_path.glob("killed-*"))
    assert len(folders) == 13  # three files flushed and staged, three renamed, the folder flushed four times
    for folder in folders:
        job = job_of(folder, retry_failed=True)
        job.begin(False)
        assert state(job) in (old, new)
        assert state(run_here(job)) == new


# In a process without threads, so that it may fork: attempts that are killed at their first, second ... step.
KILLED = """
import itertools, os, pickle, shutil, signal, sys
import pandas  # as pyarrow does when it first writes a table, which would be in every child
from pathlib import Path
from align_train.corpus.fetch import Job

job, tmp = pickle.load(sys.stdin.buffer), Path(sys.argv[1])
for fatal in itertools.count():
    folder = tmp / f"killed-{fatal}"
    shutil.copytree(job.shards.parent, folder)
    if child := os.fork():
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            shutil.rmtree(folder)
            break
        continue
    steps = itertools.count()

    def checked(call):
        def instead(*given):
            if next(steps) == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*given)
        return instead

    os.fsync, os.replace = checked(os.fsync), checked(os.replace)
    Job(folder / "selected", folder / "shards", job.settings).task(0).run(retry=True)
    os._exit(0)
"""


def test_a_killed_worker_ends_the_job_with_a_message(start, gate, halted):
    job, done = halted
    process = start_command(start, job)
    gate.wait(2)
    os.kill(workers(process)[0], signal.SIGKILL)
    code, said = ended(process)
    assert code == 1
    assert re.search(r"OSError: a process that fetches ended with exit code -9; .* killed, .*processes", said)
    assert "Traceback" not in said
    gate.open.set()
    assert state(run_here(job)) == done


def test_ctrl_c_ends_the_job_and_its_workers_at_once(start, gate, halted):
    job, done = halted
    process = start_command(start, job)
    gate.wait(2)
    os.killpg(process.pid, signal.SIGINT)
    code, said = ended(process)
    assert code in (130, -signal.SIGINT)
    assert said.count("Traceback") <= 1  # of the parent alone
    gate.open.set()
    assert state(run_here(job)) == done


# Not alone


def test_two_processes_at_one_folder_do_each_task_once(start, gate, bad_server, halted):
    job, done = halted
    first = start_job(start, job)
    gate.wait(2)
    code, said = ended(start_job(start, job))  # does what is left and ends, though the first still waits
    assert (code, finished(job)) == (0, [0, 1, 4, 5])
    assert "2 tasks are being worked on by other processes, such as 00002" in said
    with claimed(job.shards / "00002") as ours:
        assert not ours
    gate.open.set()
    assert ended(first)[0] == 0
    assert state(job) == done
    assert set(bad_server.hits.values()) == {1}
    assert bad_server.hits.total() == 17


def test_a_job_at_work_is_not_replaced(start, gate, halted):
    job, _ = halted
    first = start_job(start, job)
    gate.wait(2)
    before = set(state(job))
    other = job_of(job.shards.parent, images=ImageSettings(size=17))
    with pytest.raises(ValueError, match=r"other processes are fetching into .*: end them"):
        other.begin(overwrite=True)
    assert set(state(job)) == before
    os.killpg(first.pid, signal.SIGKILL)
    ended(first)
    other.begin(overwrite=True)
    assert state(other) == {}


HOLD = """
import sys
from pathlib import Path
from align_train.corpus.fetch.commit import alone

with alone(Path(sys.argv[1])):
    print("alone", flush=True)
    sys.stdin.read(1)
"""


def test_jobs_that_begin_at_once_wait_for_each_other(start, tmp_path):
    job = job_of(tmp_path, ["missing:"])
    holder = start([sys.executable, "-c", HOLD, str(job.shards)])
    assert holder.stdout.readline() == b"alone\n"
    beginning = threading.Thread(target=job.begin, args=(False,))
    beginning.start()
    beginning.join(0.1)
    assert not (job.shards / "job.json").exists()
    ended(holder)  # its input ends
    beginning.join(60)
    assert (job.shards / "job.json").exists()


# Full


def test_a_disk_that_is_full_ends_the_job_and_with_room_it_goes_on(bad_server, start, tmp_path):
    urls = [f"{bad_server.url}/photo/320x240/{n}.jpg" for n in range(12)]
    images = ImageSettings(mode="original", reencode=False)
    whole = run_here(job_of(tmp_path / "whole", urls, images=images))
    size = sum(path.stat().st_size for path in whole.shards.iterdir()) // 2048
    job = job_of(tmp_path / "job", urls, images=images, processes=1)
    job.shards.mkdir()
    probe = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(job.shards)]
    if not shutil.which("unshare") or subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("no disk of its own can be mounted here")
    command = start_command(lambda words: words, job)
    script = f"""
        mount -t tmpfs -o size={size}k none {job.shards}
        "$@" 2> {tmp_path}/said; echo $? > {tmp_path}/code
        cp -a {job.shards} {tmp_path}/full
        mount -o remount,size=100m {job.shards}
        "$@"; echo $? >> {tmp_path}/code
        cp -a {job.shards} {tmp_path}/after
    """
    subprocess.run(["unshare", "-rm", "sh", "-c", script, "sh", *command], capture_output=True, check=True)
    said = (tmp_path / "said").read_text()
    assert re.search(r"prepare: OSError: \S+shards takes no more \(No space left on device\): make room", said)
    assert said.count("Error") == 1
    assert (tmp_path / "code").read_text().split() == ["1", "0"]
    full, done = state(replace(job, shards=tmp_path / "full")), state(whole)
    assert 0 < len(full) < len(done)
    assert full.items() <= done.items()
    assert state(replace(job, shards=tmp_path / "after")) == done
