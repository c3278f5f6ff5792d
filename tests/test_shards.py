"""The shard writer: layout, exact content, determinism, atomicity, counted drops."""

import gc
import json
import tarfile
from io import BytesIO

import pyarrow.parquet as pq
import pytest
import webdataset as wds
from PIL import Image

from align_train.corpus.shards import ShardWriter, atomic_write, image_format, tar_key, write_shards
from align_train.records import Pair


def encoded(format, colour=0):
    buffer = BytesIO()
    Image.new("RGB", (4, 3), (colour, 10, 20)).save(buffer, format)
    return buffer.getvalue()


def some_pairs(count=5):
    formats = ["PNG", "JPEG", "WEBP"]
    return [
        Pair(
            f"k{i}",
            encoded(formats[i % 3], i),
            f"été {i}",
            {"width": 4, "score": i / 2, "tags": ["a", "b"], "none": None},
        )
        for i in range(count)
    ]


def members(tar_path):
    with tarfile.open(tar_path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_layout_and_content(tmp_path):
    pairs = some_pairs()
    report = write_shards(pairs, tmp_path / "out", pairs_per_shard=2)
    assert [path.name for path in report.shards] == ["00000.tar", "00001.tar", "00002.tar"]
    assert report.pairs == 5
    assert report.bytes == sum(path.stat().st_size for path in report.shards)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {f"0000{n}.{kind}" for n in range(3) for kind in ("tar", "json", "parquet")}
    first = members(report.shards[0])
    assert set(first) == {"k0.png", "k0.txt", "k0.json", "k1.jpg", "k1.txt", "k1.json"}
    assert first["k1.jpg"] == pairs[1].image
    assert first["k0.txt"].decode() == "été 0"
    assert json.loads(first["k1.json"]) == {**pairs[1].metadata, "key": "k1", "caption": "été 1"}
    counts = json.loads((tmp_path / "out" / "00000.json").read_text())
    assert counts.keys() == {"pairs", "bytes", "dropped", "seconds"}
    assert (counts["pairs"], counts["bytes"]) == (2, report.shards[0].stat().st_size)


def read_by_webdataset(*tars):
    samples = list(wds.WebDataset([str(path) for path in tars], shardshuffle=False))
    gc.collect()  # webdataset leaves its files to the collector; here, where the warning is expected
    return samples


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_webdataset_reads_it_back(tmp_path):
    pairs = some_pairs()
    report = write_shards(pairs, tmp_path, pairs_per_shard=3)
    for pair, sample in zip(pairs, read_by_webdataset(*report.shards), strict=True):
        assert sample["__key__"] == pair.key
        assert sample["txt"].decode() == pair.caption
        assert sample[image_format(pair.image)] == pair.image


def test_sidecar_equals_tar(tmp_path):
    pairs = some_pairs()
    write_shards(pairs, tmp_path)
    rows = pq.read_table(tmp_path / "00000.parquet").to_pylist()
    content = members(tmp_path / "00000.tar")
    assert [row["key"] for row in rows] == [name[:-5] for name in content if name.endswith(".json")]
    for row, pair in zip(rows, pairs, strict=True):
        document = json.loads(content[f"{row['key']}.json"])
        assert row["caption"] == document["caption"] == content[f"{row['key']}.txt"].decode()
        assert row["bytes"] == len(content[f"{row['key']}.{image_format(pair.image)}"])
        assert (row["width"], row["score"]) == (document["width"], document["score"])
        assert json.loads(row["tags"]) == document["tags"]
        assert "none" not in row  # a column without a single value


def test_same_pairs_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_shards(some_pairs(), tmp_path / name, "p-", pairs_per_shard=2)
    for kind in ("tar", "parquet"):
        for a in sorted((tmp_path / "a").glob(f"*.{kind}")):
            assert a.read_bytes() == (tmp_path / "b" / a.name).read_bytes()


def test_drops_are_counted_where_they_happen(tmp_path):
    good = some_pairs(3)
    bad = [
        Pair("e", good[0].image, " \n"),
        Pair("h", b"<html>not an image</html>", "page"),
        Pair("n", b"", "no image"),
        Pair("k1", good[0].image, "again"),
    ]
    report = write_shards([*good[:2], *bad[:1], good[2], *bad[1:]], tmp_path, pairs_per_shard=2)
    assert report.pairs == 3
    assert report.dropped == {"empty_caption": 1, "unknown_image_format": 2, "duplicate_key": 1}
    drops = [json.loads((tmp_path / f"0000{n}.json").read_text())["dropped"] for n in range(2)]
    assert drops == [{"empty_caption": 1}, {"unknown_image_format": 2, "duplicate_key": 1}]
    assert "duplicate_key 1, empty_caption 1" in report.described()


def test_nothing_usable_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"nothing to write .*empty_caption 1"):
        write_shards([Pair("a", encoded("PNG"), "")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_formats_by_content(format):
    assert image_format(encoded(format)) == {"JPEG": "jpg"}.get(format, format.lower())


def test_text_is_no_image():
    assert image_format(b"BMW has no such page") is None


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_keys_are_safe_and_stay_distinct(tmp_path):
    keys = ["a.b", "a/b", "a_b", "a%2Eb", "ä b"]
    assert len({tar_key(key) for key in keys}) == len(keys)
    image = encoded("PNG")
    report = write_shards([Pair(key, image, "c") for key in keys], tmp_path)
    samples = read_by_webdataset(*report.shards)
    assert [sample["__key__"] for sample in samples] == [tar_key(key) for key in keys]
    assert all(sample["png"] == image for sample in samples)
    with pytest.raises(ValueError, match="empty key"):
        tar_key("")


def test_existing_shards_are_refused_unless_overwritten(tmp_path):
    write_shards(some_pairs(5), tmp_path, pairs_per_shard=1)
    with pytest.raises(ValueError, match=r"already holds 15 shard files .*overwrite=true"):
        write_shards(some_pairs(2), tmp_path)
    write_shards(some_pairs(1), tmp_path, "other-")  # another group may share the folder
    with pytest.raises(ValueError, match="nothing to write"):
        write_shards([], tmp_path, overwrite=True)
    assert len(list(tmp_path.glob("0*.tar"))) == 5  # replaced only when the first new shard is ready
    write_shards(some_pairs(2), tmp_path, overwrite=True)
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == ["00000.tar", "other-00000.tar"]


def test_a_write_that_fails_leaves_no_file(tmp_path):
    pairs = [*some_pairs(2), Pair("bad", encoded("PNG"), "c", {"when": object()})]
    with pytest.raises(ValueError, match="metadata of pair bad"):
        write_shards(pairs, tmp_path)
    assert list(tmp_path.iterdir()) == []


def broken_source():
    yield from some_pairs(3)
    raise OSError("the disk went away")


def test_a_source_that_fails_leaves_whole_shards_only(tmp_path):
    with pytest.raises(OSError, match="the disk went away"):
        write_shards(broken_source(), tmp_path, pairs_per_shard=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.json", "00000.parquet", "00000.tar"]


def half_written(path):
    with atomic_write(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt


def test_atomic_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        half_written(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_pairs_per_shard_is_checked(tmp_path):
    with pytest.raises(ValueError, match="pairs_per_shard is 0"):
        ShardWriter(tmp_path, pairs_per_shard=0)
