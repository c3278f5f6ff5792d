"""Local copies of remote files: whole or not there, downloaded once, bounded, and a stalled source is named."""

import errno
import fcntl
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from align_train.data.storage.cache import Cache, copy_name

pytest_plugins = ["bad_server"]
processes = multiprocessing.get_context("fork")
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

CONTENT = bytes(range(256)) * 4
SECRET = "hunter2"
LEDGER = ".align-train-cache"


class OddAnswers:
    """What bad_server has not: the same content for all, and answers that change from one request to the next."""

    def answer_ok(self, _):
        self.send(CONTENT)

    def answer_half_first(self):
        if self.server.hits["/half-first"] > 1:
            return self.send(CONTENT)
        self.begin(Content_Length=len(CONTENT))
        self.wfile.write(CONTENT[:100])
        self.server.half_sent.set()
        self.server.stopping.wait()

    def answer_never_first(self):
        return self.send(CONTENT) if self.server.hits["/never-first"] > 1 else self.answer_never()

    def answer_half(self):
        self.begin(Content_Length=len(CONTENT))
        self.wfile.write(CONTENT[:100])
        self.connection.recv(1)
        self.server.hung_up.set()

    def answer_slowly(self):
        self.begin(Content_Length=12)
        for _ in range(12):
            self.wfile.write(b"x")
            self.server.stopping.wait(0.06)


@pytest.fixture
def server(bad_server):
    bad_server.RequestHandlerClass = type("Odd", (OddAnswers, bad_server.RequestHandlerClass), {})
    bad_server.half_sent, bad_server.hung_up = threading.Event(), threading.Event()
    return bad_server


@pytest.fixture
def memory():
    """fsspec's store in memory: memory://bucket/0.tar to 9.tar, of 1000 bytes each."""
    store = fsspec.filesystem("memory")
    for number in range(10):
        store.pipe(f"/bucket/{number}.tar", bytes([number]) * 1000)
    yield store
    store.rm("/bucket", recursive=True)


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache", stall_seconds=6)


def names(cache):
    """What is in the folder, but for the ledger."""
    return sorted(name for name in os.listdir(cache.folder) if name != LEDGER)


def age(path, seconds):
    os.utime(path, (time.time() - seconds,) * 2)


def noted(cache):
    return int((cache.folder / LEDGER).read_text())


# Copies


def test_a_local_address_comes_back_and_no_folder_is_made(cache, tmp_path):
    assert cache.path("/a/0.tar") == cache.path("file:///a/0.tar") == Path("/a/0.tar")
    assert cache.optional("/a/0.tar") is None
    assert cache.optional(f"file://{tmp_path}") == tmp_path
    assert not cache.folder.exists()


def test_a_file_is_downloaded_once_and_nothing_else_is_left(cache, server):
    path = cache.path(f"{server.url}/ok/1.jpg")
    assert path.read_bytes() == CONTENT
    assert pickle.loads(pickle.dumps(cache)).path(f"{server.url}/ok/1.jpg") == path  # noqa: S301
    assert server.hits["/ok/1.jpg"] == 1
    assert names(cache) == [path.name]
    assert noted(cache) == len(CONTENT)


def test_a_copy_is_on_the_disk_before_it_gets_its_name(cache, memory, monkeypatch):
    there, fsync = [], os.fsync

    def look(descriptor):
        there.append(os.fstat(descriptor).st_size)
        assert copy_name("memory://bucket/1.tar") not in names(cache)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", look)
    cache.path("memory://bucket/1.tar")
    assert there == [1000]


def test_names_of_copies_hold_no_secrets(cache, server):
    address = f"http://me:{SECRET}@{server.url[7:]}/ok/1.jpg?X-Amz-Signature={SECRET}"
    assert cache.path(address).name.endswith("-1.jpg")
    assert SECRET not in "".join([copy_name(address), copy_name(f"http://me:{SECRET}@host"), *names(cache)])


def test_any_store_of_fsspec_will_do(cache, memory):
    assert cache.path("memory://bucket/7.tar").read_bytes() == b"\7" * 1000
    memory.rm("/bucket/7.tar")
    assert cache.path("memory://bucket/7.tar").read_bytes() == b"\7" * 1000


def test_names_of_copies_are_readable_and_differ_where_addresses_do():
    addresses = ["s3://b/x/00012.tar", "s3://b/y/00012.tar", "s3://b/x/00012", "s3://b/x/00012.tar?a", "s3://b/x/00012.t-r",
                 "s3://b/x/000 2.tar", "s3://b/x/000_2.tar", "s3://b/x/00012.parquet"]  # fmt: skip
    copies = list(map(copy_name, addresses))
    assert len(set(copies)) == len(addresses)
    assert copies[0].endswith("-00012.tar")
    assert copies[3].endswith("-00012.tar")
    assert Path(copies[0]).with_suffix(".parquet").name == copies[-1]  # its sidecar lies beside it
    long = copy_name("s3://b/" + "n" * 300 + ".tar")
    assert len(long) < 128
    assert long.endswith("nnn.tar")


def test_a_file_is_asked_for_unpacked(cache, server):
    cache.path(f"{server.url}/ok/1.jpg")
    assert server.headers["Accept-Encoding"] == "identity"


# Many callers


def test_threads_that_want_a_file_at_once_download_it_once(cache, server):
    same = Cache(cache.folder)
    together = threading.Barrier(8)

    def call(number):
        together.wait()
        return (cache if number % 2 else same).path(f"{server.url}/late/100/1.jpg")

    with ThreadPoolExecutor(8) as threads:
        paths = set(threads.map(call, range(8)))
    assert server.hits["/late/100/1.jpg"] == 1
    assert [path.read_bytes() for path in paths] == [CONTENT]


@forks
def test_processes_that_want_a_file_at_once_download_it_once(cache, server):
    together = processes.Barrier(3)

    def call():
        together.wait()
        assert cache.path(f"{server.url}/late/100/1.jpg").read_bytes() == CONTENT

    callers = [processes.Process(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert [caller.exitcode for caller in callers] == [0, 0, 0]
    assert server.hits["/late/100/1.jpg"] == 1
    assert len(names(cache)) == 1


@forks
def test_a_cache_goes_on_in_a_forked_process(cache, server):
    cache.path(f"{server.url}/ok/2.jpg")  # the event loop and the session are the parent's

    def call():
        assert cache.path(f"{server.url}/ok/2.jpg").is_file()
        assert cache.path(f"{server.url}/ok/1.jpg").read_bytes() == CONTENT

    child = processes.Process(target=call)
    child.start()
    child.join()
    assert child.exitcode == 0
    assert cache.path(f"{server.url}/ok/3.jpg").is_file()


@forks
def test_after_a_kill_in_the_middle_the_next_caller_gets_the_whole_file(cache, server):
    address = f"{server.url}/half-first"
    child = processes.Process(target=cache.path, args=[address])
    child.start()
    assert server.half_sent.wait(30)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    copy = cache.folder / copy_name(address)
    assert f".{copy.name}.lock" in names(cache)
    assert not copy.exists()
    assert cache.path(address).read_bytes() == CONTENT
    assert names(cache) == [copy.name]


@pytest.mark.parametrize(("note", "gone"), [(None, True), ("notes.txt", False)])
def test_what_a_killed_process_left_of_a_file_goes_with_its_next_download(cache, memory, note, gone):
    copy = copy_name("memory://bucket/1.tar")
    left = note or f".{copy}.01234567.part"
    cache.folder.mkdir()
    (cache.folder / f".{copy}.lock").write_text(left)
    (cache.folder / left).touch()
    assert cache.path("memory://bucket/1.tar").stat().st_size == 1000
    assert names(cache) == sorted([copy] if gone else [copy, left])


def test_a_lock_file_that_its_owner_removed_is_no_lock(cache, memory, monkeypatch):
    lock = cache.folder / f".{copy_name('memory://bucket/1.tar')}.lock"
    flock, get_file, locked, there = fcntl.flock, MemoryFileSystem.get_file, [], []

    def after_its_owner(file, how):
        flock(file, how)
        if not locked:
            lock.unlink()
        locked.append(how)

    def look(*args, **options):
        there.append(lock.exists())
        return get_file(*args, **options)

    monkeypatch.setattr(fcntl, "flock", after_its_owner)
    monkeypatch.setattr(MemoryFileSystem, "get_file", look)
    cache.path("memory://bucket/1.tar")
    assert there == [True]


@forks
def test_a_child_forked_in_the_middle_holds_no_lock(cache, memory, monkeypatch):
    replace, children = Path.replace, []
    reading, writing = os.pipe()

    def forking(self, target):
        if not children:
            children.append(os.fork())
            if not children[0]:
                os.read(reading, 1)
                os._exit(0)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", forking)
    with ThreadPoolExecutor(1) as threads:
        try:
            assert threads.submit(cache.path, "memory://bucket/0.tar").result(10).is_file()
            assert threads.submit(cache.path, "memory://bucket/1.tar").result(10).is_file()
        finally:
            os.write(writing, b"x")
            os.waitpid(children[0], 0)
            os.close(reading)
            os.close(writing)


# What goes wrong


@pytest.mark.parametrize("path", ["/503-then-ok", "/429-then-ok", "/never-first", "/half-first"])
def test_a_passing_error_is_tried_again(tmp_path, server, path):
    cache = Cache(tmp_path, stall_seconds=1.2)
    assert cache.path(f"{server.url}{path}").read_bytes() == CONTENT
    assert server.hits[path] == 2
    assert len(names(cache)) == 1


@pytest.mark.parametrize(
    ("path", "error", "asked"),
    [
        ("/404", FileNotFoundError, 1),
        ("/410", FileNotFoundError, 1),
        ("/401", PermissionError, 1),
        ("/403", PermissionError, 1),
        ("/400", OSError, 1),
        ("/500", OSError, 2),
        ("/408", OSError, 2),
        ("/truncated", OSError, 2),
        ("/truncated-chunks", OSError, 2),
        ("/never", TimeoutError, 2),
        ("/half", TimeoutError, 2),
    ],
)
def test_an_error_is_named_without_the_secrets_of_the_address(tmp_path, server, path, error, asked):
    cache = Cache(tmp_path / "cache", stall_seconds=0.5, attempts=2)
    with pytest.raises(error) as caught:
        cache.path(f"http://me:{SECRET}@{server.url[7:]}{path}?X-Amz-Signature={SECRET}")
    assert type(caught.value) in (error, *error.__subclasses__())
    assert f"{server.url}{path}" in str(caught.value)
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    assert server.hits[path] == asked
    assert names(cache) == []


@pytest.mark.parametrize("path", ["/never", "/half"])
def test_a_stall_is_named_with_its_host_the_seconds_and_a_remedy(tmp_path, server, path):
    begin = time.monotonic()
    with pytest.raises(
        TimeoutError, match=rf"no byte came from {server.url} for 0\.6 s.*raise data\.reading\.stall_seconds"
    ):
        Cache(tmp_path, stall_seconds=0.6).path(server.url + path)
    assert 0.5 < time.monotonic() - begin < 5


def test_a_stalled_connection_is_closed(tmp_path, server):
    with pytest.raises(TimeoutError):
        Cache(tmp_path, stall_seconds=0.1, attempts=1).path(f"{server.url}/half")
    assert server.hung_up.wait(30)


def test_a_slow_download_is_no_stall(tmp_path, server):
    assert Cache(tmp_path, stall_seconds=0.5, attempts=1).path(f"{server.url}/slowly").read_bytes() == b"x" * 12


def test_a_store_without_an_event_loop_may_stall_too(tmp_path, memory, monkeypatch):
    go_on, get_file = threading.Event(), MemoryFileSystem.get_file
    parts, threads = set(), set()

    def stalled(self, path, part, callback):
        threads.add(threading.current_thread())
        parts.add(part)
        go_on.wait()
        get_file(self, path, part, callback)

    monkeypatch.setattr(MemoryFileSystem, "get_file", stalled)
    cache = Cache(tmp_path, stall_seconds=0.2, attempts=2)
    with pytest.raises(TimeoutError, match=r"memory://bucket/1\.tar: no byte came from memory://bucket for"):
        cache.path("memory://bucket/1.tar")
    assert len(parts) == 2  # so that the first cannot write into the second's
    go_on.set()
    for thread in threads:
        thread.join()
    assert names(cache) == []
    assert cache.path("memory://bucket/1.tar").read_bytes() == b"\1" * 1000


def test_a_download_that_was_given_up_ends_with_the_next_piece(tmp_path, memory, monkeypatch):
    go_on, pieces, threads = threading.Event(), [], set()

    def endless(self, path, part, callback):
        threads.add(threading.current_thread())
        go_on.wait()
        for piece in range(1000):
            pieces.append(piece)
            callback.relative_update(1)

    monkeypatch.setattr(MemoryFileSystem, "get_file", endless)
    with pytest.raises(TimeoutError):
        Cache(tmp_path, stall_seconds=0.1, attempts=1).path("memory://bucket/1.tar")
    go_on.set()
    for thread in threads:
        thread.join()
    assert pieces == [0]


def test_a_file_that_is_not_of_the_size_announced_is_not_kept(cache, memory, monkeypatch):
    def short(self, path, part, callback):
        callback.set_size(1000)
        Path(part).write_bytes(bytes(999))

    monkeypatch.setattr(MemoryFileSystem, "get_file", short)
    with pytest.raises(OSError, match=r"memory://bucket/1\.tar.*999 of 1,000 bytes came; attempt 3 of 3"):
        cache.path("memory://bucket/1.tar")
    assert names(cache) == []


def test_a_full_disk_is_not_asked_twice(cache, memory, monkeypatch):
    calls = []

    def full(*_, **__):
        calls.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(MemoryFileSystem, "get_file", full)
    with pytest.raises(OSError, match=f"cannot be copied to {cache.folder}") as caught:
        cache.path("memory://bucket/1.tar")
    assert caught.value.errno == errno.ENOSPC
    assert calls == [1]


def test_a_file_system_without_locks_is_named(cache, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(OSError, match=f"{cache.folder} is on a file system without file locks: put the cache on"):
        cache.path("memory://bucket/1.tar")


@pytest.mark.parametrize("options", [{"limit_gb": 0}, {"stall_seconds": 0}, {"attempts": 0}])
def test_a_cache_of_nothing_is_refused(options):
    with pytest.raises(ValueError, match="give a number over 0"):
        Cache("cache", **options)


# Files that may be missing


def test_a_store_is_asked_once_for_a_file_that_it_has_not(cache, server):
    assert [cache.optional(f"{server.url}/404?a=1") for _ in range(3)] == [None] * 3
    assert server.hits["/404"] == 1
    assert cache.optional(f"{server.url}/ok/1.jpg").read_bytes() == CONTENT


@pytest.mark.parametrize(("path", "error"), [("/403", PermissionError), ("/500", OSError)])
def test_a_store_that_does_not_say_so_is_not_taken_to_lack_the_file(tmp_path, server, path, error):
    cache = Cache(tmp_path, stall_seconds=0.5)
    for _ in range(2):
        with pytest.raises(error):
            cache.optional(server.url + path)


# The bound


def test_the_copies_that_were_not_used_for_longest_go(tmp_path, memory):
    cache = Cache(tmp_path, limit_gb=5e-6)  # 5 of these files; 4 leave a tenth to spare
    copies = [cache.path(f"memory://bucket/{number}.tar") for number in range(5)]
    for number, copy in enumerate(copies):
        age(copy, 100 - number)
    cache.path("memory://bucket/0.tar")  # used again
    with copies[1].open("rb") as file:
        newest = cache.path("memory://bucket/5.tar")
        assert file.read() == b"\1" * 1000  # who has it open can read on
    assert names(cache) == sorted(path.name for path in [copies[0], copies[3], copies[4], newest])
    assert noted(cache) == 4000


def test_files_of_others_stay(tmp_path, memory):
    cache = Cache(tmp_path, limit_gb=1.5e-6)
    for name in ("0.tar", "0123456789abcdef-0.tar", ".0.tar.part"):
        (tmp_path / name).write_bytes(bytes(5000))
        age(tmp_path / name, 1e6)
    for number in range(3):
        last = cache.path(f"memory://bucket/{number}.tar")
    assert names(cache) == sorted([last.name, "0.tar", "0123456789abcdef-0.tar", ".0.tar.part"])


def test_a_file_larger_than_the_cache_is_refused_with_both_sizes(tmp_path, memory, server):
    cache = Cache(tmp_path, limit_gb=9e-7)
    with pytest.raises(
        ValueError, match=r"memory://bucket/1\.tar: it has 0\.000001 GB .* 0\.0000009|9e-07 GB.*limit_gb"
    ):
        cache.path("memory://bucket/1.tar")
    with pytest.raises(ValueError, match="limit_gb"):
        cache.path(f"{server.url}/big")  # without end, and without a size announced
    with pytest.raises(ValueError, match="it has 10 GB and"):
        cache.path(f"{server.url}/huge")
    assert names(cache) == []


def test_the_folder_is_counted_only_when_it_is_full(tmp_path, memory, monkeypatch):
    cache, scans, scandir = Cache(tmp_path, limit_gb=6e-6), [], os.scandir

    def counted(path):
        scans.append(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", counted)
    for number in (0, 1, 2, 3, 4, 5, 0, 1, 2):
        cache.path(f"memory://bucket/{number}.tar")
    assert len(scans) == 1  # the first download cannot know what is there
    for number in (6, 7, 8, 9):
        cache.path(f"memory://bucket/{number}.tar")
    assert len(scans) == 3  # once for two of them, for each time makes room to spare
    assert noted(cache) == 1000 * len(names(cache)) == 6000


@pytest.mark.parametrize("ledger", [None, "", "nonsense", "999999"])
def test_a_ledger_that_is_lost_or_wrong_costs_a_count_and_no_copies(tmp_path, memory, ledger):
    cache = Cache(tmp_path, limit_gb=5e-6)
    for number in range(3):
        cache.path(f"memory://bucket/{number}.tar")
    (tmp_path / LEDGER).unlink()
    if ledger is not None:
        (tmp_path / LEDGER).write_text(ledger)
    cache.path("memory://bucket/3.tar")
    assert len(names(cache)) == 4
    assert noted(cache) == 4000


def test_the_bound_holds_for_many_callers(tmp_path, memory):
    caches = [Cache(tmp_path, limit_gb=4e-6) for _ in range(4)]
    with ThreadPoolExecutor(8) as threads:
        for _ in threads.map(lambda n: caches[n % 4].path(f"memory://bucket/{n * 7 % 10}.tar"), range(80)):
            assert sum(entry.name.endswith(".tar") for entry in os.scandir(tmp_path)) <= 4
    assert noted(caches[0]) == 1000 * len(names(caches[0]))


def test_what_killed_processes_left_goes_in_the_end(tmp_path, memory):
    cache = Cache(tmp_path, limit_gb=5e-6)
    copy = copy_name("memory://bucket/9.tar")
    left = [f".{copy}.{ending}" for ending in ("01234567.part", "89abcdef.part", "lock")]
    for name in left:
        (tmp_path / name).write_bytes(b"some")
    age(tmp_path / left[0], 1e5)
    age(tmp_path / left[2], 1e5)
    kept = cache.path("memory://bucket/0.tar")
    assert names(cache) == sorted([kept.name, left[1]])  # another process may be writing that
