"""Metrics on arrays that can be checked by hand."""

from itertools import permutations
from math import sqrt

import pytest
import torch

from align_train import metrics
from align_train.metrics import chance_recall, effective_rank, mean_cosine, retrieval_recall


def test_recall_of_a_perfect_and_of_a_shifted_pairing():
    eye = torch.eye(4)
    assert set(retrieval_recall(eye, eye, torch.arange(4)).values()) == {1.0}
    # Similarities fall with the distance on a line; each text is nearest to the next image, second nearest to its own.
    place = torch.tensor([0.0, 1.0, 2.0])
    image = torch.stack([place, -place.square() / 2], 1)
    text = torch.stack([place + 0.6, torch.ones(3)], 1)
    recall = retrieval_recall(image, text, torch.arange(3), ks=(1, 2))
    assert recall["t2i_r1"] == pytest.approx(1 / 3)
    assert recall["t2i_r2"] == 1


def test_ties_count_against_the_model():
    same = torch.ones(6, 3)
    recall = retrieval_recall(same, same, torch.arange(6), ks=(1, 5, 6))
    assert recall == {"i2t_r1": 0, "i2t_r5": 0, "i2t_r6": 1, "t2i_r1": 0, "t2i_r5": 0, "t2i_r6": 1}


def test_an_image_with_several_texts_is_a_hit_if_any_is():
    image = torch.eye(2)
    # Scores of the texts a0, a1 (image 0) and b0, b1 (image 1) for image 0: 1, -1, 2, 0; for image 1: 0, 3, 3, 5.
    text = torch.tensor([[1.0, 0.0], [-1.0, 3.0], [2.0, 3.0], [0.0, 5.0]])
    recall = retrieval_recall(image, text, torch.tensor([0, 0, 1, 1]), ks=(1, 2))
    # Image 0: best own 1, beaten by b0 alone. Image 1: best own 5, nothing above.
    assert recall["i2t_r1"] == 0.5
    assert recall["i2t_r2"] == 1
    # a0 and b1, b0 prefer their image; a1 prefers the other.
    assert recall["t2i_r1"] == 0.75


def test_own_texts_do_not_push_each_other_out():
    # Five texts that tie for their image: the image is a hit at 1, no wrong text being as good.
    text = torch.tensor([[1.0, 0.0]] * 5 + [[0.0, 1.0]])
    assert retrieval_recall(torch.eye(2), text, torch.tensor([0] * 5 + [1]))["i2t_r1"] == 1


@pytest.mark.parametrize("block", [1, 3, 50])
def test_blockwise_equals_the_full_matrix(monkeypatch, block):
    generator = torch.Generator().manual_seed(0)
    image_of_text = torch.arange(20).repeat(2)[torch.randperm(40, generator=generator)]
    image = torch.randn(20, 4, generator=generator)
    text = image[image_of_text] + torch.randn(40, 4, generator=generator)
    scores = text @ image.T
    own = scores.gather(1, image_of_text[:, None])
    rank = (scores >= own).sum(1) - 1
    best = torch.stack([scores[image_of_text == i, i].max() for i in range(20)])
    wrong = (scores >= best) & (image_of_text[:, None] != torch.arange(20))
    monkeypatch.setattr(metrics, "BLOCK_ROWS", block)
    recall = retrieval_recall(image, text, image_of_text)
    for k in (1, 5, 10):
        assert recall[f"t2i_r{k}"] == (rank < k).double().mean()
        assert recall[f"i2t_r{k}"] == (wrong.sum(0) < k).double().mean()
    assert 0 < recall["t2i_r1"] < recall["t2i_r5"] < 1


def test_autocast_makes_no_ties():
    # Scores that differ by 1/1000: equal in bf16.
    image = torch.tensor([[1.0, 0.0], [0.999, 0.0]])
    text = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        recall = retrieval_recall(image, text, torch.arange(2), ks=(1,))
    assert recall == {"i2t_r1": 0.5, "t2i_r1": 1.0}


def test_overflowing_scores_count_against_the_model():
    huge = torch.tensor([[1e30, -1e30], [1e30, 1e30]])
    assert retrieval_recall(huge, huge, torch.arange(2), ks=(1,))["t2i_r1"] < 1


def test_recall_rejects_what_it_cannot_answer():
    eye = torch.eye(3)
    broken = eye.clone()
    broken[1, 2] = torch.nan
    for image, text, pairing, message in [
        (broken, eye, [0, 1, 2], "1 of the 3 rows of image are not finite, the first is row 1"),
        (eye, broken * torch.inf, [0, 1, 2], "rows of text are not finite"),
        (eye, eye, [0, 1, 3], r"in 0..2 for 3 images, got \[3\]"),
        (eye, eye, [0, 1, -1], r"got \[-1\]"),
        (eye, eye, [0, 1, 1], r"1 of 3 images have no text, the first are \[2\]"),
        (eye, eye, [0, 1, 2, 2], "for 4 texts, but there are 3"),
        (eye, eye[:, :2], [0, 1, 2], "one width"),
        (eye[:0], eye, [0, 1, 2], "not empty"),
        (eye, eye, [0.0, 1.0, 2.0], "integers"),
    ]:
        with pytest.raises(ValueError, match=message):
            retrieval_recall(image, text, torch.tensor(pairing))
    with pytest.raises(ValueError, match="at least 1"):
        retrieval_recall(eye, eye, torch.arange(3), ks=(0,))


def test_chance_with_one_text_an_image():
    chance = chance_recall(torch.arange(20), 20)
    assert chance == pytest.approx(
        {"i2t_r1": 0.05, "i2t_r5": 0.25, "i2t_r10": 0.5, "t2i_r1": 0.05, "t2i_r5": 0.25, "t2i_r10": 0.5}
    )
    assert list(chance) == list(retrieval_recall(torch.eye(20), torch.eye(20), torch.arange(20)))
    assert set(chance_recall(torch.arange(3), 3, ks=(10,)).values()) == {1.0}


def test_chance_with_several_texts_is_the_mean_over_all_orders():
    image_of_text = torch.tensor([0, 0, 0, 1])
    orders = list(permutations(image_of_text.tolist()))
    for k in (1, 2, 4):
        hits = sum((0 in order[:k]) + (1 in order[:k]) for order in orders)
        chance = chance_recall(image_of_text, 2, ks=(k,))
        assert chance[f"i2t_r{k}"] == pytest.approx(hits / 2 / len(orders))
        assert chance[f"t2i_r{k}"] == min(k, 2) / 2


def test_effective_rank():
    assert effective_rank(torch.eye(8)) == pytest.approx(8)
    assert effective_rank(torch.ones(8, 4)) == pytest.approx(1, abs=1e-3)
    # Singular values 3 and 1: p = 3/4, 1/4, exp of their entropy is 4 / 3^(3/4).
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(4 / 3**0.75)
    with pytest.raises(ValueError, match="all zero"):
        effective_rank(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="not finite"):
        effective_rank(torch.full((2, 2), torch.nan))


def test_mean_cosine():
    assert mean_cosine(torch.eye(5)) == pytest.approx(0, abs=1e-7)
    assert mean_cosine(3 * torch.ones(5, 2)) == pytest.approx(1)
    # Three rows at 0, 45 and 90 degrees, of any length: (2 cos 45 + cos 90) / 3.
    assert mean_cosine(torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 7.0]])) == pytest.approx(sqrt(2) / 3)
    rows = torch.nn.functional.normalize(torch.randn(50, 6, generator=torch.Generator().manual_seed(0)))
    full = (rows @ rows.T)[~torch.eye(50, dtype=torch.bool)].mean().item()
    assert mean_cosine(rows) == pytest.approx(full, abs=1e-7)
    with pytest.raises(ValueError, match="at least 2 rows"):
        mean_cosine(torch.ones(1, 3))
