"""Where metadata comes from: paths, folders, globs, addresses; and files that are missing, damaged or no parquet."""

import http.server
import re
import sys
import threading

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from metadata import coyo_table, parquet, resources

from align_train.corpus.coyo import SCHEMA
from align_train.corpus.select import AtMost, select
from align_train.corpus.select.metadata import find_metadata

WIDE = {"wide": "width > 200"}


def paths(patterns):
    return [file.path for file in find_metadata(patterns)]


def kept(folder, metadata, rules=WIDE, **options):
    """The ids that a selection into FOLDER/out keeps of each file."""
    select(metadata, folder / "out", rules, resources(folder), **options)
    return [pq.read_table(path)["id"].to_pylist() for path in sorted((folder / "out" / "selected").glob("*.parquet"))]


# Paths on this machine.


def test_folders_globs_and_lists_name_files_once_and_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("in/b.parquet", "in/a.parquet", "in/deep/c.parquet", "other/d.parquet"):
        parquet(tmp_path / name, [{}])
    (tmp_path / "in" / "readme.txt").write_text("not metadata")
    (tmp_path / "link.parquet").symlink_to("in/a.parquet")
    assert paths("in") == ["in/a.parquet", "in/b.parquet"]
    assert paths("in/*.parquet") == ["in/a.parquet", "in/b.parquet"]
    assert paths("**/*.parquet") == ["in/a.parquet", "in/b.parquet", "in/deep/c.parquet", "other/d.parquet"]
    assert paths(["other", "in/b.parquet", "in"]) == ["other/d.parquet", "in/b.parquet", "in/a.parquet"]
    twice = ["in/a.parquet", "in/../in/a.parquet", str(tmp_path / "in" / "a.parquet"), "link.parquet"]
    assert paths(twice) == ["in/a.parquet"]


@pytest.mark.parametrize(
    "name", ["part[1].parquet", "what?.parquet", "a*.parquet", "it's.parquet", "a {b},c.parquet", "ü \"'.parquet"]
)
def test_names_of_files_and_folders_may_hold_any_letters(name, tmp_path):
    for other in ("part1.parquet", "whatx.parquet", "ab.parquet"):
        parquet(tmp_path / "in" / other, [{"id": 5}])
    path = parquet(tmp_path / "in" / name, [{"id": 1}, {"id": 2, "width": 3}])
    assert kept(tmp_path, path) == [[1]]
    (tmp_path / "in" / name).rename(tmp_path / "whole")
    folder = tmp_path / name.removesuffix(".parquet")
    folder.mkdir()
    (tmp_path / "whole").rename(folder / "x.parquet")
    assert kept(tmp_path, str(folder)) == [[1]]


@pytest.mark.parametrize("pattern", ["nothing.parquet", "*.parquet", "empty", ["in", "nothing.parquet"]])
def test_a_pattern_that_matches_nothing_is_named(pattern, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    parquet(tmp_path / "in" / "a.parquet", [{}])
    last = pattern if isinstance(pattern, str) else pattern[-1]
    with pytest.raises(FileNotFoundError, match=re.escape(f"no metadata file matches {last!r}: give parquet files")):
        find_metadata(pattern)


def test_no_pattern_at_all_is_refused():
    with pytest.raises(FileNotFoundError, match="no metadata is named: give parquet files"):
        find_metadata([])


# Files that are not what they should be.


def damaged(path, place, count=64):
    content = bytearray(path.read_bytes())
    content[place : place + count] = bytes(byte ^ 0xFF for byte in content[place : place + count])
    path.write_bytes(content)


@pytest.fixture
def whole(tmp_path):
    """Two files in FOLDER/in, the second large enough to be damaged in its middle."""
    draw = np.random.default_rng(0)
    parquet(tmp_path / "in" / "a.parquet", [{"text": "short"}])
    rows = [
        {"id": n, "text": " ".join(map(str, draw.integers(0, 10_000, 6))), "width": int(draw.integers(0, 999))}
        for n in range(3000)
    ]
    parquet(tmp_path / "in" / "b.parquet", rows, compression="snappy")
    return tmp_path


@pytest.mark.parametrize(
    "break_it",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(path.read_bytes()[:20_000]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("id,url\n1,https://example.org\n" * 10),
        lambda path: damaged(path, path.stat().st_size - 2000, 900),
    ],
    ids=["truncated", "half", "empty", "text", "footer"],
)
def test_what_is_no_whole_parquet_file_is_named(break_it, whole):
    break_it(whole / "in" / "b.parquet")
    with pytest.raises((ValueError, OSError), match=r"b\.parquet (is no whole parquet file|cannot be read)"):
        kept(whole, str(whole / "in"))
    assert not (whole / "out").exists()


@pytest.mark.parametrize("rules", [WIDE, {"shared": AtMost("id", "text", 3)}, {}], ids=["row", "corpus", "none"])
@pytest.mark.parametrize("column", ["width", "text", "url"])
def test_damaged_pages_are_told_with_the_files_name(column, rules, whole):
    """The footer is fine; what is damaged shows when rules read the column, or when the rows are written."""
    path = whole / "in" / "b.parquet"
    chunk = pq.read_metadata(path).row_group(0).column(SCHEMA.get_field_index(column))
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    damaged(path, start + chunk.total_compressed_size // 2)
    with pytest.raises(ValueError, match=r"b\.parquet is broken \(.*\): download it again, or leave it out"):
        kept(whole, str(whole / "in"), rules)
    assert not list((whole / "out" / "selected").glob("*00001*"))
    assert not list((whole / "out" / "selected").glob(".*"))  # nothing half-written is left


def test_a_folder_instead_of_a_file_is_named(tmp_path):
    (tmp_path / "in" / "a.parquet").mkdir(parents=True)
    with pytest.raises(OSError, match=r"a\.parquet cannot be read: .*directory"):
        find_metadata(str(tmp_path / "in"))


def test_a_missing_column_is_told_with_file_and_rule(tmp_path):
    parquet(tmp_path / "in" / "a.parquet", [{}])
    parquet(tmp_path / "in" / "b.parquet", coyo_table([{}]).drop_columns("watermark_score"))
    rules = {**WIDE, "clean": "watermark_score < 0.8"}
    with pytest.raises(
        ValueError, match=r"b\.parquet has no column watermark_score, which the rule clean needs; it has id, url"
    ):
        kept(tmp_path, str(tmp_path / "in"), rules)
    assert not (tmp_path / "out").exists()


# Addresses.


@pytest.fixture
def served(tmp_path):
    """Serves FOLDER/in with ranges on 127.0.0.1; yields the address and what was asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = tmp_path / "in" / self.path.split("?")[0].strip("/")
            asked.append((self.command, self.path, self.headers["Range"]))
            status = 500 if path.name == "error.parquet" else 200 if path.is_file() else 404
            content = path.read_bytes() if status == 200 else b""
            headers = {"Accept-Ranges": "bytes"}
            if status == 200 and (wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")):
                first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
                status, headers["Content-Range"] = 206, f"bytes {first}-{last}/{len(content)}"
                content = content[first : last + 1]
            self.send_response(status)
            for name, value in {**headers, "Content-Length": len(content)}.items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


def test_http_gives_what_the_files_give(whole, served):
    rules = {**WIDE, "shared": AtMost("id", "width", 4)}
    wanted = kept(whole, str(whole / "in"), rules)
    urls = [f"{served[0]}/a.parquet", f"{served[0]}/b.parquet?download=true"]
    assert paths(urls) == urls
    (whole / "out").rename(whole / "local")
    assert kept(whole, urls, rules) == wanted
    assert len(wanted[1]) > 500


def test_only_the_columns_that_rules_need_are_downloaded(tmp_path, served):
    address, asked = served
    filling = np.random.default_rng(0).bytes(10_000)
    table = pa.table({"before": [filling] * 400, "width": range(400), "after": [filling[::-1]] * 400})
    pq.write_table(table, (tmp_path / "in").mkdir() or tmp_path / "in" / "a.parquet", use_dictionary=False)
    assert select(f"{address}/a.parquet", tmp_path / "out", WIDE, resources(tmp_path), dry_run=True).kept == 199
    ranges = [re.fullmatch(r"bytes=(\d+)-(\d+)", wanted) for command, _, wanted in asked if command == "GET"]
    assert sum(int(found[2]) - int(found[1]) for found in ranges if found) < 1e6
    assert all(ranges)


@pytest.mark.parametrize("name", ["missing.parquet", "error.parquet"])
def test_an_address_without_a_file_is_named(name, served):
    with pytest.raises(FileNotFoundError, match=rf"there is no metadata file http://.*/{name} \((404|500), "):
        find_metadata(f"{served[0]}/{name}")


def test_a_truncated_file_behind_an_address_is_named(whole, served):
    path = whole / "in" / "b.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"^http://.*/b\.parquet is no whole parquet file"):
        find_metadata(f"{served[0]}/b.parquet")


def test_an_address_that_goes_away_is_named(whole, served, monkeypatch):
    """The footer was read, the rows are not there any more."""
    files = find_metadata(url := f"{served[0]}/b.parquet")
    (whole / "in" / "b.parquet").unlink()
    monkeypatch.setattr("align_train.corpus.select.selecting.find_metadata", lambda patterns: files)
    with pytest.raises((OSError, ValueError), match=re.escape(url)):
        kept(whole, url)


def test_no_server_is_told():
    unused = "http://127.0.0.1:9/a.parquet"
    with pytest.raises(FileNotFoundError, match=rf"there is no metadata file {unused} \(.*[Cc]annot connect"):
        find_metadata(unused)


@pytest.fixture
def store():
    """fsspec's store in memory, which stands for s3, gs and the like."""
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()


@pytest.mark.parametrize(
    "pattern", ["memory://bucket/*.parquet", "memory://bucket", "memory://bucket/", "memory://bucket/[ab].parquet"]
)
def test_a_store_is_read_through_fsspec(pattern, store, tmp_path):
    for name, first in (("a", 0), ("b", 10)):
        with store.open(f"bucket/{name}.parquet", "wb") as file:
            pq.write_table(coyo_table([{"id": first, "width": 100}, {"id": first + 1}, {"id": first + 2}]), file)
    assert kept(tmp_path, pattern, {**WIDE, "rare": AtMost("id", "width", 4)}) == [[1, 2], [11, 12]]


def test_stores_and_paths_are_mixed(store, tmp_path):
    with store.open("bucket/a.parquet", "wb") as file:
        pq.write_table(coyo_table([{"id": 1}]), file)
    local = parquet(tmp_path / "in" / "a.parquet", [{"id": 2}])
    assert kept(tmp_path, [f"file://{local}", "memory://bucket/a.parquet"]) == [[2], [1]]


def test_a_store_without_such_files_is_told(store):
    with pytest.raises(FileNotFoundError, match=r"no metadata file matches 'memory://bucket/\*\.parquet'"):
        find_metadata("memory://bucket/*.parquet")
    with pytest.raises(FileNotFoundError, match=r"there is no metadata file memory://bucket/a\.parquet"):
        find_metadata("memory://bucket/a.parquet")


@pytest.mark.parametrize(("address", "package"), [("s3://bucket/a.parquet", "s3fs"), ("gs://bucket/*", "gcsfs")])
def test_a_missing_package_is_told(address, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"{re.escape(address)} needs another package: .*{package}"):
        find_metadata(address)


def test_an_unknown_protocol_is_told():
    with pytest.raises(ValueError, match=r"fax://office/\* is no address that can be read: Protocol not known: fax"):
        find_metadata("fax://office/*")


@pytest.mark.parametrize("name", ["*.parquet", "a.parquet"])
def test_the_hub_is_reached_through_its_own_package(name):
    """Tests are offline, which huggingface_hub says."""
    with pytest.raises(OSError, match=rf"hf://datasets/a/b/{re.escape(name)} cannot be .*Cannot reach https://"):
        find_metadata(f"hf://datasets/a/b/{name}")
