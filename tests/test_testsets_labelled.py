"""Test sets of images with classes: what is read, and what is refused."""

import json
import logging
import os
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import drawn_image
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from reading import write_tar

from align_train.data.testsets import ClassFolders, HubDataset, Karpathy, LabelledShards

IMAGES = [drawn_image(number) for number in range(4)]
LABELS = [1, 0, 1, 2]
CLASSES = ("ant", "bee", "cat")
FEATURES = Features({"image": Image(), "label": ClassLabel(names=list(CLASSES))})
ROWS = {"image": IMAGES, "label": LABELS}


def class_folders(folder, files=None, **settings):
    files = {"bee/0.jpg": 0, "ant/1.JPEG": 1, "bee/2.png": 2, "cat/deep/3.webp": 3} if files is None else files
    for name, number in files.items():
        path = folder / "classes" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(IMAGES[number] if number is not None else b"")
    return ClassFolders(str(folder / "classes"), **settings)


def hub(folder, rows=None, features=FEATURES, split="test", **settings):
    saved = DatasetDict({split: Dataset.from_dict(rows or ROWS, features)})
    saved.save_to_disk(folder / "saved")
    return HubDataset(str(folder / "saved"), **settings)


def shards(folder, labels=(b"1", b"0", b"1", b"2"), kind="cls", classes=CLASSES, **settings):
    members = []
    for number, label in enumerate(labels):
        members += [(f"s{number:07d}.webp", IMAGES[number % 4])]
        members += [] if label is None else [(f"s{number:07d}.{kind}", label)]
    write_tar(folder / "wds" / "test" / "0.tar", members)
    if classes:
        (folder / "wds" / "classnames.txt").write_text("\n".join(classes) + "\n")
        settings["classes"] = str(folder / "wds" / "classnames.txt")
    return LabelledShards(str(folder / "wds" / "test"), **settings)


def found(opened):
    """Class and image, in an order of their own."""
    assert len(set(opened.images.keys)) == len(opened.images.keys)
    read = [opened.images.read(number) for number in range(len(opened.images.keys))]
    return sorted(zip([opened.classes[label] for label in opened.labels], read, strict=True))


FORMATS = {"folders": class_folders, "datasets": hub, "shards": shards}


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_the_same_labels(tmp_path, form):
    opened = FORMATS[form](tmp_path).open()
    assert opened.classes == CLASSES
    assert found(opened) == sorted(zip([CLASSES[label] for label in LABELS], IMAGES, strict=True))
    assert torch.bincount(opened.labels, minlength=3).tolist() == [1, 2, 1]
    assert not opened.dropped
    assert opened.images.keys[0].rpartition("/")[2].lstrip("0") in opened.images.where(0)


@pytest.mark.parametrize("form", FORMATS)
def test_images_are_read_by_threads_at_once_and_after_pickling(tmp_path, form):
    opened = FORMATS[form](tmp_path).open()
    copy = pickle.loads(pickle.dumps(opened))  # noqa: S301 # our own
    one_by_one = [opened.images.read(number) for number in range(4)]
    with ThreadPoolExecutor(8) as threads:
        for each in (opened, copy):
            assert list(threads.map(each.images.read, [*range(4)] * 50)) == one_by_one * 50


def test_the_digest_tells_labels_apart_but_not_folders(tmp_path):
    def digest(folder, *without):
        kept = torch.ones(4, dtype=torch.bool)
        kept[list(without)] = False
        return ClassFolders(str(tmp_path / folder)).open().digest(kept)

    class_folders(tmp_path)
    before = digest("classes")
    (tmp_path / "classes").rename(tmp_path / "moved")
    assert digest("moved") == before
    assert len({before, digest("moved", 1), digest("moved", 2)}) == 3  # of what counts
    (tmp_path / "moved/bee/0.jpg").rename(tmp_path / "moved/ant/0.jpg")
    assert digest("moved") != before


@pytest.mark.parametrize("form", FORMATS)
def test_identity_changes_when_a_file_is_written_again_under_its_name(tmp_path, form):
    data = FORMATS[form](tmp_path)
    opened = data.open()
    before = opened.images.identity
    assert replace(data).open().images.identity == before
    assert pickle.loads(pickle.dumps(opened)).images.identity == before  # noqa: S301 # our own
    for file in [*tmp_path.rglob("*.arrow"), *tmp_path.rglob("*.tar"), *tmp_path.glob("classes/ant/*")]:
        os.utime(file, ns=(0, 2_000_000_000))
    assert opened.images.identity != before


def test_splits_and_columns_of_a_dataset_are_other_images(tmp_path):
    features = Features({"front": Image(), "back": Image(), "label": ClassLabel(names=list(CLASSES))})
    rows = {"front": IMAGES, "back": IMAGES[::-1], "label": LABELS}
    splits = {"test": Dataset.from_dict(rows, features), "train": Dataset.from_dict(rows, features)}
    DatasetDict(splits).save_to_disk(tmp_path / "saved")

    def identity(**settings):
        return HubDataset(str(tmp_path / "saved"), **settings).open().images.identity

    names = [(split, column) for split in splits for column in ("front", "back")]
    assert len({identity(split=split, image_column=column) for split, column in names}) == 4
    assert identity(image_column="back") == identity(image_column="back")


def test_a_folder_that_is_no_utf8_is_refused_by_name(tmp_path):
    (tmp_path / "classes").mkdir()
    try:
        os.mkdir(os.fsencode(tmp_path / "classes") + b"/caf\xe9")
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    (tmp_path / "classes" / os.fsdecode(b"caf\xe9") / "a.jpg").write_bytes(IMAGES[0])
    data = class_folders(tmp_path, {"ant/b.jpg": 1})
    with pytest.raises(ValueError, match=re.escape(r"1 of 2 class names are not UTF-8: 'caf\udce9'. Rename them")):
        data.open()
    (tmp_path / "classes" / os.fsdecode(b"caf\xe9")).rename(tmp_path / "classes" / "bee")
    (tmp_path / "classes" / "ant" / os.fsdecode(b"\xff.jpg")).write_bytes(IMAGES[2])
    with pytest.raises(ValueError, match=re.escape(r"1 of 3 image names are not UTF-8: 'ant/\udcff.jpg'. Rename them")):
        data.open()


@pytest.mark.parametrize("form", FORMATS)
def test_one_class_only_is_refused(tmp_path, form):
    set_of = {
        "folders": lambda: class_folders(tmp_path, {"ant/1.jpg": 1, "ant/2.jpg": 2}),
        "datasets": lambda: hub(tmp_path, {"image": IMAGES[:2], "label": [0, 0]}),
        "shards": lambda: shards(tmp_path, (b"0", b"0")),
    }
    with pytest.raises(ValueError, match="all 2 images are of one class, 'ant'"):
        set_of[form]().open()


@pytest.mark.parametrize("form", FORMATS)
def test_classes_without_images_are_refused_unless_they_are_allowed(tmp_path, form):
    rows = {"image": IMAGES[:2], "label": [0, 1]}
    (tmp_path / "classes" / "cat").mkdir(parents=True)
    set_of = {
        "folders": lambda **more: class_folders(tmp_path, {"ant/1.jpg": 1, "bee/2.jpg": 2}, **more),
        "datasets": lambda **more: hub(tmp_path, rows, **more),
        "shards": lambda **more: shards(tmp_path, (b"0", b"1"), **more),
    }
    with pytest.raises(ValueError, match=r"1 of 3 classes have no image: cat\. .* allow_empty=true"):
        set_of[form]().open()
    opened = set_of[form](allow_empty=True).open()
    assert opened.classes == CLASSES
    assert torch.bincount(opened.labels, minlength=3).tolist() == [1, 1, 0]


# Class folders


def test_images_are_sorted_and_what_is_none_is_counted(tmp_path, caplog):
    files = {"b/2.jpg": 2, "b/10.jpg": 1, "a/x.jpg": 0, "a/.DS_Store": None, "a/list.txt": None}
    more = {"readme.md": None, "loose.jpg": 3, ".git/x.jpg": 3, "a/.hidden/x.jpg": 3, "b/._2.jpg": 3}
    caplog.set_level(logging.INFO)
    opened = class_folders(tmp_path, files | more).open()
    assert opened.images.keys == ("a/x.jpg", "b/10.jpg", "b/2.jpg")
    assert not opened.dropped
    assert opened.left_out == {
        "hidden_file": 2,
        "hidden_folder": 2,
        "no_image_file": 2,
        "outside_classes": 1,
    }
    told = "not of the set: hidden_file 2, hidden_folder 2, no_image_file 2, outside_classes 1; 3 images are"
    assert told in caplog.text
    assert {each.levelname for each in caplog.records} == {"INFO"}


def test_a_folder_without_classes_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no image that could be used \(outside_classes 1\)"):
        class_folders(tmp_path, {"loose.jpg": 0}).open()
    with pytest.raises(FileNotFoundError, match="gone"):
        ClassFolders(str(tmp_path / "gone")).open()


# Datasets


def test_a_dataset_without_splits_is_read(tmp_path):
    Dataset.from_dict(ROWS, FEATURES).save_to_disk(tmp_path / "plain")
    opened = HubDataset(str(tmp_path / "plain")).open()
    assert opened.labels.tolist() == LABELS
    assert opened.name == "plain test"


def test_a_dataset_that_says_it_is_another_split_is_refused(tmp_path):
    Dataset.from_dict(ROWS, FEATURES, split="train").save_to_disk(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"is the split train \(4\), not test: set split"):
        HubDataset(str(tmp_path / "plain")).open()
    assert HubDataset(str(tmp_path / "plain"), split="train").open().labels.tolist() == LABELS


def test_a_missing_split_is_refused_with_those_that_there_are(tmp_path):
    with pytest.raises(ValueError, match=r"has no split test: its splits are train \(4\)"):
        hub(tmp_path, split="train").open()


def test_columns_can_be_set_and_texts_are_classes(tmp_path):
    rows = {"picture": IMAGES, "kind": ["bee", "ant", "bee", "cat"], "number": [5, 3, 5, 5]}
    features = Features({"picture": Value("binary"), "kind": Value("string"), "number": Value("int64")})
    data = hub(tmp_path, rows, features, image_column="picture", label_column="kind")
    opened = data.open()
    assert (opened.classes, opened.labels.tolist()) == (CLASSES, LABELS)
    assert opened.images.read(3) == IMAGES[3]
    numbers = HubDataset(data.path, image_column="picture", label_column="number").open()
    assert (numbers.classes, numbers.labels.tolist()) == (("3", "5"), [1, 0, 1, 1])


@pytest.mark.parametrize("setting", ["image_column", "label_column"])
def test_a_column_that_is_not_there_is_refused_with_those_that_are(tmp_path, setting):
    with pytest.raises(ValueError, match=rf"has no column gone: set {setting} to one of image \(.*\), label \(int64\)"):
        hub(tmp_path, **{setting: "gone"}).open()


def test_columns_that_nobody_can_guess_are_listed(tmp_path):
    features = Features({"image": Image(), "a": ClassLabel(names=["x", "y"]), "b": ClassLabel(names=["x", "y"])})
    with pytest.raises(ValueError, match="has 2 columns that could be meant: set label_column to one of image"):
        hub(tmp_path, {"image": IMAGES, "a": [0, 1, 0, 1], "b": [0, 1, 0, 1]}, features).open()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"image": [IMAGES[0], None, IMAGES[1]], "label": [0, 1, 2]}, "1 of 3 rows have no image: row 1"),
        ({"image": IMAGES, "label": [0, 1, None, 2]}, "1 of 4 rows have no label: 00000002"),
        (
            {"image": IMAGES, "label": [-1, -1, -1, -1]},
            r"4 of 4 images have a label outside the class list: 00000000 \(-1\)",
        ),
    ],
)
def test_rows_that_lack_something_are_refused_with_names(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        hub(tmp_path, rows).open()


def test_a_column_without_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the column label holds no images"):
        hub(tmp_path, image_column="label").open()


def test_a_folder_that_is_no_dataset_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no folder that save_to_disk wrote"):
        HubDataset(str(tmp_path)).open()


# Shards


def test_labels_without_a_class_list_are_their_own_names(tmp_path):
    numbers = shards(tmp_path, (b"10", b"9", b"10", b"12"), classes=None).open()
    assert (numbers.classes, numbers.labels.tolist()) == (("9", "10", "12"), [1, 0, 1, 2])
    names = shards(tmp_path, (b"bee", b" ant\n", b"bee", b"cat"), classes=None).open()
    assert (names.classes, names.labels.tolist()) == (CLASSES, LABELS)


def test_a_text_with_figures_in_it_is_a_name(tmp_path):
    assert shards(tmp_path, (b"1_0", b"2", b"1_0"), classes=None).open().classes == ("1_0", "2")


def test_names_are_looked_up_in_the_class_list(tmp_path):
    opened = shards(tmp_path, (b"bee", b"ant", b"bee", b"cat"), classes=("cat", "bee", "ant")).open()
    assert (opened.classes, opened.labels.tolist()) == (("cat", "bee", "ant"), [1, 2, 1, 0])


def test_numbered_classes_may_have_equal_names_and_named_ones_not(tmp_path):
    twice = ("missile", "sunglasses", "sunglasses")  # as in the list of CLIP_benchmark for ImageNet
    assert shards(tmp_path, classes=twice).open().classes == twice
    with pytest.raises(ValueError, match="1 of 3 classes have the name of another, and labels are names: sunglasses"):
        shards(tmp_path, (b"missile", b"sunglasses"), classes=twice).open()


def test_labels_from_the_json_and_from_the_sidecar(tmp_path):
    documents = [json.dumps({"label": CLASSES[label]}).encode() for label in LABELS]
    data = shards(tmp_path, documents, "json", None, label="json.label")
    assert (data.open().classes, data.open().labels.tolist()) == (CLASSES, LABELS)
    rows = {"key": [f"s{number:07d}" for number in range(4)], "category": [CLASSES[label] for label in LABELS]}
    pq.write_table(pa.table(rows), tmp_path / "wds" / "test" / "0.parquet")
    opened = LabelledShards(data.shards, label="sidecar.category").open()
    assert (opened.classes, opened.labels.tolist()) == (CLASSES, LABELS)
    with pytest.raises(ValueError, match=r"'colour' is asked for, but .*0\.tar has no sidecar with it"):
        LabelledShards(data.shards, label="sidecar.colour").open()


def test_images_without_a_label_are_counted(tmp_path):
    opened = shards(tmp_path, (b"1", None, b"", b"0", b"2")).open()
    assert opened.images.keys == ("s0000000", "s0000003", "s0000004")
    assert opened.dropped == {"no_label": 2}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ((b"1", b"3", b"-1"), "2 of 3 images have a label outside the class list: s0000001 (3), s0000002 (-1). The 3"),
        ((b"bee", b"dog"), "1 of 2 images have a label outside the class list: s0000001 (dog). The 3 classes are ant"),
    ],
)
def test_labels_outside_the_class_list_are_refused_with_names(tmp_path, labels, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        shards(tmp_path, labels).open()


@pytest.mark.parametrize(("content", "message"), [(b"", "is empty"), (b"a\n\nb", "1 of 3 lines are empty: line 2")])
def test_a_broken_class_list_is_refused(tmp_path, content, message):
    data = shards(tmp_path)
    (tmp_path / "wds" / "classnames.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.open()


@pytest.mark.parametrize("label", ["", "json", "sidecar.", "cls.a"])
def test_a_label_that_cannot_be_is_refused(label):
    with pytest.raises(ValueError, match=re.escape(f"label is {label!r}: write cls, json.NAME or sidecar.NAME")):
        LabelledShards("a.tar", label=label)


@pytest.mark.parametrize(
    ("source", "remedy"),
    [
        (ClassFolders("nowhere"), "there is no folder nowhere, .*give the folder that holds one folder for each class"),
        (Karpathy("nowhere.json", "images"), "there is no file nowhere.json, .*"),
        (LabelledShards("SHARDS", classes="nowhere.txt"), "no file nowhere.txt, .*the name of a class on each line"),
    ],
    ids=["folder", "json", "classes"],
)
def test_what_is_not_there_is_told_with_its_remedy(source, remedy):
    with pytest.raises(FileNotFoundError, match=remedy):
        source.open()
