"""Tasks: what becomes of each kind of row, whole files after any failure, retries, slices, other jobs, the summary."""

import gc
import io
import itertools
import json
import os
import resource
import shutil
import threading
from contextlib import contextmanager, suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from urllib.request import urlopen

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from fetching import LOCAL, QUICK, SMALL, job_of, members, run_here, state
from metadata import coyo_table, parquet, resources
from PIL import Image
from reading import read_all

from align_train.corpus.fetch import Columns, Fetcher, FetchSettings, run_job
from align_train.corpus.fetch.summary import summarise
from align_train.corpus.images import ImageSettings
from align_train.corpus.prepare import prepare_coyo
from align_train.corpus.sample_corpus import read_sample
from align_train.corpus.select.funnel import Funnel
from align_train.corpus.shards import TarWriter
from align_train.data.storage.shards import Shard

pytest_plugins = ["bad_server"]


def open_here(folder):
    """Files that are open under a folder, and sockets; threads that other tests left have files of their own."""
    for number in os.listdir("/dev/fd"):
        with suppress(OSError):
            name = os.readlink(f"/dev/fd/{number}")
            if name.startswith(("socket:", str(folder))):
                yield name


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path):
    """No test leaves a thread that downloads or a file open."""
    gc.collect()  # what earlier tests left
    before = set(open_here(tmp_path))
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("align_train")]
    for _ in range(100):  # pyarrow's threads close a file soon after it was read
        gc.collect()
        if set(open_here(tmp_path)) <= before:
            break
        threading.Event().wait(0.02)
    assert set(open_here(tmp_path)) <= before


def links(server, *paths):
    return [server.url + path for path in paths]


# What becomes of each kind of row

# Path or URL, what the metadata says beside it, and the reason for failure.
ROWS = [
    ("/ok/1.jpg", {}, ""),
    ("/404", {}, "http_404"),
    ("/429-then-ok", {}, ""),
    ("/500", {}, "http_500"),
    ("/slow-drip", {}, "timeout"),
    ("/never", {}, "timeout"),
    ("/truncated", {}, "truncated"),
    ("/wrong-length", {}, "corrupt_image"),
    ("/html.jpg", {}, "not_an_image"),
    ("/loop", {}, "too_many_redirects"),
    ("/to-private", {}, "refused_address"),
    ("/bomb.png", {}, "too_many_pixels"),
    ("/animated.gif", {}, ""),
    ("/cmyk.jpg", {}, ""),
    ("/16bit.png", {}, ""),
    ("/image.webp", {}, ""),
    ("/empty", {}, "empty"),
    ("/ok/1.jpg", {"text": "the same link again"}, ""),
    ("/noai.jpg", {}, "opt_out"),
    ("/rotated.jpg", {}, ""),
    ("/transparent.png", {}, ""),
    ("/ok/2.jpg", {"text": ""}, "empty_caption"),
    ("/ok/2.jpg", {"text": " &nbsp;<br>\u200b"}, "empty_caption"),
    ("/ok/2.jpg", {"text": None}, "empty_caption"),
    (None, {}, "bad_url"),
    ("", {}, "bad_url"),
    ("/ok/3.jpg", {"text": "Tom &amp;  Jerry&#39;s\ncaf&eacute;"}, ""),
    ("/ok/4.jpg", {"id": 0}, "duplicate_key"),
    ("/ok/4.jpg", {"id": None}, "no_key"),
    ("package:SHIPPED", {}, ""),
    ("package:no-such-image", {}, "missing_file"),
]
SIZES = {"/rotated.jpg": (40, 60, 20, 30), "/ok/": (32, 24, 27, 20), "/429-then-ok": (32, 24, 27, 20)}  # else 60 x 40


@pytest.fixture
def misbehaved(bad_server, tmp_path, monkeypatch, capfd):
    """The folder that `prepare_coyo` makes of ROWS, its report, and the rows as they were selected."""
    monkeypatch.setattr(Funnel, "plot", lambda funnel, path: path.write_bytes(b"a plot"))
    urlopen(f"{bad_server.url}/bomb.png").close()  # drawing it takes time
    bad_server.hits.clear()
    shipped = next(read_sample()).key
    urls = [url and (bad_server.url + url if url[0] == "/" else url.replace("SHIPPED", shipped)) for url, *_ in ROWS]
    table = coyo_table([{"url": url, **given} for url, (_, given, _) in zip(urls, ROWS, strict=True)])
    ids = [given.get("id", number) for number, (_, given, _) in enumerate(ROWS)]
    table = table.set_column(0, "id", pa.array(ids, pa.int64()))
    images = ImageSettings(size=20, mode="keep_ratio")
    fetch = FetchSettings(replace(QUICK, total_seconds=1), LOCAL, images, processes=1)
    metadata = parquet(tmp_path / "in.parquet", table)
    report = prepare_coyo(tmp_path / "out", metadata, {}, resources=resources(tmp_path), fetch=fetch)["fetch"]
    assert "Warning" not in capfd.readouterr().err  # of Pillow, on files that are counted
    return tmp_path / "out", report, table.to_pylist()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_each_kind_of_row_has_its_status_and_the_shard_just_the_images_that_came(bad_server, misbehaved):
    folder, report, selected = misbehaved
    shard = folder / "shards" / "00000.tar"
    sidecar, content = pq.read_table(shard.with_suffix(".parquet")).to_pylist(), members(shard)
    assert [(row["status"], row["reason"]) for row in sidecar] == [
        ("failed" if reason else "success", reason) for *_, reason in ROWS
    ]
    assert [{name: row[name] for name in selected[0]} for row in sidecar] == selected
    came = [row for row in sidecar if row["status"] == "success"]
    assert list(content) == [f"{row['key']}.{ending}" for row in came for ending in ("jpg", "txt", "json")]
    for row in sidecar:
        assert bool(row["error_message"]) == bool(row["reason"]) == (row["sha256"] is None)
    for row in came:
        check_pair(row, *(content[f"{row['key']}.{ending}"] for ending in ("jpg", "txt", "json")))
    assert came[-2]["caption"] == "Tom & Jerry's café"
    assert bad_server.hits["/ok/1.jpg"] == bad_server.hits["/429-then-ok"] == bad_server.hits["/500"] == 2
    assert not bad_server.hits["/ok/2.jpg"] + bad_server.hits["/ok/4.jpg"]  # nothing could come of them
    check_counts(report, sidecar, shard)
    check_readers(shard, came, content)


def check_pair(row, image, text, document):
    """The members of the tar are what the sidecar says."""
    assert (row["bytes"], row["sha256"]) == (len(image), sha256(image).hexdigest())
    with Image.open(io.BytesIO(image)) as opened:
        assert opened.format == "JPEG"
        assert opened.size == (row["stored_width"], row["stored_height"])
    names = ("original_width", "original_height", "stored_width", "stored_height")
    expected = next((size for path, size in SIZES.items() if path in row["url"]), (60, 40, 30, 20))
    assert row["url"].startswith("package:") or tuple(row[name] for name in names) == expected
    assert text.decode() == row["caption"]
    beside = {"status", "reason", "error_message", "bytes", "sha256"}
    assert json.loads(document) == {name: value for name, value in row.items() if name not in beside}


def check_counts(report, sidecar, shard):
    """The counts beside the shard and in the summary add up."""
    counts = json.loads(shard.with_suffix(".json").read_text())
    assert counts.keys() == {"rows", "pairs", "bytes", "reasons", "seconds"}
    assert counts["rows"] == len(ROWS) == counts["pairs"] + sum(counts["reasons"].values()) == report.rows
    assert counts["pairs"] == sum(not reason for *_, reason in ROWS) == report.pairs
    assert counts["reasons"] == report.failed == {r: [row["reason"] for row in sidecar].count(r) for r in report.failed}
    assert counts["bytes"] == shard.stat().st_size == report.bytes
    assert (report.tasks, report.finished, report.seconds) == (1, 1, counts["seconds"])
    [(host, failures)] = report.hosts
    assert host == sidecar[0]["url"].split("/")[2]
    assert failures == sum(bool(reason and url and url[0] == "/") for url, _, reason in ROWS)
    assert "1 of 1 tasks; 11 of 31 images (35.5 %)" in report.described()
    assert "timeout                             2    6.5 %" in report.table()
    assert f"most failures: {host} {failures}" in report.table()


def check_readers(shard, came, content):
    """Our reader and webdataset see the same pairs."""
    read = read_all(Shard(shard))
    assert read == [(row["key"], content[f"{row['key']}.jpg"], row["caption"]) for row in came]
    samples = [(s["__key__"], s["jpg"], s["txt"].decode()) for s in wds.WebDataset(str(shard), shardshuffle=False)]
    gc.collect()  # webdataset leaves its files to the collector; here, where the warning is expected
    assert samples == read


def test_a_finished_job_rests(bad_server, tmp_path):
    job = run_here(job_of(tmp_path, links(bad_server, "/ok/1.jpg", "/404")))
    before, times = state(job), {path: path.stat().st_mtime_ns for path in job.shards.iterdir()}
    assert job.wanted() == []
    run_job(job)
    assert (state(job), bad_server.hits["/404"]) == (before, 1)
    assert times == {path: path.stat().st_mtime_ns for path in job.shards.iterdir()}


def test_a_missing_column_is_named_with_its_setting(tmp_path):
    job = job_of(tmp_path, ["http://a/1.jpg"], columns=Columns(caption="TEXT"))
    with pytest.raises(ValueError, match=r"no column 'TEXT': set source\.fetch\.columns\.caption"):
        job.task(0)


# The fetcher


def test_results_come_in_the_order_of_the_rows_however_they_arrive(bad_server, monkeypatch):
    def answer_last(handler, name):
        while bad_server.hits.total() < 12 and not bad_server.stopping.wait(0.005):
            pass
        handler.answer_ok(name)

    monkeypatch.setattr(bad_server.RequestHandlerClass, "answer_last", answer_last, raising=False)
    rows = [(n, f"{bad_server.url}/{'last' if n in (0, 5) else 'ok'}/{n}.jpg") for n in range(12)]
    results = list(Fetcher(QUICK, LOCAL, SMALL).fetch(rows))
    assert [result.key for result in results] == list(range(12))
    assert len({result.image.content for result in results}) == 12


def test_closing_the_fetcher_early_ends_its_thread(bad_server):
    fetched = Fetcher(QUICK, LOCAL, SMALL).fetch((n, f"{bad_server.url}/ok/{n % 5}.jpg") for n in itertools.count())
    assert next(fetched).image
    names = [thread.name for thread in threading.enumerate()]
    assert any(name.startswith("align_train") for name in names)
    fetched.close()  # `nothing_is_left` looks for the thread


# Whole files after any failure


@pytest.fixture
def base(bad_server, tmp_path, request):
    """The folder of a job before a step: nothing fetched, or a shard with one failure that another attempt mends."""
    job = job_of(tmp_path / "base", links(bad_server, "/ok/1.jpg", "/404-then-ok", "/404"))
    job.begin(False)
    if request.param:
        run_here(job)
    else:
        bad_server.hits["/404-then-ok"] = 1
    return job.selected.parent


def copied(base, name, **settings):
    shutil.copytree(base, base.parent / name)
    return job_of(base.parent / name, **settings)


@contextmanager
def failing(monkeypatch, number, error):
    """Call number `number` of those that write a pair, flush or rename fails; yields a list with True if it did."""
    calls, reached = itertools.count(), []

    def checked(call):
        def instead(*given):
            if next(calls) == number:
                reached.append(True)
                raise error
            return call(*given)

        return instead

    with monkeypatch.context() as patch, suppress(type(error)):
        patch.setattr(os, "fsync", checked(os.fsync))
        patch.setattr(Path, "replace", checked(Path.replace))
        patch.setattr(TarWriter, "add", checked(TarWriter.add))
        yield reached


@pytest.mark.parametrize("base", [False, True], indirect=True, ids=["first", "retry"])
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_task_that_fails_at_any_step_is_whole_or_not_there_and_ends_the_same(base, error, monkeypatch):
    new = state(run_here(copied(base, "new", retry_failed=True)))
    assert new["00000.json"]["reasons"] == {"http_404": 1}
    for number in itertools.count():
        job = copied(base, str(number), retry_failed=True)
        old = state(job)
        with failing(monkeypatch, number, error) as reached:
            job.task(0).run(retry=True)
        if not reached:
            break
        assert not {".00000.tar.staged", ".00000.json.staged"} & set(state(job)) or number > 8  # only what is complete
        job.begin(False)  # even if it is never tried again, nothing is half done
        assert state(job) in (old, new)
        assert state(run_here(job)) == new
    assert number == 15  # two pairs, three files flushed and staged, three renamed, the folder flushed four times
    assert state(job) == new


CRASHES = {
    "half a tar": [("..00000.tar.staged.7.tmp", None)],
    "a tar": [(".00000.tar.staged", "tar")],
    "a tar and counts": [(".00000.tar.staged", "tar"), (".00000.json.staged", "json")],
    "half a sidecar": [
        (".00000.tar.staged", "tar"),
        (".00000.json.staged", "json"),
        ("..00000.parquet.staged.7.tmp", None),
    ],
    "all": [(".00000.tar.staged", "tar"), (".00000.json.staged", "json"), (".00000.parquet.staged", "parquet")],
    "tar renamed": [("00000.tar", "tar"), (".00000.json.staged", "json"), (".00000.parquet.staged", "parquet")],
    "counts renamed": [("00000.tar", "tar"), ("00000.json", "json"), (".00000.parquet.staged", "parquet")],
}


@pytest.mark.parametrize("base", [False, True], indirect=True, ids=["first", "retry"])
@pytest.mark.parametrize("crash", CRASHES)
def test_what_a_crash_left_is_finished_or_begun_anew(bad_server, base, crash):
    done = run_here(copied(base, "new", retry_failed=True))
    job = copied(base, "crashed", retry_failed=True)
    old = state(job)
    for name, ending in CRASHES[crash]:
        content = (done.shards / f"00000.{ending}").read_bytes() if ending else b"half"
        (job.shards / name).write_bytes(content)
    bad_server.hits.clear()
    bad_server.hits["/404-then-ok"] = 1
    job.begin(False)
    complete = (".00000.parquet.staged", "parquet") in CRASHES[crash]
    assert state(job) == (state(done) if complete else old)
    assert not bad_server.hits["/404"]
    assert state(run_here(job)) == state(done)
    assert bad_server.hits["/404"] == 1  # the retry of what failed, or all of it
    assert bad_server.hits["/ok/1.jpg"] == (not complete and not old)


@contextmanager
def largest_file(size):
    """The kernel lets no file of this process grow beyond so many bytes; the nearest to a full disk without one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("path", "size", "text"), [("/ok/{}.jpg", 5000, "a"), ("/404", 15_000, "long")], ids=["tar", "sidecar"]
)
def test_a_full_disk_is_told_and_leaves_nothing_half_done(bad_server, tmp_path, path, size, text):
    texts = [text if text == "a" else os.urandom(10_000).hex() for _ in range(3)]
    rows = [{"url": bad_server.url + path.format(n), "text": text} for n, text in enumerate(texts)]
    parquet(tmp_path / "selected" / "00000.parquet", rows)
    job = job_of(tmp_path)
    job.begin(False)
    with largest_file(size), pytest.raises(OSError, match=r"shards takes no more \(File too large\): make room"):
        job.task(0).run()
    assert state(job) == {}
    assert len(state(run_here(job))) == 3


def test_a_disk_too_full_to_begin_is_told(tmp_path):
    job = job_of(tmp_path, ["http://a/1.jpg"])
    with largest_file(100), pytest.raises(OSError, match="shards takes no more"):
        job.begin(False)
    assert not list(job.shards.glob("*job*"))


# Retries


def test_only_what_failed_is_fetched_again_and_merged_in_order(bad_server, tmp_path):
    paths = ["/ok/1.jpg", "/404-then-ok", "/404", "/ok/2.jpg", "/503-then-ok?times=2", "/ok/3.jpg", "/ok/4.jpg"]
    job = run_here(job_of(tmp_path, links(bad_server, *paths), rows_per_task=6))
    first = state(job)
    assert first["00000.json"]["reasons"] == {"http_404": 2, "http_503": 1}
    told, last = [], (job.shards / "00001.parquet").stat()
    retry = job_of(tmp_path, rows_per_task=6, retry_failed=True)
    assert retry.wanted() == [0, 1]
    assert [retry.run(index, told.append) for index in retry.wanted()] == [True, True]
    assert told == ["", "http_404", ""]
    again = state(retry)
    assert [row["reason"] for row in again["00000.parquet"]] == ["", "", "http_404", "", "", ""]
    assert again["00000.json"]["pairs"] == 5
    images = [name for name in members(job.shards / "00000.tar") if name.endswith(".jpg")]
    assert images == ["0.jpg", "1.jpg", "3.jpg", "4.jpg", "5.jpg"]
    assert (
        again["00000.tar"] == state(run_here(job_of(tmp_path / "at once", urls_of(job), rows_per_task=6)))["00000.tar"]
    )
    assert (job.shards / "00001.parquet").stat() == last  # nothing had failed there
    assert [bad_server.hits[path] for path in ("/ok/1.jpg", "/ok/2.jpg", "/404")] == [2, 2, 3]  # with those at once


def urls_of(job):
    return pq.read_table(job.selected / "00000.parquet")["url"].to_pylist()


def test_an_attempt_adds_its_time(bad_server, tmp_path):
    job = run_here(job_of(tmp_path, links(bad_server, "/404")))
    path = job.shards / "00000.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "seconds": 100}))
    run_here(job_of(tmp_path, retry_failed=True))
    assert 100 < json.loads(path.read_text())["seconds"] < 110


def test_a_shard_that_is_gone_is_fetched_again(bad_server, tmp_path):
    job = run_here(job_of(tmp_path, links(bad_server, "/ok/1.jpg", "/404")))
    before = state(job)
    (job.shards / "00000.tar").unlink()
    assert not job.finished(0)
    assert state(run_here(job)) == before


@pytest.mark.parametrize("damage", ["cut", "another"])
def test_a_retry_needs_the_images_that_came_before(bad_server, tmp_path, damage):
    job = run_here(job_of(tmp_path, links(bad_server, "/ok/1.jpg", "/404")))
    tar = job.shards / "00000.tar"
    tar.write_bytes(tar.read_bytes()[:1000] if damage == "cut" else bytes(10240))
    retry = job_of(tmp_path, retry_failed=True, processes=1)
    with pytest.raises(ValueError, match=r"00000\.tar is broken .*: remove 00000\.parquet to fetch all") as error:
        run_job(retry) if damage == "cut" else run_here(retry)
    assert damage != "cut" or "in _work" in error.value.__notes__[0]  # where it happened in the other process
    (job.shards / "00000.parquet").unlink()
    assert state(run_here(job))["00000.json"]["pairs"] == 1


def test_a_broken_sidecar_is_named_by_a_retry_and_by_the_summary(bad_server, tmp_path):
    job = run_here(job_of(tmp_path, links(bad_server, "/404")))
    sidecar = job.shards / "00000.parquet"
    whole = sidecar.read_bytes()
    for content in (whole[:-10], whole[:4] + bytes(len(whole) - 8) + whole[-4:], b""):
        sidecar.write_bytes(content)
        with pytest.raises(ValueError, match=r"00000\.parquet is not the sidecar .*: remove it"):
            run_here(job_of(tmp_path, retry_failed=True))
        with pytest.raises(ValueError, match=r"00000\.parquet or its \.json is broken"):
            summarise(job.shards, job.tasks)
    sidecar.write_bytes(whole)
    for content in ("", "{}", '{"bytes": 1}'):
        (job.shards / "00000.json").write_text(content)
        with pytest.raises(ValueError, match=r"00000\.parquet or its \.json is broken .*: remove both"):
            summarise(job.shards, job.tasks)


def test_the_summary_adds_up_tasks_and_names_the_worst_hosts(tmp_path):
    urls = ["bad:1", "http://b.invalid/1", "ftp://a.example/1", "ftp://a.example/2", None, "package:none"]
    parquet(tmp_path / "selected" / "0.parquet", [{"url": url} for url in urls])
    job = job_of(tmp_path, rows_per_task=2, limits=replace(QUICK, retries=0))
    job.begin(False)
    for index in (0, 2):
        job.run(index)
    report = summarise(job.shards, job.tasks)
    assert (report.tasks, report.finished, report.rows, report.pairs) == (3, 2, 4, 0)
    assert report.failed == {"scheme": 1, "dns": 1, "bad_url": 1, "missing_file": 1}
    assert report.hosts == [("b.invalid", 1)]
    job.run(1)
    assert summarise(job.shards, job.tasks).hosts == [("a.example", 2), ("b.invalid", 1)]
