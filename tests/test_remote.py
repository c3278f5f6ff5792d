"""Training from shards that lie on a web server, through a cache that may be too small."""

import re
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from reading import batches, keys, order_of, sources

from align_train.data import Reading, read_sources
from align_train.data.storage.cache import Cache


class Quiet(SimpleHTTPRequestHandler):
    def log_request(self, *_: object) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]

    def log_error(self, *_: object) -> None:
        """Nobody wants to hear of it."""


@pytest.fixture
def shards(make_shards) -> Path:
    return make_shards(24, 4)


@pytest.fixture
def web(shards: Path) -> Iterator[ThreadingHTTPServer]:
    """A server of the folder of shards; notes what it is asked for."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(shards)))
    server.asked = []  # type: ignore[attr-defined]
    server.url = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def remote(web, cache, **given):
    return read_sources({"pairs": {"shards": f"{web.url}/{{00000..00005}}.tar", **given}}, cache)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize(("use", "workers"), [("threads", 0), ("threads", 2), ("processes", 2)])
def test_batches_are_those_of_the_files(web, shards, tmp_path, use, workers):
    cache = Cache(tmp_path / "cache", stall_seconds=60)
    reading = Reading(use=use, cache=cache, stall_seconds=60)
    here = batches(sources(pairs=shards), shuffle_shards=2)
    there = batches(remote(web, cache), shuffle_shards=2, reading=reading, workers=workers)
    for one, other in zip(here, there, strict=True):
        assert one.keys == other.keys
        assert torch.equal(one.pixels, other.pixels)
    tars = [path for path in web.asked if path.endswith(".tar")]
    assert len(tars) == len(set(tars)) == 6  # once each, though they were seen twice


def test_only_the_shards_of_two_windows_are_brought(web, tmp_path):
    order = order_of(remote(web, Cache(tmp_path / "cache")), shuffle_shards=1)
    keys(order, 1)
    order._streams[0]._opening[1].result()  # what is opened ahead
    assert len({path for path in web.asked if path.endswith(".tar")}) == 2


def test_a_cache_that_is_too_small_brings_them_again(web, shards, tmp_path, caplog):
    size = max(path.stat().st_size for path in shards.glob("*.tar"))
    cache = Cache(tmp_path / "cache", limit_gb=3.5 * size / 1e9)
    reading = Reading(use="threads", cache=cache, max_quarantined=0.0)
    with pytest.raises(ValueError, match=r"6 shards of .* GB are read together, .*limit_gb, or lower .*shuffle_shards"):
        next(batches(remote(web, cache), reading=reading))
    here = [batch.keys for batch in batches(sources(pairs=shards), steps=9, shuffle_shards=2)]
    there = batches(remote(web, cache), steps=9, reading=reading, shuffle_shards=2)
    assert [batch.keys for batch in there] == here
    assert len([path for path in web.asked if path.endswith(".tar")]) > 6
    assert caplog.text.count("less than two such windows") == 1
    assert sum(map(size_there, cache.folder.glob("*.tar"))) <= 3.5 * size


def size_there(path):
    """Bytes of a file, 0 if it has gone meanwhile: the window that is opened ahead makes itself room."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def test_rules_look_at_a_remote_sidecar(web, tmp_path):
    read = remote(web, Cache(tmp_path / "cache"), rules={"odd": "parity = 'odd'"})
    assert len(set(keys(order_of(read), 12))) == 12


def test_a_remote_shard_that_is_missing_is_quarantined(web, shards, tmp_path):
    (shards / "00003.tar").unlink()
    (shards / "00003.parquet").unlink()
    read = remote(web, Cache(tmp_path / "cache"))
    order = order_of(read)
    assert len(set(keys(order, 20))) == 20
    assert re.search(r"00003\.tar: there is no such file", str(order._opener.quarantine.names))


def test_shards_without_sidecars_ask_for_them_once(web, shards, tmp_path):
    for path in shards.glob("*.parquet"):
        path.unlink()
    order = order_of(remote(web, Cache(tmp_path / "cache")))
    keys(order, 96, 8)
    asked = [path for path in web.asked if path.endswith(".parquet")]
    assert len(asked) == len(set(asked)) == 6


def test_a_copy_that_goes_before_it_is_opened_is_brought_again(web, tmp_path):
    (source,) = remote(web, Cache(tmp_path / "cache"))
    shard, seen = source.shards[0], []

    def use(path: Path) -> bytes:
        if not seen:
            shutil.rmtree(tmp_path / "cache")
        seen.append(path)
        return path.read_bytes()

    assert len(shard.opened(use)) > 1000
    assert len(seen) == 2
