"""Names of shards to addresses: files, folders, globs, brace ranges and remote stores, in a stated order."""

import os
import threading

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from align_train.data.storage.addresses import MOST_NAMES, expand, is_remote, local_path, shown


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with shards/00008.tar to shards/00011.tar, and files beside them that are no shards."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    for name in ("00010.tar", "00008.tar", "00011.tar", "00009.tar", "00008.parquet", "notes.txt"):
        (tmp_path / "shards" / name).touch()
    return tmp_path


@pytest.fixture
def memory():
    """fsspec's store in memory, with two shards and a sidecar."""
    store = fsspec.filesystem("memory")
    for name in ("1.tar", "0.tar", "0.parquet"):
        store.pipe(f"/bucket/shards/{name}", b"content")
    yield store
    store.rm("/bucket", recursive=True)


@pytest.fixture
def no_store(monkeypatch):
    """Any step towards a remote store is an error."""

    def refuse(*_, **__):
        raise AssertionError("a store was opened")

    monkeypatch.setattr(fsspec.core, "url_to_fs", refuse)


def shards(*numbers):
    return [f"shards/{number:05d}.tar" for number in numbers]


# On this machine


@pytest.mark.parametrize(
    ("pattern", "numbers"),
    [
        ("shards/00009.tar", [9]),
        ("shards", [8, 9, 10, 11]),
        ("shards/", [8, 9, 10, 11]),
        ("shards/*.tar", [8, 9, 10, 11]),
        ("**/0001?.tar", [10, 11]),
        ("shards/{00008..00011}.tar", [8, 9, 10, 11]),
        ("shards/{00011..00009}.tar", [11, 10, 9]),
        ("shards/{00009,00008}.tar", [9, 8]),
        ("shards/000{10..11}.tar", [10, 11]),
        ("{shards/*9.tar,shards/*8.tar}", [9, 8]),
    ],
)
def test_a_pattern_stands_for_its_files_in_its_order(folder, pattern, numbers):
    assert expand(pattern) == shards(*numbers)


def test_several_braces_multiply_and_the_last_turns_fastest(folder):
    there = [f"./shards/{number:05d}.tar" for number in (11, 10)]
    assert expand("{./shards,shards}/000{11..10}.tar") == [*there, *shards(11, 10)]


def test_patterns_keep_their_order_and_what_is_named_twice_comes_twice(folder):
    assert expand(["shards/00011.tar", "shards/*8.tar", "shards/00011.tar"]) == shards(11, 8, 11)
    assert expand(("shards/00011.tar",)) == shards(11)


def test_a_file_address_comes_as_a_path(folder):
    here = os.fspath(folder / "shards")
    assert expand(f"file://{here}/{{00008..00009}}.tar") == [f"{here}/00008.tar", f"{here}/00009.tar"]
    assert expand(f"file://{here}") == [f"{here}/{number:05d}.tar" for number in (8, 9, 10, 11)]
    assert local_path(f"file://{here}") == local_path(here) == here
    assert not is_remote(here)
    assert not is_remote(f"file://{here}")


@pytest.mark.parametrize("name", ["a{1,2}.tar", "a[1].tar", "a*.tar"])
def test_a_file_that_bears_the_name_is_meant_whatever_is_in_it(folder, name):
    for each in (name, "a1.tar"):
        (folder / each).touch()
    assert expand(name) == [name]


def test_a_folder_may_have_any_name(folder):
    (folder / "a[1]").mkdir()
    (folder / "a[1]" / "0.tar").touch()
    assert expand("a[1]") == ["a[1]/0.tar"]


def test_a_backslash_is_a_letter(folder):
    for name in ("\\a1.tar", "\\a2.tar"):
        (folder / name).touch()
    assert expand("\\a{1..2}.tar") == ["\\a1.tar", "\\a2.tar"]


def test_the_first_missing_file_of_a_range_is_named_with_their_number(folder):
    with pytest.raises(FileNotFoundError, match=r"3 of its 6 names have no file, the first is shards/00007\.tar"):
        expand("shards/{00007,00008,00009,00012,00010,00013}.tar")


@pytest.mark.parametrize("pattern", ["nowhere", "shards/*.zip", "shards/00012.tar", "empty", "file:///nowhere/0.tar"])
def test_a_pattern_without_a_file_is_named_with_a_remedy(folder, pattern):
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="align-train prepare") as caught:
        expand(["shards", pattern])
    assert repr(pattern) in str(caught.value)
    assert f"looked in {folder if '://' not in pattern else '/nowhere'}" in str(caught.value)


@pytest.mark.parametrize("pattern", ["pipe:cat shards/00008.tar", "-"])
def test_commands_are_refused(folder, pattern):
    with pytest.raises(ValueError, match="run code; give a path or an address"):
        expand(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        "{0..99999999999}",
        "{0..10000000}",
        "{0000..9999}{0000..9999}",
        "{1..-99999999}",
        "{a,b}" * 30,
        "s3://b/{0..99999999..2}",
    ],
)
def test_a_range_of_absurd_size_is_refused_before_it_is_written_out(pattern):
    with pytest.raises(ValueError, match=f"more than {MOST_NAMES:,} names"):
        expand(pattern)


@pytest.mark.parametrize("pattern", ["shards/{00000..00001.tar", "http://host/{a,b}}.tar"])
def test_a_brace_without_a_partner_is_named(pattern):
    with pytest.raises(ValueError, match="brace has no partner"):
        expand(pattern)


# Remote


@pytest.mark.parametrize("protocol", ["http", "https", "memory"])
def test_remote_names_are_not_asked_for(no_store, protocol):
    found = expand(f"{protocol}://nowhere.invalid/a/{{00000..09999}}.tar")
    assert len(found) == 10_000
    assert found[0] == f"{protocol}://nowhere.invalid/a/00000.tar"
    assert found[-1] == f"{protocol}://nowhere.invalid/a/09999.tar"
    assert all(map(is_remote, found))


@pytest.mark.parametrize("name", ["http://[::1]:8000/0.tar", "https://host/0.tar?a=[1]&b=*", "http://host/a%20b.tar"])
def test_a_web_address_is_no_glob_for_its_host_or_query(no_store, name):
    assert expand(name) == [name]


@pytest.mark.parametrize(
    "pattern", ["memory://bucket/shards/*.tar", "memory://bucket/shards/", "memory://bucket/*/?.tar"]
)
def test_a_store_that_can_list_has_globs_and_folders(memory, pattern):
    assert expand(pattern) == ["memory://bucket/shards/0.tar", "memory://bucket/shards/1.tar"]


def test_braces_and_globs_of_a_store_go_together(memory):
    assert (
        expand("memory://{bucket,bucket/shards}/**/[01].tar")
        == ["memory://bucket/shards/0.tar", "memory://bucket/shards/1.tar"] * 2
    )


@pytest.mark.parametrize("pattern", ["http://user:secret@host/*.tar?key=secret", "https://host/shards/"])
def test_a_web_server_cannot_list_and_the_message_says_what_can_be_done(no_store, pattern):
    with pytest.raises(ValueError, match="brace range") as caught:
        expand(pattern)
    assert "secret" not in str(caught.value)


def test_a_remote_glob_without_a_match_is_named(memory):
    with pytest.raises(FileNotFoundError, match=r"no shard matches memory://bucket/\*\.zip"):
        expand("memory://bucket/*.zip")


def test_a_store_that_does_not_list_is_named_with_a_remedy(memory, monkeypatch):
    go_on = threading.Event()
    monkeypatch.setattr(MemoryFileSystem, "glob", lambda *_: go_on.wait())
    with pytest.raises(TimeoutError, match=r"memory://bucket/\*\.tar: the store did not list .* 0\.05 s.* brace range"):
        expand("memory://bucket/*.tar", stall_seconds=0.05)
    go_on.set()


def test_an_error_of_a_store_that_lists_comes_through(memory, monkeypatch):
    def refuse(*_):
        raise PermissionError("no")

    monkeypatch.setattr(MemoryFileSystem, "glob", refuse)
    with pytest.raises(PermissionError, match="no"):
        expand("memory://bucket/*.tar")


@pytest.mark.parametrize(("protocol", "package", "extra"), [("s3", "s3fs", "s3"), ("gs", "gcsfs", "gcs")])
def test_a_missing_package_is_named_with_what_installs_it(monkeypatch, protocol, package, extra):
    def missing(protocol):
        raise ImportError("Install it")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(ValueError, match=rf"install {package}: pip install 'align-train\[{extra}\]'"):
        expand(f"{protocol}://bucket/0.tar")
    with pytest.raises(ValueError, match="Install it"):
        expand("az://bucket/0.tar")


def test_an_unknown_protocol_is_named():
    with pytest.raises(ValueError, match="gopher:// cannot be read here: Protocol not known: gopher"):
        expand("gopher://host/0.tar")


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("https://me:p@ss@host:1/a/0.tar?X-Amz-Signature=1&b#c", "https://host:1/a/0.tar"),
        ("403, url='https://me@host/a?b=c' and s3://b/k", "403, url='https://host/a' and s3://b/k"),
        ("http://host?key=1", "http://host"),
        ("http://host/0.tar#key", "http://host/0.tar"),
        ("/a/b@c?d#e.tar", "/a/b@c?d#e.tar"),
    ],
)
def test_secrets_of_addresses_are_not_shown(text, printed):
    assert shown(text) == printed
