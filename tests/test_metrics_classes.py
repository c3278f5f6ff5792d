"""Classification and nearest neighbours against brute force, and neighbours against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from torch import Tensor
from torch.nn.functional import normalize

from align_train.metrics import (
    Confusion,
    class_embeddings,
    classification_ranks,
    confusions,
    mean_per_class,
    neighbour_ranks,
    predictions,
    recall_at,
    scores,
    without_class,
)


def random_classes(images: int, classes: int, values: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, class embeddings and labels; of few `values`, so that there are ties."""
    random = torch.Generator().manual_seed(values)
    image = torch.randint(-values, values + 1, (images, 4), generator=random).float()
    table = torch.randint(-values, values + 1, (classes, 4), generator=random).float()
    return image, table, torch.randint(classes, (images,), generator=random)


def test_class_embeddings_are_means_of_unit_vectors_made_unit_again():
    random = np.random.default_rng(0)
    prompts = random.normal(size=(3, 5, 4)) * random.uniform(0.1, 9, (3, 5, 1))
    mean = (prompts / np.linalg.norm(prompts, axis=2, keepdims=True)).mean(1)
    expected = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = class_embeddings(torch.from_numpy(prompts).float())
    assert np.abs(found.numpy() - expected).max() < 1e-6
    with pytest.raises(ValueError, match=r"mean zero, the first are classes \[1\]"):
        class_embeddings(torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [-1.0, 0.0]]]))
    with pytest.raises(ValueError, match=r"\(C, T, D\)"):
        class_embeddings(torch.ones(3, 2))


@pytest.mark.parametrize("block", [1, 6, 1024])
@pytest.mark.parametrize("values", [1, 10_000])
def test_ranks_of_classes_equal_brute_force(monkeypatch, block, values):
    monkeypatch.setattr(scores, "CPU_BLOCK", block)
    image, classes, labels = random_classes(40, 13, values)
    score = (image.double() @ classes.double().T).numpy()
    ranks = [sum(row[c] >= row[y] and c != y for c in range(13)) for row, y in zip(score, labels.tolist(), strict=True)]
    found = classification_ranks(image, classes, labels)
    assert found.tolist() == ranks
    assert recall_at(found, (1, 5))[5] == np.mean(np.array(ranks) < 5)
    predicted = predictions(image, classes, labels)
    assert torch.equal(predicted == labels, found == 0)
    for row, y, taken in zip(score, labels.tolist(), predicted.tolist(), strict=True):
        assert taken == y or row[taken] == np.delete(row, y).max()
    assert (values == 1) == ((score == score[np.arange(40), labels.numpy(), None]).sum() > 60)  # ties, or nearly none


def test_models_that_say_the_same_of_all_get_nothing():
    same, labels = torch.full((6, 640), 0.3), torch.arange(6)
    assert classification_ranks(same, same, labels).tolist() == [5] * 6
    assert not (predictions(same, same, labels) == labels).any()
    assert neighbour_ranks(same, same, labels, labels, most=3).tolist() == [3] * 6


def test_scores_that_overflow_count_against_the_model():
    huge = torch.tensor([[1e30, -1e30], [1e30, 1e30]])
    ranks = classification_ranks(huge, huge, torch.tensor([1, 0]))
    assert ranks.tolist() == [1, 1]
    assert predictions(huge, huge, torch.tensor([1, 0])).tolist() == [0, 1]


def test_mean_per_class_counts_every_class_alike():
    hits = torch.tensor([1, 1, 1, 1, 0, 0, 1, 0])
    assert mean_per_class(hits, torch.tensor([0, 0, 0, 0, 0, 1, 2, 2]), 3) == pytest.approx((0.8 + 0 + 0.5) / 3)
    with pytest.raises(ValueError, match=r"1 of 4 classes have no image, the first are \[3\]"):
        mean_per_class(hits, torch.tensor([0, 0, 0, 0, 0, 1, 2, 2]), 4)


def test_the_worst_classes_tell_what_they_were_taken_for():
    labels = torch.tensor([0] * 4 + [1] * 4 + [2] * 2)
    predicted = torch.tensor([0, 0, 0, 1, 2, 2, 0, 1, 2, 2])
    assert confusions(predicted, labels, 3, worst=2) == [
        Confusion(1, 4, 0.25, ((2, 0.5), (0, 0.25))),
        Confusion(0, 4, 0.75, ((1, 0.25),)),
    ]
    assert confusions(predicted, labels, 3, worst=1, most=1)[0].taken_for == ((2, 0.5),)


def test_classification_rejects_what_it_cannot_answer():
    image, classes, labels = random_classes(5, 3, 9)
    for changed, message in [
        ((image, classes[:1], labels * 0), "at least 2 classes, got 1"),
        ((image, classes, labels + 3), r"labels must be in 0\.\.2 for 3 classes"),
        ((image, classes, labels[:4]), "labels has 4 entries, but there are 5 images"),
        ((image, classes[:, :2], labels), "one width"),
        ((image / 0, classes, labels), "rows of image are not finite"),
        ((image, classes, labels.float()), "integers"),
    ]:
        with pytest.raises(ValueError, match=message):
            classification_ranks(*changed)


def bank_of(queries: int, rows: int, classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(3)
    center = torch.randn(classes, 6, generator=random)
    query_label, bank_label = (torch.randint(classes, (count,), generator=random) for count in (queries, rows))
    query, bank = (
        normalize(center[label] + 1.5 * torch.randn(len(label), 6, generator=random))
        for label in (query_label, bank_label)
    )
    return query, bank, query_label * 5 - 7, bank_label * 5 - 7  # any integers


@pytest.mark.parametrize("block", [7, 1024])
def test_neighbours_equal_those_of_scikit_learn(monkeypatch, block):
    monkeypatch.setattr(scores, "CPU_BLOCK", block)
    query, bank, query_label, bank_label = bank_of(80, 300, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        recall = recall_at(neighbour_ranks(query, bank, query_label, bank_label), (1, 5, 10, 20))
    near = NearestNeighbors(n_neighbors=20, algorithm="brute", metric="cosine").fit(bank.numpy())
    right = bank_label.numpy()[near.kneighbors(query.numpy(), return_distance=False)] == query_label.numpy()[:, None]
    assert recall == {k: right[:, :k].any(1).mean() for k in (1, 5, 10, 20)}
    one = KNeighborsClassifier(1, algorithm="brute").fit(bank.numpy(), bank_label.numpy())
    assert recall[1] == one.score(query.numpy(), query_label.numpy())
    assert recall[1] < recall[5] < 1


@pytest.mark.parametrize("block", [1, 5, 1024])
def test_neighbours_with_ties_equal_brute_force(monkeypatch, block):
    monkeypatch.setattr(scores, "CPU_BLOCK", block)
    bank, query, bank_label = random_classes(60, 11, 1)
    query_label = torch.tensor([12, *range(10)])  # 12 is in no bank
    score = (query @ bank.T).numpy()
    expected = []
    for row, label in zip(score, query_label.tolist(), strict=True):
        right = bank_label.numpy() == label
        expected.append(min(sum(row[~right] >= row[right].max()), 4) if right.any() else 4)
    found = neighbour_ranks(query, bank, query_label, bank_label, most=4)
    assert found.tolist() == expected
    assert len(set(expected)) > 2
    assert without_class(query_label, bank_label).tolist() == [True] + [False] * 10


def test_neighbours_reject_what_they_cannot_answer():
    query, bank, query_label, bank_label = bank_of(4, 9, 3)
    for changed, message in [
        ((query, bank, query_label, bank_label * 0), "all 9 rows of the bank are of class 0"),
        ((query, bank, query_label[:2], bank_label), "query_label has 2 entries, but there are 4"),
        ((query, bank, query_label, bank_label[:2]), "bank_label has 2 entries, but there are 9"),
        ((query, bank[:0], query_label, bank_label), "bank must be embeddings"),
    ]:
        with pytest.raises(ValueError, match=message):
            neighbour_ranks(*changed)
    with pytest.raises(ValueError, match="most must be at least 1"):
        neighbour_ranks(query, bank, query_label, bank_label, most=0)
