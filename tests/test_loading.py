"""Processes and threads give the same batches; what stalls is named; what ends leaves nothing behind."""

import gc
import multiprocessing
import os
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import pytest
import torch
from conftest import drawn_image
from reading import NONE, SMALL, batches, order_of, pair_members, sources, write_tar

from align_train.data import BatchPlans, Loader, PairReader, Reading, Steps
from align_train.data.crew import Crew
from align_train.data.loading import on_device
from align_train.data.storage.cache import Cache


def reading(**given):
    return Reading(**{"stall_seconds": 60.0, "max_quarantined": 1.0, "cache": Cache("unused"), **given})


@pytest.fixture
def broken(tmp_path):
    """Twelve pairs of which number 3 is an HTML page and number 7 a truncated image."""
    images = {3: b"<html>404</html>", 7: drawn_image(7)[:-300]}
    return write_tar(tmp_path / "broken.tar", [m for n in range(12) for m in pair_members(n, images.get(n))])


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on a machine with one core
@pytest.mark.parametrize("use", ["processes", "threads"])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_do_not_change_the_batches(broken, use, workers):
    alone = batches(sources(pairs=broken))
    others = batches(sources(pairs=broken), workers=workers, reading=reading(use=use, prefetch=2))
    for one, other in zip(alone, others, strict=True):
        assert one.keys == other.keys
        assert one.dropped == other.dropped
        assert one.bytes == other.bytes
        assert torch.equal(one.pixels, other.pixels)
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.attention_mask, other.attention_mask)


@pytest.mark.parametrize("workers", [0, 2])
def test_threads_read_only_so_far_ahead(make_shards, monkeypatch, workers):
    asked = []
    read = Crew.submit
    monkeypatch.setattr(Crew, "submit", lambda crew, f, *a: (asked.append(f.__name__), read(crew, f, *a))[1])
    found = batches(
        sources(pairs=make_shards(32)), steps=20, workers=workers, reading=reading(use="threads", prefetch=3)
    )
    for used in range(1, 4):
        next(found)
        assert asked.count("read") == used + workers * 3


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("use", ["processes", "threads"])
def test_a_shard_that_stalls_as_it_is_opened_is_named(tmp_path, use, workers):
    pipe = tmp_path / "stalls.tar"
    os.mkfifo(pipe)  # opening it waits for a writer that never comes
    found = batches(sources(pairs=pipe), workers=workers, reading=reading(use=use, stall_seconds=0.2))
    with pytest.raises(
        TimeoutError, match=r"stalls\.tar did not answer for 0\.2 seconds.*data\.reading\.stall_seconds"
    ):
        next(found)
    os.close(os.open(pipe, os.O_RDWR | os.O_NONBLOCK))  # let the thread go


@pytest.mark.parametrize(("use", "workers"), [("threads", 0), ("threads", 2), ("processes", 1)])
def test_a_shard_that_stalls_as_it_is_read_is_named(make_shards, monkeypatch, use, workers):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)  # how long a worker may take to end
    folder = make_shards(16)
    tar, read = folder / "00000.tar", sources(pairs=folder)
    plans = BatchPlans(order_of(read), 4, 0, 4)
    planned = list(plans)
    monkeypatch.setattr(BatchPlans, "__iter__", lambda plans: iter(planned))  # made while the tar was there
    tar.unlink()
    os.mkfifo(tar)
    loader = Loader(PairReader(read, SMALL, NONE), plans, workers, reading(use=use, stall_seconds=1.0))
    with pytest.raises(TimeoutError, match=r"no batch for 1 seconds: no answer from .*00000\.tar\. Check its disk"):
        list(loader)
    os.close(os.open(tar, os.O_RDWR | os.O_NONBLOCK))  # let the threads go


@pytest.mark.parametrize(
    ("workers", "prefetch", "parts", "expected"), [(1, 4, 1, 4), (1, 4, 8, 8), (3, 2, 8, 3), (0, 1, 8, 8)]
)
def test_at_least_a_step_is_read_ahead(make_shards, workers, prefetch, parts, expected):
    read = sources(pairs=make_shards(16))
    plans = BatchPlans(order_of(read), 8, 0, 4, parts=parts)
    loader = Loader(PairReader(read, SMALL, NONE), plans, workers, reading(prefetch=prefetch))
    assert loader._prefetch == expected


def test_a_worker_that_dies_is_an_error(make_shards):
    found = batches(sources(pairs=make_shards(32)), steps=40, workers=1, reading=reading(prefetch=1, stall_seconds=5))
    before = set(multiprocessing.active_children())
    next(found)
    (worker,) = set(multiprocessing.active_children()) - before
    worker.kill()
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        list(found)


def test_what_is_left_early_leaves_no_thread(make_shards):
    before = set(threading.enumerate())
    found = batches(sources(pairs=make_shards(32)), steps=40, workers=3, reading=reading(use="threads"))
    next(found)
    crews = set(threading.enumerate()) - before
    assert crews
    found.close()
    del found
    for thread in crews:
        thread.join(5)
    assert not any(thread.is_alive() for thread in crews)


SCRIPT = """
import sys
from itertools import islice
from align_train.data import Reading
from reading import batches, sources

found = batches(sources(pairs=sys.argv[1]), steps=200, workers=2, reading=Reading(use=sys.argv[2]))
print(len(list(islice(found, 3))))
"""


@pytest.mark.parametrize("use", ["threads", "processes"])
def test_a_script_that_takes_three_and_ends_does_end(make_shards, use):
    """Python ends threads in the middle of their work, and those in C++ would abort the process."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", SCRIPT, str(make_shards(64)), use]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\n", "")


def test_an_error_of_a_thread_is_raised(tmp_path):
    path = write_tar(tmp_path / "a.tar", [member for n in range(3) for member in pair_members(n, b"<html>")])
    found = batches(sources(pairs=path), batch_size=2, workers=1, reading=reading(use="threads", prefetch=1))
    with pytest.raises(ValueError, match="pairs stood in for unusable ones among 2"):
        next(found)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"use": "fibres"}, r"data\.reading\.use is 'fibres': choose processes or threads"),
        ({"prefetch": 0}, r"data\.reading\.prefetch is 0"),
        ({"keep_decoded": -1}, r"data\.reading\.keep_decoded is -1"),
        ({"stall_seconds": 0}, r"data\.reading\.stall_seconds is 0"),
        ({"max_quarantined": 1.5}, r"data\.reading\.max_quarantined is 1\.5"),
    ],
)
def test_wrong_settings_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        reading(**given)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux's /proc")
@pytest.mark.parametrize(("use", "workers"), [("threads", 0), ("threads", 2)])
def test_nothing_is_kept_from_epoch_to_epoch(make_shards, use, workers):
    """Neither memory nor threads nor files; resident memory is measured by benchmarks/loader/memory.py."""
    found = batches(
        sources(pairs=make_shards(256, 16)), batch_size=32, steps=80, workers=workers, shuffle_shards=4,
        reading=reading(use=use, prefetch=1),
    )  # fmt: skip
    held = []
    for number, _ in enumerate(found):
        if number % 8 == 7:  # an epoch is over
            gc.collect()
            held.append(
                (tracemalloc.get_traced_memory()[0], threading.active_count(), len(os.listdir("/proc/self/fd")))
            )
        if number == 7:
            tracemalloc.start()
    tracemalloc.stop()
    memory, threads, files = zip(*held[2:], strict=True)
    assert max(memory) - memory[0] < 200_000  # a window's index is 64 pairs of about 150 bytes
    assert threads[-1] <= threads[2]
    assert max(files) <= files[0] + 8  # a window that is being opened; an epoch reads 16 files


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("use", ["processes", "threads"])
def test_batches_on_a_gpu_are_those_of_the_cpu(make_shards, use):
    folder = make_shards(32)
    device = torch.device("cuda", torch.cuda.current_device())
    plain = list(batches(sources(pairs=folder)))
    moved = list(on_device(batches(sources(pairs=folder), workers=2, reading=reading(use=use)), device))
    for one, other in zip(plain, moved, strict=True):
        assert other.pixels.device == device
        assert torch.equal(one.pixels, other.pixels.cpu())
        assert torch.equal(one.input_ids, other.input_ids.cpu())
        assert one.keys == other.keys


def test_steps_measure_the_fetching_of_their_parts_and_not_their_use(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("align_train.data.loading.perf_counter", lambda: now[0])

    def slow():
        for name in range(5):
            now[0] += 2.0
            yield name

    steps = Steps(slow(), parts=2)
    waited = []
    for step in steps:
        waited.append((len(step.parts), steps.waited))
        now[0] += 100.0
    assert waited == [(2, 4.0), (2, 8.0), (1, 10.0)]


def test_a_crew_passes_on_all_arguments():
    assert Crew(1).submit(sorted, [1, 3, 2], reverse=True).result(10) == [3, 2, 1]
