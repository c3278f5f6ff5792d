"""Tar shards read at any place: what is found, and what is counted as unusable."""

import gc
import gzip
import io
import logging
import os
import pickle
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from conftest import drawn_image, drawn_pair
from reading import SMALL, pair_members, read_all, write_tar
from webdataset.tariterators import base_plus_ext

from align_train.data import EvaluationBatches, Shard, find_shards
from align_train.data.storage.shards import OpenFiles, all_places
from align_train.data.storage.tars import BrokenShard, _any_members, _key_and_kind, _members


def read_by_webdataset(path):
    samples = list(wds.WebDataset(str(path), shardshuffle=False))
    gc.collect()  # webdataset leaves its files to the collector; here, where the warning is expected
    return samples


# Shards


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("sidecar", [True, False])
def test_a_shard_reads_as_webdataset_reads_it(make_shards, sidecar):
    path = make_shards(7) / "00000.tar"
    if not sidecar:
        path.with_suffix(".parquet").unlink()
    samples = read_by_webdataset(path)
    assert len(samples) == 7
    assert read_all(Shard(path)) == [(s["__key__"], s["jpg"], s["txt"].decode()) for s in samples]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_tar_of_webdatasets_own_writer(tmp_path):
    path = tmp_path / "a.tar"
    long = "folder/" + "k" * 120  # its header does not fit into one block
    with wds.TarWriter(str(path)) as writer:
        for number, (key, extension) in enumerate([("a", "jpg"), ("sub/b", "PNG"), (long, "webp")]):
            image = drawn_image(number, format={"jpg": "JPEG"}.get(extension, extension))
            writer.write({"__key__": key, extension: image, "txt": f" ünï {number}\n", "json": {"number": number}})
    samples = read_by_webdataset(path)
    assert [sample["__key__"] for sample in samples] == ["a", "sub/b", long]
    images = [samples[0]["jpg"], samples[1]["png"], samples[2]["webp"]]
    expected = [(s["__key__"], image, s["txt"].decode().strip()) for s, image in zip(samples, images, strict=True)]
    assert read_all(Shard(path)) == expected


def test_a_sidecar_of_img2dataset_counts_its_successes(tmp_path):
    path = write_tar(tmp_path / "a.tar", pair_members(0) + pair_members(1))
    status = ["success", "failed_to_download", "success", "failed_to_resize"]
    rows = {"key": list("abcd"), "status": status, "error_message": [None, "404", None, "small"]}
    pq.write_table(pa.table(rows), path.with_suffix(".parquet"))
    assert lost(path) == 1  # two came, and so many are there: whether more were to come nothing tells
    path = write_tar(tmp_path / "b.tar", pair_members(0) + pair_members(1))
    pq.write_table(pa.table(rows | {"status": ["success"] * 4}), path.with_suffix(".parquet"))
    assert lost(path) == 2


def test_a_column_named_status_alone_means_nothing(tmp_path):
    path = write_tar(tmp_path / "a.tar", pair_members(0) + pair_members(1))
    pq.write_table(pa.table({"key": ["a", "b", "c"], "status": ["new", "old", "old"]}), path.with_suffix(".parquet"))
    assert lost(path) == 1


def test_a_sidecar_without_keys_counts_too(tmp_path):
    path = write_tar(tmp_path / "a.tar", pair_members(0) + pair_members(1))
    pq.write_table(pa.table({"width": [1, 2, 3]}), path.with_suffix(".parquet"))
    assert lost(path) == 1


def lost(path):
    """How many pairs a shard is found to have lost, once its end is gone."""
    assert Shard(path).lost(Shard(path).index()) == 0  # a whole tar has lost nothing, whatever its sidecar says
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    os.truncate(path, last.offset_data + -(-last.size // 512) * 512)
    return Shard(path).lost(Shard(path).index())


def test_a_sidecar_that_is_no_parquet(make_shards):
    path = make_shards(2) / "00000.tar"
    path.with_suffix(".parquet").write_bytes(b"PAR1 it is not")
    with pytest.raises(BrokenShard, match=r"00000\.parquet is not readable parquet .*write the shard again"):
        lost(path)


CUTS = {
    "image": (lambda image, text: image.offset_data + 100, 4),
    "image header": (lambda image, text: image.offset + 100, 4),
    "before a member": (lambda image, text: image.offset, 4),
    "caption": (lambda image, text: text.offset_data, 4),
    "after the caption": (lambda image, text: text.offset_data + 512, 5),
}


def cut_shard(folder, cut):
    """Cut off the tail of a shard of 8 pairs in its pair 4; returns its path and the number of pairs before the cut."""
    path = folder / "00000.tar"
    with tarfile.open(path) as tar:
        image, text = tar.getmembers()[12:14]
    place, whole_pairs = CUTS[cut]
    os.truncate(path, place(image, text))
    return path, whole_pairs


@pytest.mark.parametrize("cut", CUTS)
def test_a_truncated_shard_with_a_sidecar(make_shards, cut):
    whole = read_all(Shard(make_shards(8, name="whole") / "00000.tar"))
    path, pairs = cut_shard(make_shards(8), cut)
    assert read_all(Shard(path)) == whole[:pairs] + ["truncated_shard"] * (8 - pairs)


@pytest.mark.parametrize("cut", CUTS)
def test_a_truncated_shard_without_a_sidecar(make_shards, cut):
    whole = read_all(Shard(make_shards(8, name="whole") / "00000.tar"))
    path, pairs = cut_shard(make_shards(8), cut)
    path.with_suffix(".parquet").unlink()
    assert read_all(Shard(path)) == [*whole[:pairs], "truncated_shard"]  # how many are lost nothing tells


def test_a_truncated_shard_is_counted_in_batches(make_shards, caplog):
    path, pairs = cut_shard(make_shards(8), "image")
    with caplog.at_level(logging.WARNING):
        (batch,) = EvaluationBatches([Shard(path)], SMALL, batch_size=8)
    assert len(batch) == pairs
    assert batch.dropped == {"truncated_shard": 4}
    assert str(path) in caplog.text


def test_a_header_broken_in_the_middle_is_not_silent(make_shards):
    path = make_shards(8) / "00000.tar"
    path.with_suffix(".parquet").unlink()
    with tarfile.open(path) as tar:
        place = tar.getmembers()[12].offset
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"\xa5" * 512)
    assert read_all(Shard(path))[4:] == ["truncated_shard"]


@pytest.mark.parametrize("content", [b"", b"hello", b"<html>" * 300, gzip.compress(b"tar" * 900)], ids=len)
def test_a_file_that_is_no_tar(tmp_path, content):
    path = tmp_path / "page.tar"
    path.write_bytes(content)
    with pytest.raises(BrokenShard, match=r"page\.tar is not a tar file .*write the shard again"):
        Shard(path).index()


def test_an_empty_tar_has_no_pair(tmp_path):
    path = write_tar(tmp_path / "a.tar", [])
    assert read_all(Shard(path)) == []
    with pytest.raises(ValueError, match="the 1 shards hold no pair"):
        EvaluationBatches([Shard(path)], SMALL)


def test_pairs_that_lack_something(tmp_path):
    image = drawn_image(0)
    members = [("a.jpg", image), ("b.txt", b"no image"), ("c.json", b"{}"), ("d.jpg", image), ("d.txt", b" \n")]
    path = write_tar(tmp_path / "a.tar", [*members, ("no-extension", b"x"), ("e.JPG", image), ("e.txt", b"\xff fine")])
    whole = ("e", image, "� fine")
    assert read_all(Shard(path)) == ["no_caption", "no_image", "no_image", "empty_caption", whole]


def test_of_two_pairs_with_one_key_the_first_is_used_whole(tmp_path):
    images = [drawn_image(number) for number in range(3)]
    path = write_tar(
        tmp_path / "a.tar",
        [("a.jpg", images[0]), ("a.txt", b"one"), ("a.jpg", images[1]), ("a.txt", b"two"), ("a.png", images[2])],
    )
    assert read_all(Shard(path)) == [("a", images[0], "one"), "duplicate_key", "duplicate_key"]


def test_members_of_a_pair_need_not_be_neighbours(tmp_path):
    images, texts = zip(*(pair_members(number) for number in range(3)), strict=True)
    assert read_all(Shard(write_tar(tmp_path / "a.tar", [*images, *texts]))) == [
        (drawn_pair(number).key, drawn_pair(number).image, drawn_pair(number).caption) for number in range(3)
    ]


def test_names_split_as_webdataset_splits_them(tmp_path):
    names = ["a.jpg", "b/c.d/e.f.jpg", "b/c.d/e", ".hidden", "x.", "dir.with.dots/y.txt", "ünï.TXT"]
    for name in names:
        key, extension = base_plus_ext(name)
        expected = ("", "") if not key else (key, "image" if extension == "jpg" else extension.lower())
        assert _key_and_kind(name) == expected
    assert _key_and_kind("b/._cat.jpg") == ("", "")  # a hidden file of macOS, a pair named b/ to webdataset


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["short.jpg", "folder/" * 12 + "deep.jpg", "l" * 150 + ".jpg", "ünï/ß.jpg"])
def test_plain_headers_read_as_the_standard_library_reads_them(tmp_path, format, name):
    if format == tarfile.USTAR_FORMAT and len(name) > 140:
        pytest.skip("the format has no room for such a name")
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=format) as tar:
        folder, link = tarfile.TarInfo("folder/"), tarfile.TarInfo("link.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link.type, link.linkname = tarfile.SYMTYPE, "short.jpg"
        members = [(name, b"x" * 700), ("empty.txt", b""), ("block.txt", b"y" * 512)]
        for number, (member, content) in enumerate(members):
            if number == 2 and len(name) == 9:
                tar.addfile(link)
            entry = tarfile.TarInfo(member)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    with path.open("rb") as file:
        theirs = _any_members(file, path)
    assert _members(path) == theirs
    assert [member for member, _ in theirs[0]] == [name, "empty.txt", "block.txt"]
    content = path.read_bytes()
    assert [content[span.offset : span.offset + span.size] for _, span in theirs[0]] == [b"x" * 700, b"", b"y" * 512]
    assert theirs[1]


def test_a_shard_can_be_pickled(make_shards):
    shard = Shard(make_shards(3) / "00000.tar")
    whole = read_all(shard)
    assert read_all(pickle.loads(pickle.dumps(shard))) == whole  # noqa: S301


def open_files():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux's /proc")
def test_only_so_many_files_are_open(make_shards):
    shards = find_shards(str(make_shards(12, pairs_per_shard=1)))
    files, before = OpenFiles(limit=3), open_files()
    contents = []
    for _ in range(2):
        for place in all_places(shards):
            contents.append(files.read(shards[place.shard].path, place.image, place.key))
            assert open_files() - before <= 3
    assert contents == [drawn_pair(number).image for number in range(12)] * 2
    files.close()
    assert open_files() == before


def test_find_shards(make_shards, tmp_path):
    one, two = make_shards(3, 1, "one"), make_shards(2, 1, "t[w]o")
    ones = [one / f"0000{n}.tar" for n in range(3)]
    assert [shard.path for shard in find_shards(f"{one}/*.tar")] == ones
    assert [shard.path for shard in find_shards(str(one))] == ones  # a folder, for all its tars
    assert [shard.path for shard in find_shards([str(ones[2]), str(two)])] == [ones[2], *sorted(two.glob("*.tar"))]
    assert [shard.path for shard in find_shards(f"{tmp_path}/**/00002.tar")] == [ones[2]]


@pytest.mark.parametrize("pattern", ["missing/*.tar", "missing/00000.tar", "missing", "here", "here/*.tar"])
def test_no_shard_is_an_error_that_names_the_remedy(tmp_path, pattern):
    (tmp_path / "here").mkdir()
    with pytest.raises(FileNotFoundError, match="align-train prepare") as raised:
        find_shards([str(tmp_path / pattern)])
    assert repr(str(tmp_path / pattern)) in str(raised.value)
