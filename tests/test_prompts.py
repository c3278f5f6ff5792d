"""Prompts: the shipped lists are the published ones, users' files are read in all their forms, bad ones are named."""

import json

import pytest

from align_train.evaluation import prompts as module
from align_train.evaluation.prompts import CLASSES, TEMPLATES, Prompts, load_prompts


@pytest.fixture
def written(tmp_path):
    """Write a document, or a text as it is, into a file."""

    def write(content, name="file.json"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write


# Shipped


def test_the_80_templates_of_clip():
    templates = load_prompts("clip_80").templates
    assert len(templates) == len(set(templates)) == 80
    assert templates[0] == "a bad photo of a {}."
    assert templates[-1] == "a tattoo of the {}."
    assert {"itap of a {}.", "a {} in a video game.", "the plushie {}.", "a photo of a {}."} <= set(templates)
    assert all(template.count("{}") == 1 for template in templates)


def test_the_1000_classes_of_imagenet_in_the_order_of_their_index():
    names = load_prompts(classes="imagenet").names
    ids = list(names)
    assert len(ids) == 1000
    assert ids == sorted(ids)
    assert all(len(wnid) == 9 and wnid[0] == "n" and wnid[1:].isdigit() for wnid in ids)
    known = {  # index, WordNet id and OpenAI's name, from the sources that the file names
        0: ("n01440764", "tench"),
        7: ("n01514668", "rooster"),
        134: ("n02012849", "crane bird"),
        517: ("n03126707", "construction crane"),
        638: ("n03710637", "tights"),
        657: ("n03773504", "missile"),
        744: ("n04008634", "missile"),
        782: ("n04152593", "CRT monitor"),
        836: ("n04355933", "sunglasses"),
        837: ("n04356056", "sunglasses"),
        999: ("n15075141", "toilet paper"),
    }
    assert {index: (ids[index], names[ids[index]]) for index in known} == known


def test_two_names_of_imagenet_stand_twice_and_are_told():
    prompts = load_prompts(classes="imagenet")
    shared = prompts.shared_names(list(prompts.names))
    assert shared == {"missile": ["n03773504", "n04008634"], "sunglasses": ["n04355933", "n04356056"]}


def test_the_shipped_lists_name_their_source():
    for name, key in (("clip_templates.json", "templates"), ("imagenet_classes.json", "names")):
        document = json.loads((module._FILES / name).read_text(encoding="utf-8"))
        assert set(document) == {"source", key}
        assert "openai/CLIP/blob/d05afc436d78f1c48dc0dbf8e5980a9d471f35f6/" in document["source"]


def test_the_short_sets_of_templates():
    assert load_prompts("plain").templates == ("a photo of a {}.",)
    assert load_prompts("name").templates == ("{}",)
    assert all(load_prompts(name).templates for name in TEMPLATES)
    assert all(len(load_prompts(classes=name).names) == 1000 for name in CLASSES)


# Texts


def test_texts_are_a_row_a_class_a_column_a_template():
    prompts = Prompts(("a {}.", "the {}, {0}"), {"n1": "red {} fox", "n2": "hen"})
    assert prompts.for_classes(["n2", "n1"]) == [["a hen.", "the hen, {0}"], ["a red {} fox.", "the red {} fox, {0}"]]


def test_without_names_classes_are_called_as_their_folders():
    prompts = load_prompts("plain")
    assert prompts.for_classes(["polar_bear", "jack-o-lantern"]) == [
        ["a photo of a polar bear."],
        ["a photo of a jack o lantern."],
    ]
    assert prompts.shared_names(["a_b", "a-b", "c"]) == {"a b": ["a_b", "a-b"]}


@pytest.mark.parametrize("wrapped", [False, True])
def test_names_by_class_or_in_the_order_of_the_classes(written, wrapped):
    def document(value):
        return {"source": "mine", "names": value} if wrapped else value

    by_class = load_prompts("name", written(document({"b": "bee", "a": "ant"}), "a.json"))
    in_order = load_prompts("name", written(document(["ant", "bee"]), "b.json"))
    assert by_class.for_classes(["a", "b"]) == in_order.for_classes(["a", "b"]) == [["ant"], ["bee"]]
    assert by_class.names_sha256(["a", "b"]) == in_order.names_sha256(["a", "b"])


def test_templates_as_a_list_or_with_a_source(written):
    plain = load_prompts(written(["one {}", "two {}"], "a.json"))
    sourced = load_prompts(str(written({"source": "mine", "templates": ["one {}", "two {}"]}, "b.json")))
    assert plain == sourced == Prompts(("one {}", "two {}"))


def test_a_part_of_imagenet_takes_its_names():
    prompts = load_prompts("name", "imagenet")
    assert prompts.for_classes(["n03126707", "n02012849"]) == [["construction crane"], ["crane bird"]]


def test_imagenet_by_index_is_for_sets_with_other_class_names():
    prompts = load_prompts("name", "imagenet_by_index")
    assert prompts.names_of([str(number) for number in range(1000)])[134] == "crane bird"
    with pytest.raises(ValueError, match="imagenet_by_index lists 1000 names, but the set has 2 classes"):
        prompts.names_of(["a", "b"])


def test_hashes_are_of_the_texts_and_their_order():
    one, other = Prompts(("a {}", "b {}")), Prompts(("b {}", "a {}"))
    assert one.templates_sha256 == Prompts(("a {}", "b {}"), ("x",)).templates_sha256
    assert len({one.templates_sha256, other.templates_sha256, Prompts(("a {}b {}",)).templates_sha256}) == 3
    assert one.names_sha256(["x_y", "z"]) == one.names_sha256(["x y", "z"])
    assert one.names_sha256(["x", "z"]) != one.names_sha256(["z", "x"])


# What is refused


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            ["a photo", "a {}", "{} and {}"],
            r"2 of 3 templates in .*file.json have not exactly one placeholder \{\}: 'a p",
        ),
        ([], "has no template"),
        ({"templates": []}, "has no template"),
        ({"template": ["{}"]}, "is no list of texts"),
        ("a photo of a {}.", r"file.json is not JSON that can be read: .*line 1"),
        ([1], "is no list of texts"),
        (3, "is no list of texts"),
    ],
)
def test_bad_templates(written, content, message):
    with pytest.raises(ValueError, match=message):
        load_prompts(written(content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "names no class"),
        ([], "names no class"),
        ("tench", "is not JSON"),
        ('"tench"', "is neither a list of names nor an object"),
        ({"a": "ant", "b": None, "c": " "}, "2 of 3 classes in .* are named by no text: 'b', 'c'"),
        (["ant", ["bee"]], "1 of 2 classes in .* are named by no text: '1'"),
        ('{"a": "ant", "b": "bee", "a": "ape"}', "it has 'a' more than once"),
    ],
)
def test_bad_names(written, content, message):
    with pytest.raises(ValueError, match=message):
        load_prompts("plain", written(content))


def test_a_class_without_a_name(written):
    prompts = load_prompts("plain", written({"a": "ant"}))
    expected = r"file.json has no name for 4 of 5 classes: 'b', 'c', 'd', \.\.\.\. Its 1 names are of 'a'"
    with pytest.raises(ValueError, match=expected):
        prompts.for_classes(list("abcde"))


def test_a_name_without_a_class(written):
    prompts = load_prompts("plain", written({"a": "ant", "b": "bee"}))
    with pytest.raises(ValueError, match=r"names 1 classes that the set does not have: 'b'. It has 1, 'a'"):
        prompts.for_classes(["a"])


def test_another_number_of_names_than_classes(written):
    prompts = load_prompts("plain", written(["ant", "bee"]))
    with pytest.raises(ValueError, match=r"file.json lists 2 names, but the set has 3 classes"):
        prompts.for_classes(["a", "b", "c"])


def test_neither_a_shipped_set_nor_a_file(tmp_path):
    with pytest.raises(
        ValueError, match="templates is 'clip80', which is no file: name a JSON file, or clip_80, plain"
    ):
        load_prompts("clip80")
    with pytest.raises(ValueError, match=r"classes is '.*none.json', which is no file: name a JSON file, or imagenet,"):
        load_prompts("plain", tmp_path / "none.json")
