"""Test sets of images with captions: what is read, and what is refused."""

import csv
import json
import logging
import os
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import drawn_image, drawn_pair
from fsspec.implementations.memory import MemoryFileSystem
from reading import pair_members, write_tar

from align_train.corpus.images import Unusable
from align_train.corpus.sample_corpus import read_sample
from align_train.corpus.shards import write_shards
from align_train.data.captions import Captions
from align_train.data.storage.cache import Cache
from align_train.data.storage.shards import Shard
from align_train.data.testsets import Karpathy, SamplePart, ShardPairs, Table
from align_train.data.testsets.files import ImageFiles
from align_train.data.testsets.shard_images import ShardImages

CAPTIONS = [["a red cat", 'the cat, "red"'], ["ünï dog"], ["tree", "tree 2", "a tree"]]
NAMES = ["one.jpg", "sub/two.jpg", "three.jpg"]
IMAGES = [drawn_image(number) for number in range(3)]
ROWS = [{"image": name, "caption": text} for name, texts in zip(NAMES, CAPTIONS, strict=True) for text in texts]


@pytest.fixture
def folder(tmp_path):
    """The three images in the folder `images`."""
    for name, image in zip(NAMES, IMAGES, strict=True):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    return tmp_path


def entry(name, texts, split="test"):
    folder, _, file = name.rpartition("/")
    sentences = [{"raw": text, "tokens": text.split(), "sentid": 0, "imgid": 0} for text in texts]
    return {"filename": file, "split": split, "sentences": sentences} | ({"filepath": folder} if folder else {})


def karpathy(folder, entries=None, **settings):
    test = [entry(name, texts) for name, texts in zip(NAMES, CAPTIONS, strict=True)]
    entries = [entry("other.jpg", ["other"], "train"), *test] if entries is None else entries
    path = folder / "dataset_toy.json"
    path.write_text(json.dumps({"images": entries, "dataset": "toy"}))
    return Karpathy(str(path), str(folder / "images"), **settings)


def separated(folder, suffix, rows=ROWS, **settings):
    path = folder / f"table{suffix}"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter={".csv": ",", ".tsv": "\t"}[suffix])
        writer.writeheader()
        writer.writerows(rows)
    return Table(str(path), str(folder / "images"), **settings)


def json_lines(folder, rows=ROWS, **settings):
    path = folder / "table.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Table(str(path), str(folder / "images"), **settings)


def parquet(folder, columns, **settings):
    pq.write_table(pa.table(columns), folder / "table.parquet", row_group_size=2)
    return Table(str(folder / "table.parquet"), str(folder / "images"), **settings)


def by_column(rows):
    return {name: [row[name] for row in rows] for name in rows[0]}


def with_bytes(folder, wrap):
    image = dict(zip(NAMES, IMAGES, strict=True))
    return parquet(folder, by_column([{**row, "image": wrap(image[row["image"]])} for row in ROWS]))


FORMATS = {
    "karpathy": karpathy,
    "csv": lambda folder: separated(folder, ".csv"),
    "tsv": lambda folder: separated(folder, ".tsv"),
    "jsonl": json_lines,
    "jsonl with lists": lambda folder: json_lines(
        folder, [{"image": name, "caption": texts} for name, texts in zip(NAMES, CAPTIONS, strict=True)]
    ),
    "parquet with paths": lambda folder: parquet(folder, by_column(ROWS)),
    "parquet with bytes": lambda folder: with_bytes(folder, bytes),
    "parquet of datasets": lambda folder: with_bytes(folder, lambda image: {"bytes": image, "path": None}),
    "parquet with lists": lambda folder: parquet(folder, {"img": IMAGES, "text": CAPTIONS}),
}


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_the_same_pairs(folder, form):
    opened = FORMATS[form](folder).open()
    assert opened.captions == [text for texts in CAPTIONS for text in texts]
    assert opened.image_of_caption.tolist() == [0, 0, 1, 2, 2, 2]
    assert [opened.images.read(number) for number in range(3)] == IMAGES
    assert len(set(opened.images.keys)) == 3
    assert opened.images.keys[1] in opened.images.where(1)
    assert not opened.dropped


@pytest.mark.parametrize("form", ["karpathy", "parquet with bytes", "shards"])
def test_images_are_read_by_threads_at_once_and_after_pickling(folder, make_shards, form):
    if form == "shards":
        opened, images = ShardPairs(str(make_shards(20, 7))).open(), [drawn_pair(n).image for n in range(20)]
    else:
        opened, images = FORMATS[form](folder).open(), IMAGES
    copy = pickle.loads(pickle.dumps(opened))  # noqa: S301 # our own
    numbers = list(range(len(images))) * 20
    with ThreadPoolExecutor(8) as threads:
        for each in (opened, copy):
            assert list(threads.map(each.images.read, numbers)) == images * 20


def digest_of(opened, *without):
    kept = torch.ones(len(opened.images.keys), dtype=torch.bool)
    kept[list(without)] = False
    return opened.digest(kept)


def test_the_digest_tells_captions_and_splits_apart_but_not_folders(folder, tmp_path_factory):
    digest = digest_of(karpathy(folder).open())
    other = tmp_path_factory.mktemp("other")
    (folder / "images").rename(other / "images")
    assert digest_of(karpathy(other).open()) == digest
    entries = [entry(name, texts) for name, texts in zip(NAMES, CAPTIONS, strict=True)]
    changed = [entry(NAMES[0], ["a red cat!", CAPTIONS[0][1]]), *entries[1:]]
    assert digest_of(karpathy(other, changed).open()) != digest
    assert digest_of(karpathy(other, [{**each, "split": "val"} for each in entries], split="val").open()) == digest
    fewer = digest_of(karpathy(other, entries[1:]).open())
    assert fewer != digest
    assert digest_of(karpathy(other, entries).open(), 0) == fewer  # an image that does not count


# What lies where


def written_again(path, content=None):
    """The same file name, with a time of writing that any file system tells apart."""
    if content is not None:
        path.write_bytes(content)
    before = path.stat()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 2_000_000_000))


@pytest.mark.parametrize("form", ["karpathy", "csv", "parquet with bytes", "shards"])
def test_identity_changes_when_a_file_is_written_again_under_its_name(folder, make_shards, form):
    photo, shards = folder / "images" / NAMES[2], make_shards(4)
    files = {"shards": shards / "00000.tar", "parquet with bytes": folder / "table.parquet"}
    data = ShardPairs(str(shards)) if form == "shards" else FORMATS[form](folder)
    opened = data.open()
    before = opened.images.identity
    assert replace(data).open().images.identity == before
    written_again(files.get(form, photo))
    assert opened.images.identity != before


def test_the_same_name_in_two_working_directories_is_two_images(tmp_path, monkeypatch):
    images, found = ImageFiles(("a",), ("a.jpg",)), []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jpg").write_bytes(b"1234")
        os.utime(tmp_path / name / "a.jpg", ns=(0, 0))
        monkeypatch.chdir(tmp_path / name)
        found.append(images.identity)
        assert ImageFiles(("a",), (str(tmp_path / name / "a.jpg"),)).identity == found[-1]
    assert found[0] != found[1]


def test_identity_tells_columns_rows_and_members_apart(folder, make_shards):
    two = {"image": IMAGES, "photo": IMAGES, "caption": ["a", "b", "c"]}
    table = parquet(folder, two)
    photo = Table(table.path, image_column="photo").open().images
    assert table.open().images.identity != photo.identity
    pairs = ShardPairs(str(make_shards(6))).open().images
    fewer = ShardImages(pairs.shards, pairs.keys[1:], pairs.places[1:])
    assert fewer.identity != pairs.identity


def test_a_remote_shard_is_known_by_address_and_size_and_not_by_the_time_of_its_copy(tmp_path):
    store = MemoryFileSystem()
    store.pipe("/tests/0.tar", b"a" * 1000)

    def identity(folder):
        return ShardImages([Shard("memory://tests/0.tar", Cache(str(tmp_path / folder)))], (), ()).identity

    first = identity("here")
    assert identity("there") == first
    store.pipe("/tests/0.tar", b"a" * 1001)
    assert identity("later") != first
    store.rm("/tests", recursive=True)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([entry("\udce9.jpg", ["one"])], "1 of 1 image names are not UTF-8: '\\udce9.jpg'. Rename them"),
        ([entry("one.jpg", ["a \ud83d cat", "b"])], "1 of 2 captions are not UTF-8: 'a \\ud83d cat'. Write the"),
    ],
)
def test_half_characters_are_refused_by_name(folder, entries, message):
    (folder / "images" / "\udce9.jpg").write_bytes(IMAGES[0])
    with pytest.raises(ValueError, match=re.escape(message)):
        karpathy(folder, entries).open()


def test_what_is_lost_and_what_is_not_of_the_set_are_told_apart(folder, make_shards, caplog):
    caplog.set_level(logging.INFO)
    karpathy(folder, [entry("one.jpg", [f"caption {n}" for n in range(7)])]).open()
    assert [(each.levelname, "further_caption 2" in each.message) for each in caplog.records] == [("INFO", True)]


# Karpathy's splits


def test_the_first_five_captions_of_an_image_are_taken_and_the_others_counted(folder):
    entries = [entry("one.jpg", [f"caption {n}" for n in range(7)]), entry("three.jpg", ["three"])]
    opened = karpathy(folder, entries).open()
    assert opened.captions == [*(f"caption {n}" for n in range(5)), "three"]
    assert opened.left_out == {"further_caption": 2}
    assert not opened.dropped
    everything = karpathy(folder, entries, captions_per_image=None).open()
    assert len(everything.captions) == 8
    assert not everything.left_out
    with pytest.raises(ValueError, match="captions_per_image is 0"):
        karpathy(folder, entries, captions_per_image=0)


def test_files_of_coco_are_found_without_their_folder_too(folder):
    opened = karpathy(folder, [entry("val2014/one.jpg", ["one"]), entry("sub/two.jpg", ["two"])]).open()
    assert opened.images.keys == ("val2014/one.jpg", "sub/two.jpg")
    assert [opened.images.read(number) for number in range(2)] == IMAGES[:2]
    assert opened.name == "toy test"


def test_an_empty_split_is_refused_with_those_that_there_are(folder):
    with pytest.raises(ValueError, match=r"no image in the split validation: its splits are test \(3\), train \(1\)"):
        karpathy(folder, split="validation").open()
    with pytest.raises(ValueError, match="its splits are none at all"):
        karpathy(folder, []).open()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "is list, without images that have a split"),
        ('{"images": [{"id": 1}], "annotations": []}', "is an object of images, annotations, without images"),
    ],
)
def test_another_json_is_refused(folder, content, message):
    (folder / "other.json").write_text(content)
    with pytest.raises(ValueError, match=message + ".*dataset_coco.json"):
        Karpathy(str(folder / "other.json"), str(folder)).open()


def test_a_missing_file_of_annotations_is_named(folder):
    with pytest.raises(FileNotFoundError, match=r"gone\.json"):
        Karpathy(str(folder / "gone.json"), str(folder)).open()


def test_missing_images_are_all_counted_and_five_named(folder):
    entries = [entry(f"{number}.jpg", ["text"]) for number in range(7)] + [entry("one.jpg", ["one"])]
    named = "0.jpg, 1.jpg, 2.jpg, 3.jpg, 4.jpg and 2 more"
    message = f"7 of 8 image files are missing: {named}. Put them under {folder / 'images'}"
    with pytest.raises(ValueError, match=re.escape(message)):
        karpathy(folder, entries).open()
    with pytest.raises(ValueError, match="3 of 3 image files are missing"):
        Karpathy(karpathy(folder).annotations, str(folder / "nowhere")).open()


def test_a_folder_in_place_of_an_image_is_no_image(folder):
    with pytest.raises(ValueError, match="1 of 1 image files are missing: sub"):
        karpathy(folder, [entry("sub", ["text"])]).open()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([entry("one.jpg", ["one"]), entry("one.jpg", ["two"])], "1 of 1 image names come more than once: one.jpg"),
        ([entry("one.jpg", []), entry("three.jpg", ["three"])], "1 of 2 images have no caption: one.jpg"),
        ([entry("one.jpg", ["one", " \n"])], "1 of 1 images have an empty caption: one.jpg"),
        ([entry("", ["one"]), entry("one.jpg", ["one"])], "1 of 2 images have captions and no filename: image 0"),
        ([{**entry("one.jpg", []), "sentences": ["one"]}], "1 of 1 images have no sentences with a raw text: one.jpg"),
    ],
)
def test_broken_annotations_are_refused_with_names(folder, entries, message):
    with pytest.raises(ValueError, match=message):
        karpathy(folder, entries).open()


# Tables


def test_columns_of_usual_names_are_taken_and_told(folder, caplog):
    rows = [{"url": "u", "Title": row["caption"], "filepath": row["image"]} for row in ROWS]
    with caplog.at_level(logging.INFO):
        opened = separated(folder, ".csv", rows).open()
    assert opened.captions[0] == "a red cat"
    assert "images from the column filepath, captions from Title" in caplog.text


def test_columns_keys_and_delimiter_can_be_set(folder):
    rows = [{"a": row["image"], "b": row["caption"], "id": NAMES.index(row["image"]) + 7} for row in ROWS]
    path = folder / "semicolons.csv"
    path.write_text("a;b;id\n" + "".join(f"{row['a']};{row['b']};{row['id']}\n" for row in rows if '"' not in row["b"]))
    settings = {"image_column": "a", "caption_column": "b", "key_column": "id", "delimiter": ";", "name": "mine"}
    opened = Table(str(path), str(folder / "images"), **settings).open()
    assert opened.images.keys == ("7", "8", "9")
    assert opened.name == "mine"


@pytest.mark.parametrize("setting", ["image_column", "caption_column", "key_column"])
def test_a_column_that_is_not_there_is_refused_with_those_that_are(folder, setting):
    with pytest.raises(ValueError, match=f"has no column gone: set {setting} to one of image, caption"):
        json_lines(folder, **{setting: "gone"}).open()


def test_a_table_without_usual_names_lists_its_columns(folder):
    with pytest.raises(ValueError, match="no column of a usual name: set image_column to one of a, b"):
        separated(folder, ".csv", [{"a": "one.jpg", "b": "text"}]).open()


def test_images_are_looked_for_beside_the_table(folder):
    path = folder / "images" / "captions.csv"
    path.write_text("image,caption\none.jpg,one\n")
    opened = Table(str(path)).open()
    assert opened.images.read(0) == IMAGES[0]
    assert opened.name == "captions"


def test_several_parquet_files_are_one_table(folder):
    for number in range(2):
        columns = {"image": [IMAGES[number], IMAGES[2]], "caption": [f"first {number}", f"second {number}"]}
        pq.write_table(pa.table(columns), folder / f"part-{number}.parquet")
    opened = Table(str(folder / "part-*.parquet")).open()
    assert opened.captions == ["first 0", "second 0", "second 1", "first 1"]
    assert [opened.images.read(number) for number in range(3)] == [IMAGES[0], IMAGES[2], IMAGES[1]]


def test_at_most_two_row_groups_of_images_are_in_memory(folder):
    images = parquet(folder, {"image": [drawn_image(n) for n in range(9)], "caption": list("abcdefghi")}).open().images
    assert [images.read(n) for n in (0, 8, 3, 0)] == [drawn_image(n) for n in (0, 8, 3, 0)]
    assert len(images._groups) == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"image": "", "caption": "a"}, *ROWS], "1 of 7 rows have no image: row 1"),
        ([{"image": "one.jpg", "caption": None}, *ROWS], "1 of 7 rows have no caption: row 1"),
        ([{"image": "one.jpg", "caption": []}], "1 of 1 rows have no caption: row 1"),
        ([{"image": "one.jpg", "caption": ["a", ""]}], "1 of 1 images have an empty caption: one.jpg"),
        ([{"image": "one.jpg", "caption": 7}], "1 of 1 rows have a caption that is no text: row 1"),
        ([{"image": "no.jpg", "caption": "a"}, *ROWS], "1 of 4 image files are missing: no.jpg"),
    ],
)
def test_rows_that_lack_something_are_refused_with_names(folder, rows, message):
    with pytest.raises(ValueError, match=message):
        json_lines(folder, rows).open()


def test_a_key_of_two_images_is_refused(folder):
    rows = [{"image": name, "caption": "a", "id": "same"} for name in NAMES]
    with pytest.raises(ValueError, match="1 of 1 keys name several images: same"):
        json_lines(folder, rows, key_column="id").open()


def test_a_row_of_parquet_without_bytes_is_refused(folder):
    with pytest.raises(ValueError, match="1 of 2 rows have no image: row 2"):
        parquet(folder, {"image": [IMAGES[0], None], "caption": ["a", "b"]}).open()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "is empty"),
        ("a.csv", "image,caption\n", "no image that could be used"),
        ("a.csv", "image,caption\none.jpg,red, cat\n", "line 2 has 3 fields and the first line 2"),
        ("a.csv", 'image,caption\none.jpg,"red" cat\n', "is not readable csv"),
        ("a.jsonl", '{"image": "a", "text": "b"}\n{"image"', "line 2 is no JSON"),
        ("a.jsonl", "[1]\n", "line 1 is list: write one object a line"),
        ("a.parquet", "no parquet", "is not readable parquet"),
        ("a.xlsx", "", r"ends with .xlsx: give files of one kind, .csv, .tsv, .jsonl, .parquet"),
    ],
)
def test_unreadable_tables_are_refused(folder, name, content, message):
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        Table(str(folder / name)).open()


def test_text_of_another_encoding_is_refused(folder):
    (folder / "a.csv").write_bytes("image,caption\none.jpg,ünï\n".encode("latin-1"))
    with pytest.raises(ValueError, match="is not readable csv"):
        Table(str(folder / "a.csv")).open()


def test_a_table_that_is_not_there_is_named(folder):
    with pytest.raises(FileNotFoundError, match=r"there is no table .*gone\.csv"):
        Table(str(folder / "gone.csv")).open()


# Shards


def test_shards_give_their_pairs_in_order(make_shards):
    folder = make_shards(20, 7)
    opened = ShardPairs([f"{folder}/*.tar"], name="toy").open()
    pairs = [drawn_pair(number) for number in range(20)]
    assert opened.images.keys == tuple(pair.key for pair in pairs)
    assert opened.captions == [pair.caption for pair in pairs]
    assert opened.image_of_caption.tolist() == list(range(20))
    assert [opened.images.read(number) for number in range(20)] == [pair.image for pair in pairs]
    assert opened.images.where(8) == f"pair-00008 in {folder}/00001.tar"
    assert opened.name == "toy"


def test_the_layout_of_the_sample(tmp_path):
    pairs = list(islice((pair for pair in read_sample() if pair.metadata.get("category")), 30))
    write_shards(pairs, tmp_path / "sample/test_unseen_rendering/shards", "", 20)
    data = ShardPairs(f"{tmp_path}/sample/test_unseen_rendering/shards/*.tar")
    assert [data.open().images.read(number) for number in range(30)] == [pair.image for pair in pairs]
    category = pairs[4].metadata["category"]
    expected = [pair.metadata["category"] == category for pair in pairs]
    assert data.excluded({"category": [category]}).tolist() == expected


def test_pairs_that_are_lost_are_counted_by_reason(tmp_path, caplog):
    members = [("no-text.jpg", IMAGES[0]), ("no-image.txt", b"text"), ("blank.jpg", IMAGES[1]), ("blank.txt", b" ")]
    path = write_tar(tmp_path / "a.tar", [*pair_members(0), *members, *pair_members(0), *pair_members(1)])
    opened = ShardPairs(str(path)).open()
    assert opened.images.keys == ("pair-00000", "pair-00001")
    assert opened.dropped == {"no_caption": 1, "no_image": 1, "empty_caption": 1, "duplicate_key": 1}
    assert f"left out no_caption: no-text in {path}" in caplog.text
    assert "2 images remain" in caplog.text


def test_a_truncated_shard_is_counted_and_one_that_shrinks_is_told(make_shards):
    path = make_shards(4) / "00000.tar"
    whole = path.read_bytes()
    opened = ShardPairs(str(path)).open()
    path.write_bytes(whole[:-9000])
    with pytest.raises(Unusable, match="truncated_shard: pair-00003 in"):
        opened.images.read(3)
    again = ShardPairs(str(path)).open()
    assert len(again.images.keys) + again.dropped["truncated_shard"] == 4
    assert again.dropped["truncated_shard"]


def test_shards_without_a_usable_pair_are_refused(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.jpg", IMAGES[0])])
    with pytest.raises(ValueError, match=r"no image that could be used \(no_caption 1\)"):
        ShardPairs(str(path)).open()


def test_two_shards_with_a_pair_of_one_key_are_refused(tmp_path):
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", pair_members(3))
    with pytest.raises(ValueError, match="1 of 1 image names come more than once: pair-00003"):
        ShardPairs(str(tmp_path)).open()


def test_captions_come_from_the_field_that_is_set(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.jpg", IMAGES[0]), ("a.json", b'{"alt": "from json"}')])
    assert ShardPairs(str(path), Captions({"json.alt": 1.0})).open().captions == ["from json"]


def test_lines_are_captions_of_one_image_where_that_is_set(tmp_path):
    members = [("a.webp", IMAGES[0]), ("a.txt", b"one\ntwo\n"), ("b.jpg", IMAGES[1]), ("b.txt", b"three")]
    path = str(write_tar(tmp_path / "a.tar", members))
    opened = ShardPairs(path, by_line=True).open()
    assert opened.captions == ["one", "two", "three"]
    assert opened.image_of_caption.tolist() == [0, 0, 1]
    assert ShardPairs(path).open().captions == ["one two", "three"]


def test_columns_of_the_sidecars_are_aligned_with_the_images(make_shards):
    folder = make_shards(9, 4)
    for path in folder.glob("*.parquet"):  # the order of a sidecar's rows means nothing
        table = pq.read_table(path)
        pq.write_table(table.take(list(range(len(table)))[::-1]), path)
    pairs = ShardPairs(str(folder))
    opened = pairs.open()
    columns = pairs.open().images.columns(["parity", "caption"])
    assert columns["caption"] == opened.captions
    assert pairs.excluded({"parity": ["odd"]}).tolist() == [bool(number % 2) for number in range(9)]
    assert pairs.excluded({"parity": ["odd"], "caption": [opened.captions[0]]}).tolist()[:3] == [True, True, False]
    assert not pairs.excluded({}).any()


def test_an_exclusion_that_no_pair_has_is_told(make_shards, caplog):
    assert not ShardPairs(str(make_shards(3))).excluded({"parity": ["Odd"]}).any()
    assert "exclude names Odd, which no parity is" in caplog.text


def test_an_exclusion_that_cannot_be_is_refused(make_shards):
    folder = make_shards(3)
    with pytest.raises(ValueError, match=r"exclude of 'parity' is the text 'odd': write a list of values, \[odd\]"):
        ShardPairs(str(folder)).excluded({"parity": "odd"})
    with pytest.raises(ValueError, match=r"'colour' is asked for, but .*00000\.tar has no sidecar with it"):
        ShardPairs(str(folder)).excluded({"colour": ["red"]})
    sidecar = folder / "00000.parquet"
    pq.write_table(pq.read_table(sidecar).slice(1), sidecar)
    with pytest.raises(ValueError, match="1 of 3 images have no row in the sidecar: pair-00000"):
        ShardPairs(str(folder)).excluded({"parity": ["odd"]})
    sidecar.unlink()
    with pytest.raises(ValueError, match="'parity' is asked for"):
        ShardPairs(str(folder)).excluded({"parity": ["odd"]})
    assert not ShardPairs(str(folder)).excluded({}).any()  # without an exclusion no sidecar is needed


def test_the_sample_is_a_test_without_any_file():
    seen, held_out = (SamplePart(concepts=concepts).open() for concepts in ("seen", "held_out"))
    everything = SamplePart().open()
    assert (len(seen.captions), len(held_out.captions), len(everything.captions)) == (1677, 173, 1850)
    assert {*seen.images.keys} | {*held_out.images.keys} == {*everything.images.keys}
    pair = next(pair for pair in read_sample() if pair.key == held_out.images.keys[7])
    assert (held_out.images.read(7), held_out.captions[7]) == (pair.image, pair.caption)
    assert seen.images.identity != held_out.images.identity
    assert pair.key in held_out.images.where(7)


@pytest.mark.parametrize("wrong", [{"part": "train"}, {"concepts": "new"}])
def test_what_is_no_part_of_the_sample_is_told(wrong):
    with pytest.raises(ValueError, match="choose test_unseen_rendering or held_out_concepts, and one of all, seen"):
        SamplePart(**wrong)
