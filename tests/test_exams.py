"""Zero-shot, nearest neighbours, linear probe and health: on models whose right answer is known by construction."""

import hashlib
import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import WORDS, drawn_image
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from reading import write_tar
from test_models import small

from align_train import metrics
from align_train.data import AlignInputs, load_tokenizer
from align_train.data.images import pixels_of
from align_train.data.testsets import ClassFolders, HubDataset, LabelledShards, Table
from align_train.evaluation import Encoder, Encoding, Health, LinearProbe, Neighbours, ZeroShot, metrics_of, take_exams
from align_train.records import Preprocessing

PREPROCESSING = Preprocessing(resize=12, crop=10, max_tokens=16)
CPU = torch.device("cpu")
TOKENIZER = load_tokenizer(16)
WIDTH = 64


def direction(word):
    """A random direction that the word alone fixes."""
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:7], "big")
    return torch.nn.functional.normalize(torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)), dim=0)


class Known(torch.nn.Module):
    """A model whose embeddings tests choose: `image` maps the number of a drawn image, `text` a text to a row."""

    def __init__(self, image, text=direction, count=64):
        super().__init__()
        self.image, self.text = image, text
        pixels = [pixels_of(drawn_image(number), PREPROCESSING).transpose(2, 0, 1) for number in range(count)]
        self.number_of = {np.ascontiguousarray(each).tobytes(): number for number, each in enumerate(pixels)}

    def encode_image(self, pixels):
        numbers = [self.number_of.get(row.contiguous().numpy().tobytes(), -1) for row in pixels]
        return torch.stack([self.image(number) if number >= 0 else torch.zeros(WIDTH) for number in numbers])

    def encode_text(self, input_ids, attention_mask):
        lengths = attention_mask.sum(1).tolist()
        texts = [TOKENIZER.decode(ids[1 : n - 1]) for ids, n in zip(input_ids, lengths, strict=True)]
        return torch.stack([self.text(text) for text in texts])


def constant(_):
    return torch.ones(WIDTH) / 8


def encoder(model, **settings):
    return Encoder(model, AlignInputs(model.preprocessing if hasattr(model, "preprocessing") else PREPROCESSING), CPU,
                   Encoding(**settings))  # fmt: skip


def score(exam, model, **settings):
    return exam.take(encoder(model, **settings)).score


def value(given, name):
    return given.values[name].value


def naming(said):
    """A model that gives image NUMBER the direction of said[NUMBER], and a text that of the class word in it."""

    def text(sentence):
        return direction(next((word for word in WORDS if word in sentence), sentence))

    return Known(lambda number: direction(said[number]), text)


# Test sets of drawn images; `classes` has the numbers of the images of each class.


def folders(path, classes, **settings):
    for name, numbers in classes.items():
        (path / name).mkdir(parents=True)
        for number in numbers:
            (path / name / f"{number:03d}.jpg").write_bytes(drawn_image(number))
    return ClassFolders(str(path), **settings)


def hub(path, classes, **settings):
    rows = [(drawn_image(n), label) for label, numbers in enumerate(classes.values()) for n in numbers]
    features = Features({"image": Image(), "label": ClassLabel(names=list(classes))})
    images, labels = zip(*rows, strict=True)
    DatasetDict({"test": Dataset.from_dict({"image": images, "label": labels}, features)}).save_to_disk(path)
    return HubDataset(str(path), **settings)


def shards(path, classes, **settings):
    members = []
    for label, numbers in enumerate(classes.values()):
        for number in numbers:
            members += [(f"s{number:07d}.jpg", drawn_image(number)), (f"s{number:07d}.cls", str(label).encode())]
    write_tar(path / "0.tar", members)
    (path / "classnames.txt").write_text("\n".join(classes) + "\n")
    return LabelledShards(str(path), classes=str(path / "classnames.txt"), **settings)


FORMS = {"folders": folders, "datasets": hub, "shards": shards}
SIX = {word: range(4 * place, 4 * place + 4) for place, word in enumerate(WORDS[:6])}
THREE = {"cat": [0, 1, 2, 3], "dog": [4], "tree": [5, 6]}


def said_of(classes):
    return {number: word for word, numbers in classes.items() for number in numbers}


def captions(path, count, per_image=1):
    path.mkdir()
    rows = ["image,caption"]
    for number in range(count):
        (path / f"{number}.jpg").write_bytes(drawn_image(number))
        rows += [f"{number}.jpg,{WORDS[number % 8]} {number} {line}" for line in range(per_image)]
    (path / "table.csv").write_text("\n".join(rows) + "\n")
    return Table(str(path / "table.csv"))


# Zero-shot


@pytest.mark.parametrize("form", FORMS)
def test_a_perfect_model_names_every_image(tmp_path, form):
    found = score(ZeroShot(FORMS[form](tmp_path / "set", SIX)), naming(said_of(SIX)))
    assert list(found.values) == ["top1", "top5", "mean_per_class"]
    assert all((v.value, v.low, v.high) == pytest.approx((1, 1, 1)) for v in found.values.values())
    chances = {name: each.chance for name, each in found.values.items()}
    assert chances == pytest.approx({"top1": 1 / 6, "top5": 5 / 6, "mean_per_class": 1 / 6})
    assert found.counts == {"images": 24, "classes": 6, "templates": 80}
    assert not found.dropped


def test_a_constant_model_names_none(tmp_path):
    found = score(ZeroShot(folders(tmp_path / "set", SIX)), Known(constant, constant))
    assert [each.value for each in found.values.values()] == [0.0, 0.0, 0.0]


def test_cut_offs_that_every_answer_would_reach_are_left_out(tmp_path):
    found = score(ZeroShot(folders(tmp_path / "set", THREE), ks=(1, 2, 3, 5)), naming(said_of(THREE)))
    assert list(found.values) == ["top1", "top2", "mean_per_class"]


def test_of_classes_with_one_name_the_first_is_right_and_the_other_wrong(tmp_path):
    """As in ImageNet with its two missiles: argmax takes the first of equal ones, here as in published scores."""
    classes = {"n1": [0, 1, 2], "n2": [3, 4], "n3": [5, 6, 7]}
    (tmp_path / "names.json").write_text(json.dumps({"n1": "boat", "n2": "boat", "n3": "tree"}))
    model = naming({number: "tree" if number > 4 else "boat" for number in range(8)})
    found = score(ZeroShot(folders(tmp_path / "set", classes), "plain", str(tmp_path / "names.json"), (1, 2)), model)
    assert value(found, "top1") == 6 / 8
    assert value(found, "top2") == 1.0
    assert value(found, "mean_per_class") == pytest.approx(2 / 3)
    assert found.facts["shared_names"] == {"boat": ["n1", "n2"]}
    assert found.facts["worst_classes"][0] == {
        "name": "boat",
        "images": 2,
        "correct": 0.0,
        "taken_for": [["boat", 1.0]],
    }
    assert [each["correct"] for each in found.facts["worst_classes"]] == [0.0, 1.0, 1.0]
    constants = score(ZeroShot(ClassFolders(str(tmp_path / "set")), "plain"), Known(constant, constant))
    assert value(constants, "top1") == 0.0  # equal embeddings of other names are a fault of the model


def test_a_class_is_the_normalised_mean_of_its_normalised_prompts(tmp_path):
    """Against the definition in NumPy, on embeddings of unequal lengths, where another order would rank otherwise."""
    templates = ["a photo of a {}.", "{} drawn", "one {} here"]
    (tmp_path / "templates.json").write_text(json.dumps(templates))

    def text(sentence):
        return direction(sentence) * (1 + len(sentence) % 7 * 3)

    image = {number: direction(f"image {number}") for number in range(24)}
    exam = ZeroShot(folders(tmp_path / "set", SIX), str(tmp_path / "templates.json"), ks=(1, 2, 3, 4, 5))
    found = score(exam, Known(image.__getitem__, text))

    def mean_of(word):
        rows = [text(each.replace("{}", word)).double().numpy() for each in templates]
        mean = np.mean([row / np.linalg.norm(row) for row in rows], 0)
        return mean / np.linalg.norm(mean)

    classes = np.stack([mean_of(word) for word in sorted(SIX)])
    right = [sorted(SIX).index(word) for word, numbers in sorted(SIX.items()) for _ in numbers]
    scores = np.stack([image[n].double().numpy() for _, numbers in sorted(SIX.items()) for n in numbers]) @ classes.T
    ranks = [int((row > row[label]).sum()) for row, label in zip(scores, right, strict=True)]
    assert {f"top{k}": value(found, f"top{k}") for k in range(1, 6)} == {
        f"top{k}": pytest.approx(np.mean([rank < k for rank in ranks])) for k in range(1, 6)
    }
    assert 0 < value(found, "top1") < value(found, "top4") < 1


def test_every_class_counts_alike_in_the_mean_per_class(tmp_path):
    said = said_of(THREE) | {4: "cat", 6: "dog"}
    found = score(ZeroShot(folders(tmp_path / "set", THREE)), naming(said))
    assert value(found, "top1") == pytest.approx(5 / 7)
    assert value(found, "mean_per_class") == pytest.approx((1 + 0 + 0.5) / 3)
    assert found.facts["worst_classes"] == [
        {"name": "dog", "images": 1, "correct": 0.0, "taken_for": [["cat", 1.0]]},
        {"name": "tree", "images": 2, "correct": 0.5, "taken_for": [["dog", 0.5]]},
        {"name": "cat", "images": 4, "correct": 1.0, "taken_for": []},
    ]


def test_classes_without_images_are_wrong_answers_alone(tmp_path):
    data = folders(tmp_path / "set", THREE | {"boat": []}, allow_empty=True)
    found = score(ZeroShot(data), naming(said_of(THREE) | {4: "boat", 5: "boat"}))
    assert found.counts["classes"] == 4
    assert value(found, "top1") == pytest.approx(5 / 7)
    assert value(found, "mean_per_class") == pytest.approx((1 + 0 + 0.5) / 3)  # of those that have images
    assert found.values["mean_per_class"].chance == 1 / 4
    assert [(each["name"], each["taken_for"]) for each in found.facts["worst_classes"]] == [
        ("dog", [["boat", 1.0]]),
        ("tree", [["boat", 0.5]]),
        ("cat", []),
    ]


def test_the_worst_classes_are_twenty_with_three_wrong_names_each(tmp_path):
    names = [f"{a} {b}" for a in WORDS[:5] for b in WORDS[:5]][:22]
    classes = {name: [number] for number, name in enumerate(names)}
    classes[names[0]] = [0, *range(30, 37)]
    taken = [names[0], *[names[3]] * 3, *[names[2]] * 2, names[4], names[5]]
    said = {number: name for name, (number, *_) in classes.items()} | dict(
        zip(classes[names[0]], taken, strict=True)
    )  # fmt: skip
    found = score(ZeroShot(folders(tmp_path / "set", classes), "name"), Known(lambda number: direction(said[number])))
    worst = found.facts["worst_classes"]
    assert len(worst) == 20
    assert worst[0] == {
        "name": names[0],
        "images": 8,
        "correct": 1 / 8,
        "taken_for": [[names[3], 3 / 8], [names[2], 2 / 8], [names[5], 1 / 8]],  # of equal ones, the first by name
    }


# Nearest neighbours


def test_neighbours_of_a_perfect_model_are_of_the_class_in_whatever_order_the_classes_are(tmp_path):
    test = {word: [number + 32 for number in SIX[word]][:2] for word in sorted(SIX, reverse=True)}
    train = folders(tmp_path / "train", SIX)
    exam = Neighbours(train, shards(tmp_path / "test", test))
    assert exam.train.open().classes != exam.test.open().classes
    found = score(exam, naming(said_of(SIX) | said_of(test)))
    assert {name: each.value for name, each in found.values.items()} == dict.fromkeys(("r1", "r5", "r10", "r20"), 1.0)
    assert found.values["r1"].chance == pytest.approx(1 / 6)
    assert found.values["r5"].chance == pytest.approx(1 - (5 / 6) ** 5)
    assert found.counts == {
        "images": 12,
        "training_images": 24,
        "classes": 6,
        "images_of_classes_without_training_images": 0,
    }
    assert found.facts["training"]["data"] == "train"
    assert found.facts["data"] == str(tmp_path / "test")


def test_neighbours_of_a_constant_model_are_all_wrong(tmp_path):
    """Those of other classes tie with the right ones, and there are at least as many of them as K."""
    data = folders(tmp_path / "set", SIX)
    found = score(Neighbours(data, data), Known(constant))
    assert [each.value for each in found.values.values()] == [0.0] * 4


def test_recall_of_neighbours_is_that_of_brute_force(tmp_path):
    train, test = ({word: [n + shift for n in SIX[word]] for word in SIX} for shift in (0, 32))
    image = {number: direction(f"image {number}") for number in range(64)}
    ks = (1, 2, 3, 7)
    data = folders(tmp_path / "train", train), folders(tmp_path / "test", test)
    found = score(Neighbours(*data, ks=ks), Known(image.__getitem__))
    hits = Counter()
    for number, word in said_of(test).items():
        order = sorted(said_of(train), key=lambda n: -float(image[n].double() @ image[number].double()))
        near = [said_of(train)[n] for n in order]
        hits.update(k for k in ks if word in near[:k])
    assert {k: value(found, f"r{k}") for k in ks} == {k: pytest.approx(hits[k] / 24) for k in ks}
    assert 0 < hits[1] < hits[7] < 24


def test_a_class_that_training_has_not_is_named(tmp_path):
    train = folders(tmp_path / "train", {"cat": [0, 1], "dog": [2, 3]})
    test = folders(tmp_path / "test", {"cat": [4], "tree": [5], "boat": [6]})
    expected = (
        "test has images of 2 classes that the training set, of 2, has not: boat, tree. "
        "Use sets whose classes have the same names"
    )
    for exam in (Neighbours(train, test), LinearProbe(train, test)):
        with pytest.raises(ValueError, match=expected):
            score(exam, Known(constant))


def test_test_images_of_a_class_without_training_images_find_no_neighbour(tmp_path):
    train = folders(tmp_path / "train", {"cat": [0, 1], "dog": [2, 3], "tree": []}, allow_empty=True)
    test = folders(tmp_path / "test", {"cat": [4, 5, 6], "tree": [7]})
    said = {0: "cat", 1: "cat", 2: "dog", 3: "dog", 4: "cat", 5: "cat", 6: "cat", 7: "tree"}
    found = score(Neighbours(train, test, ks=(1, 50)), naming(said))
    assert (value(found, "r1"), value(found, "r50")) == (0.75, 0.75)
    assert found.values["r1"].chance == pytest.approx(0.75 * 0.5)
    assert found.counts["images_of_classes_without_training_images"] == 1
    assert found.counts["classes"] == 3


def test_a_class_that_neither_set_has_images_of_does_no_harm(tmp_path):
    train = folders(tmp_path / "train", {"cat": [0, 1], "dog": [2, 3]})
    test = folders(tmp_path / "test", {"boat": [], "cat": [4], "dog": [5]}, allow_empty=True)
    said = {0: "cat", 1: "cat", 2: "dog", 3: "dog", 4: "cat", 5: "dog"}
    assert value(score(Neighbours(train, test), naming(said)), "r1") == 1.0


# Linear probe


def split(classes, first):
    """The first images of each class, and the rest."""
    return {w: list(n)[:first] for w, n in classes.items()}, {w: list(n)[first:] for w, n in classes.items()}


EIGHT = {word: range(8 * place, 8 * place + 8) for place, word in enumerate(WORDS[:6])}


def spread(number):
    """Near the direction of the class, without two images at one place."""
    return torch.nn.functional.normalize(direction(WORDS[number // 8]) + 0.3 * direction(str(number)), dim=0)


def test_a_probe_on_separable_features_is_right(tmp_path):
    train, test = split(EIGHT, 6)
    exam = LinearProbe(folders(tmp_path / "train", train), shards(tmp_path / "test", dict(reversed(test.items()))))
    found = score(exam, Known(spread))
    assert {name: each.value for name, each in found.values.items()} == dict.fromkeys(
        ("top1", "top5", "mean_per_class"), 1.0
    )
    assert found.values["top5"].chance == pytest.approx(5 / 6)
    assert found.counts == {"images": 12, "training_images": 36, "classes": 6}
    assert found.facts["validation"] == "0.1 of the training images"
    assert found.facts["l2"] in [l2 for l2, _ in found.facts["sweep"]]
    assert len(found.facts["sweep"]) >= 9
    assert max(accuracy for _, accuracy in found.facts["sweep"]) == 1.0


def test_a_probe_on_constant_features_is_wrong(tmp_path):
    """The fit of a constant is the classes' shares, so all but the most frequent class come after it."""
    data = folders(tmp_path / "set", SIX)
    found = score(LinearProbe(data, data), Known(constant))
    assert value(found, "top1") <= 1 / 6


def test_the_mean_per_class_of_a_probe_counts_every_class_alike(tmp_path):
    train, _ = split(EIGHT, 6)
    test = {"red": [6, 7, 14, 15, 22], "green": [30]}  # of six images, one of five and none of one are what they say
    exam = LinearProbe(folders(tmp_path / "train", train), folders(tmp_path / "test", test))
    found = score(exam, Known(spread))
    assert value(found, "top1") == pytest.approx(2 / 6)
    assert value(found, "mean_per_class") == pytest.approx((2 / 5 + 0) / 2)
    assert found.values["mean_per_class"].chance == pytest.approx(1 / 6)


def test_cut_offs_of_a_probe_that_every_answer_would_reach_are_left_out(tmp_path):
    data = folders(tmp_path / "set", {"red": range(8), "green": range(8, 16)})
    found = score(LinearProbe(data, data, ks=(1, 2, 5)), Known(spread))
    assert list(found.values) == ["top1", "mean_per_class"]


def noisy(number):
    """So far from the others of its class that penalties differ."""
    return torch.nn.functional.normalize(direction(WORDS[number // 8]) + 4 * direction(str(number)), dim=0)


def test_the_held_out_share_chooses_the_penalty_and_is_not_fitted_before(tmp_path):
    """Against the metric on the same rows."""
    train = {word: EIGHT[word] for word in sorted(EIGHT)}
    exam = LinearProbe(folders(tmp_path / "train", train), folders(tmp_path / "test", EIGHT), validation_share=0.3)
    found = score(exam, Known(noisy))
    rows = torch.stack([noisy(number) for numbers in train.values() for number in numbers])
    labels = torch.arange(6).repeat_interleave(8)
    out = exam._held_out(labels)
    assert int(out.sum()) == 6 * 2
    probe = metrics.choose_probe((rows[~out], labels[~out]), (rows[out], labels[out]))
    assert found.facts["sweep"] == [pytest.approx(list(each)) for each in probe.sweep]
    assert (found.facts["l2"], found.facts["validation"]) == (probe.l2, "0.3 of the training images")
    assert found.facts["training"]["data"] == "train"


def test_a_validation_set_chooses_the_penalty_and_all_training_images_are_fitted(tmp_path):
    """Against the metric on the same rows."""
    train, rest = split(EIGHT, 4)
    validation, test = split(rest, 2)
    sets = [folders(tmp_path / name, of) for name, of in (("train", train), ("test", test))]
    # its classes are in another order than those of training
    chosen_by = shards(tmp_path / "validation", dict(reversed(validation.items())))
    found = score(LinearProbe(*sets, validation=chosen_by), Known(noisy))

    def rows(classes):
        numbered = [(noisy(n), sorted(EIGHT).index(word)) for word in sorted(classes) for n in classes[word]]
        return torch.stack([row for row, _ in numbered]), torch.tensor([label for _, label in numbered])

    probe = metrics.choose_probe(rows(train), rows(validation))
    assert found.facts["l2"] == probe.l2
    assert found.facts["sweep"] == [pytest.approx(list(each)) for each in probe.sweep]
    ranks = metrics.probe_ranks(probe, *rows(test))
    assert value(found, "top1") == pytest.approx((ranks < 1).double().mean().item())
    assert found.facts["validation"]["data"] == chosen_by.shards
    assert len({accuracy for _, accuracy in probe.sweep}) > 2
    assert found.counts["training_images"] == 24


def test_the_held_out_share_is_of_every_class_and_always_the_same(tmp_path):
    data = folders(tmp_path / "set", THREE)
    labels = torch.tensor([0] * 20 + [1] * 2 + [2] + [3] * 5)
    exam = LinearProbe(data, data)
    held_out = exam._held_out(labels)
    assert [int(held_out[labels == label].sum()) for label in range(4)] == [2, 1, 0, 1]
    assert torch.equal(held_out, exam._held_out(labels))
    others = [LinearProbe(data, data, seed=seed)._held_out(labels) for seed in range(1, 6)]
    assert not all(torch.equal(held_out, other) for other in others)
    most = LinearProbe(data, data, validation_share=0.99)._held_out(labels)
    assert [int(most[labels == label].sum()) for label in range(4)] == [19, 1, 0, 4]  # one stays to fit on


@pytest.mark.parametrize("share", [0, 1, -0.1])
def test_a_share_that_leaves_nothing_is_refused(tmp_path, share):
    data = folders(tmp_path / "set", THREE)
    with pytest.raises(ValueError, match=f"validation_share is {share}: give a share between 0 and 1"):
        score(LinearProbe(data, data, validation_share=share), naming(said_of(THREE)))


def test_a_training_set_of_which_nothing_can_be_held_out_asks_for_a_validation_set(tmp_path):
    data = folders(tmp_path / "set", {"cat": [0], "dog": [1]})
    with pytest.raises(ValueError, match=r"no class of the training set has two images or more.*give a validation set"):
        score(LinearProbe(data, data), naming({0: "cat", 1: "dog"}))


@pytest.mark.parametrize("way", ["test", "validation"])
def test_a_probe_refuses_classes_without_training_images_by_name(tmp_path, way):
    train = folders(tmp_path / "train", {"red": range(4), "green": range(8, 12), "tree": []}, allow_empty=True)
    good, bad = folders(tmp_path / "a", {"red": [5], "green": [13]}), folders(tmp_path / "b", {"red": [6], "tree": [1]})
    exam = LinearProbe(train, bad) if way == "test" else LinearProbe(train, good, validation=bad)
    with pytest.raises(ValueError, match=r"b has images of 1 classes of which train has none: tree\. Add images"):
        score(exam, Known(spread))


# Health


def test_health_of_towers_that_meet(tmp_path):
    model = Known(lambda number: direction(f"pair {number}"), lambda text: direction(f"pair {text.split()[1]}"))
    found = score(Health(captions(tmp_path / "set", 12)), model)
    assert value(found, "alignment") == pytest.approx(0, abs=1e-6)
    assert value(found, "modality_gap") == pytest.approx(0, abs=1e-6)
    rows = torch.stack([direction(f"pair {number}") for number in range(12)])
    for tower in ("image", "text"):
        assert value(found, f"uniformity_{tower}") == pytest.approx(metrics.uniformity(rows), abs=1e-6)
        assert value(found, f"mean_cosine_{tower}") == pytest.approx(metrics.mean_cosine(rows), abs=1e-6)
        assert value(found, f"effective_rank_{tower}") == pytest.approx(metrics.effective_rank(rows), rel=1e-5)
    assert found.counts == {"images": 12, "captions": 12, "pairs": 12, "dimensions": WIDTH}


def test_health_of_collapsed_towers_apart(tmp_path):
    ends = torch.eye(WIDTH)
    found = score(Health(captions(tmp_path / "set", 6)), Known(lambda _: ends[0], lambda _: ends[1]))
    values = {name: each.value for name, each in found.values.items()}
    expected = {"alignment": 2.0, "modality_gap": math.sqrt(2)}
    for tower in ("image", "text"):
        expected |= {f"uniformity_{tower}": 0.0, f"mean_cosine_{tower}": 1.0, f"effective_rank_{tower}": 1.0}
    assert values == pytest.approx(expected, abs=1e-5)
    assert (found.values["alignment"].low, found.values["alignment"].high) == (2.0, 2.0)


def test_health_of_images_counts_each_of_them_once_however_many_captions_it_has(tmp_path):
    found = score(Health(captions(tmp_path / "set", 6, per_image=3)), Known(lambda n: direction(f"image {n}")))
    rows = torch.stack([direction(f"image {number}") for number in range(6)])
    assert value(found, "uniformity_image") == pytest.approx(metrics.uniformity(rows), abs=1e-6)
    assert value(found, "mean_cosine_image") == pytest.approx(metrics.mean_cosine(rows), abs=1e-6)
    assert found.counts == {"images": 6, "captions": 18, "pairs": 18, "dimensions": WIDTH}


def test_health_is_of_pairs_spread_evenly_over_the_set(tmp_path):
    seen = []

    def text(sentence):
        seen.append(sentence)
        return direction(f"pair {sentence.split()[1]}") if int(sentence.split()[1]) % 3 == 0 else -direction("pair 0")

    model = Known(lambda number: direction(f"pair {number}"), text)
    found = score(Health(captions(tmp_path / "set", 12), pairs=5), model)
    assert found.counts["pairs"] == 4  # every third
    assert value(found, "alignment") == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("pairs", [1, 0, -3])
def test_health_of_too_few_pairs_is_refused(tmp_path, pairs):
    with pytest.raises(ValueError, match=f"pairs is {pairs}: give at least 2"):
        Health(captions(tmp_path / "set", 3), pairs=pairs)


# All of them


def exams_on(tmp_path, **settings):
    """One of each, on sets of their own."""
    train, test = folders(tmp_path / "train", split(EIGHT, 6)[0]), folders(tmp_path / "test", split(EIGHT, 6)[1])
    return {
        "names": ZeroShot(test, **settings),
        "near": Neighbours(train, test, ks=(1, 2, 5), **settings),
        "probe": LinearProbe(train, test, **settings),
        "health": Health(captions(tmp_path / "pairs", 12), **settings),
    }


BROKEN = {"names": "test", "near": "train", "probe": "train", "health": "pairs"}


def spoil(tmp_path, name, share=2):
    """Write over images of the set that an exam reads; the names of those and how many there are."""
    files = sorted((tmp_path / BROKEN[name]).rglob("*.jpg"))
    chosen = files[:share] if share else files
    for file in chosen:
        file.write_bytes(b"<html>")
    return chosen, len(files)


@pytest.mark.parametrize("name", BROKEN)
def test_images_that_cannot_be_used_are_refused_with_names_and_the_exams_name(tmp_path, name):
    exam = exams_on(tmp_path)[name]
    chosen, total = spoil(tmp_path, name)
    shown = [f"{file.parent.name}/{file.name}" if name != "health" else file.name for file in chosen]
    expected = (
        rf"^exam {name}: 2 of the {total} images of .* cannot be used \(corrupt_image 2\), the first are "
        rf"{', '.join(shown)}: mend them, or leave them out and count them with skip_unusable=true"
    )
    with pytest.raises(ValueError, match=expected):
        take_exams({name: exam}, encoder(Known(spread)))


@pytest.mark.parametrize("name", BROKEN)
def test_images_that_cannot_be_used_are_counted_when_they_are_to_be_skipped(tmp_path, name):
    exam = exams_on(tmp_path, skip_unusable=True)[name]
    whole = score(exam, Known(spread))
    assert not whole.dropped
    spoil(tmp_path, name)
    found = score(exam, Known(spread))
    assert found.dropped == {"corrupt_image": 2}
    counted = {"names": "images", "near": "training_images", "probe": "images", "health": "pairs"}[name]
    if name == "probe":  # two of six images of a class are not fitted; the test is whole
        counted = "training_images"
    assert found.counts[counted] == whole.counts[counted] - 2
    before, after = (each.facts.get("training", each.facts)["split_sha256"] for each in (whole, found))
    assert before != after  # it is of what counts


@pytest.mark.parametrize("name", BROKEN)
def test_a_set_of_which_no_image_can_be_used_is_refused_all_the_same(tmp_path, name):
    exam = exams_on(tmp_path, skip_unusable=True)[name]
    _, total = spoil(tmp_path, name, share=None)
    with pytest.raises(ValueError, match=rf"{total} of the {total} images of .* cannot be used") as refused:
        score(exam, Known(spread))
    assert "skip_unusable" not in str(refused.value)


@pytest.mark.parametrize("skipped", ["test", "train"])
def test_skipped_images_of_both_sets_are_counted_together(tmp_path, skipped):
    exams = exams_on(tmp_path, skip_unusable=True)
    for name in ("train", "test"):
        files = sorted((tmp_path / name).rglob("*.jpg"))
        for file in files[: 1 if name == skipped else 2]:
            file.write_bytes(b"<html>")
    for name in ("near", "probe"):
        found = score(exams[name], Known(spread))
        assert found.dropped == {"corrupt_image": 3}
        assert found.counts["images"] == 12 - (1 if skipped == "test" else 2)
        assert found.counts["training_images"] == 36 - (1 if skipped == "train" else 2)


def test_what_is_left_keeps_its_own_class_and_caption(tmp_path):
    """The first images of the first class, and of the pairs, are lost."""
    data = folders(tmp_path / "set", SIX)
    pairs = captions(tmp_path / "pairs", 12, per_image=2)
    for file in [*sorted((tmp_path / "set").rglob("*.jpg"))[:2], *(tmp_path / "pairs" / f"{n}.jpg" for n in (0, 3))]:
        file.write_bytes(b"<html>")
    model = naming(said_of(SIX))
    assert value(score(ZeroShot(data, skip_unusable=True), model), "top1") == 1.0
    assert value(score(Neighbours(data, data, skip_unusable=True), model), "r1") == 1.0
    meeting = Known(lambda number: direction(f"pair {number}"), lambda text: direction(f"pair {text.split()[1]}"))
    found = score(Health(pairs, skip_unusable=True), meeting)
    assert value(found, "alignment") == pytest.approx(0, abs=1e-6)
    assert (found.counts["images"], found.counts["captions"], found.dropped) == (10, 20, {"corrupt_image": 2})


def test_what_a_set_leaves_out_itself_is_counted_apart_from_lost_images_also_of_a_validation_set(tmp_path):
    train, test, validation = (folders(tmp_path / f"{k}", {w: [n[k]] for w, n in SIX.items()}) for k in range(3))
    (tmp_path / "2" / "red" / "notes.txt").touch()
    (tmp_path / "2" / "green" / "006.jpg").write_bytes(b"<html>")
    found = score(LinearProbe(train, test, validation, skip_unusable=True), naming(said_of(SIX)))
    assert found.dropped == {"corrupt_image": 1}
    assert found.facts["validation"]["left_out"] == {"no_image_file": 1}
    assert found.facts["left_out"] == found.facts["training"]["left_out"] == {}
    assert found.counts["images"] == 6
    with pytest.raises(ValueError, match="1 of the 6 images of 2 cannot be used"):
        score(LinearProbe(train, test, validation), naming(said_of(SIX)))


def test_a_benchmark_is_told_of(tmp_path):
    exams = exams_on(tmp_path)
    for name in ("names", "near", "probe"):
        assert score(exams[name], Known(spread)).facts["benchmark"] is None
        assert score(replace(exams[name], benchmark="imagenet"), Known(spread)).facts["benchmark"] == "imagenet"


def test_entries_are_json_that_reads_back_equal_and_metrics_by_name(tmp_path):
    entries = take_exams(exams_on(tmp_path), encoder(Known(spread))).entries
    assert json.loads(json.dumps(entries, allow_nan=False)) == entries
    kinds = {"names": "zero_shot", "near": "neighbours", "probe": "linear_probe", "health": "health"}
    assert {name: entry["kind"] for name, entry in entries.items()} == kinds
    for entry in entries.values():
        assert set(entry) == {"kind", "scores", "counts", "dropped", "facts", "measured", "seconds", "taken"}
        assert all(set(each) == {"value", "low", "high", "chance"} for each in entry["scores"].values())
        assert {"data", "data_sha256", "split_sha256", "left_out"} <= set(entry["facts"])
        for each in entry["scores"].values():
            assert each["low"] is None or each["low"] <= each["value"] <= each["high"]
    assert metrics_of(entries)["exam/near/r1"] == entries["near"]["scores"]["r1"]["value"]


def test_facts_change_with_what_they_are_of(tmp_path):
    def facts(templates="clip_80", names=None):
        return score(ZeroShot(ClassFolders(str(tmp_path / "set")), templates, names), naming(said_of(THREE))).facts

    folders(tmp_path / "set", THREE)
    (tmp_path / "names.json").write_text(json.dumps(["boat", "house", "red"]))
    hashes = ("data_sha256", "split_sha256", "templates_sha256", "class_names_sha256")
    before = facts()
    assert all(len(before[name]) == 64 for name in hashes)
    assert facts() == before

    def changed(after):
        return {name for name in hashes if after[name] != before[name]}

    assert changed(facts(templates="plain")) == {"templates_sha256"}
    assert changed(facts(names=str(tmp_path / "names.json"))) == {"class_names_sha256"}
    (tmp_path / "set" / "cat" / "000.jpg").write_bytes(drawn_image(20))
    model = naming(said_of(THREE) | {20: "cat"})
    after = score(ZeroShot(ClassFolders(str(tmp_path / "set"))), model).facts
    assert changed(after) == {"data_sha256"}
    (tmp_path / "set" / "cat" / "000.jpg").rename(tmp_path / "set" / "dog" / "000.jpg")
    after = score(ZeroShot(ClassFolders(str(tmp_path / "set"))), model).facts
    assert changed(after) == {"data_sha256", "split_sha256"}  # the order of the images has changed as well


def test_scores_do_not_depend_on_batches_and_threads(tmp_path):
    """On a real model, whose products differ in the last digits with the batch."""
    exams, model = exams_on(tmp_path), small(text={"vocabulary": 30_522})

    def numbers(**settings):
        entries = take_exams(exams, encoder(model, **settings)).entries
        found = {f"{name}/{way}": entry["facts"].get(way) for name, entry in entries.items()
                 for way in ("data_sha256", "split_sha256", "worst_classes")}  # fmt: skip
        return metrics_of(entries), found

    values, facts = numbers(batch_size=256, threads=1)
    for settings in ({"batch_size": 5, "threads": 2}, {"batch_size": 1, "threads": 3}):
        others, other_facts = numbers(**settings)
        assert others == pytest.approx(values, abs=1e-6, rel=1e-6)
        assert other_facts == facts


def test_numbered_classes_of_one_name_stay_apart(tmp_path):
    """As the two missiles of ImageNet in CLIP_benchmark's shards."""
    sets = []
    for name, numbers in (("train", [[0, 1], [2, 3], [4, 5]]), ("test", [[6], [7], [8]])):
        data = shards(tmp_path / name, {f"class {place}": each for place, each in enumerate(numbers)})
        (tmp_path / name / "classnames.txt").write_text("boat\nboat\ntree\n")
        sets.append(data)
    said = {0: "a", 1: "a", 6: "a", 2: "b", 3: "b", 7: "b", 4: "c", 5: "c", 8: "c"}
    model = Known(lambda number: direction(said[number]))
    assert value(score(Neighbours(*sets, ks=(1,)), model), "r1") == 1.0
    assert value(score(LinearProbe(*sets), model), "top1") == 1.0
