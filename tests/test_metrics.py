"""Metrics on arrays that can be checked by hand."""

from itertools import permutations
from math import sqrt

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from align_train.metrics import (
    alignment,
    chance_median_rank,
    chance_recall,
    effective_rank,
    mean_cosine,
    median_rank,
    modality_gap,
    recall_at,
    retrieval_ranks,
    retrieval_recall,
    scores,
    uniformity,
)


def brute_force(score: np.ndarray, image_of_text: np.ndarray) -> tuple[list[int], list[int]]:
    """Ranks both ways from the full matrix of scores, images by texts, straight from the definition."""
    images, texts = score.shape
    image_rank = []
    for i in range(images):
        best = max(score[i, j] for j in range(texts) if image_of_text[j] == i)
        image_rank.append(sum(score[i, j] >= best and image_of_text[j] != i for j in range(texts)))
    own = score[image_of_text, np.arange(texts)]
    text_rank = [sum(score[i, j] >= own[j] and image_of_text[j] != i for i in range(images)) for j in range(texts)]
    return image_rank, text_rank


def captions(images: int, seed: int) -> Tensor:
    """One to four texts an image, shuffled."""
    random = torch.Generator().manual_seed(seed)
    each = torch.arange(images).repeat_interleave(torch.randint(1, 5, (images,), generator=random))
    return each[torch.randperm(len(each), generator=random)]


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


@pytest.mark.parametrize("block", [1, 7, 1024])
@pytest.mark.parametrize("values", [100_000, 2, 1])
def test_ranks_equal_brute_force_with_few_ties_with_many_and_with_nothing_else(monkeypatch, block, values):
    monkeypatch.setattr(scores, "CPU_BLOCK", block)
    random = np.random.default_rng(0)
    image_of_text = captions(17, seed=1)
    # Small integers, so that every order of adding up gives the same sum.
    image = random.integers(-values, values, (17, 3)) if values > 1 else np.ones((17, 3))
    text = random.integers(-values, values, (len(image_of_text), 3)) if values > 1 else np.ones((len(image_of_text), 3))
    expected = brute_force(image @ text.T, image_of_text.numpy())
    found = retrieval_ranks(*(torch.from_numpy(x).double() for x in (image, text)), image_of_text)
    assert tuple(x.tolist() for x in found) == expected
    assert all(x.dtype == torch.int64 for x in found)


def test_no_more_than_a_block_of_scores_is_held_and_each_is_visited_once(monkeypatch):
    monkeypatch.setattr(scores, "CPU_BLOCK", 8)
    rows, columns = torch.eye(20, 5), torch.ones(27, 5)
    visited = torch.zeros(20, 27)
    for across, down, some in scores.wrong_scores(rows, columns, torch.arange(20), torch.arange(27)):
        assert max(some.shape) <= 8
        visited[across, down] += 1
    assert visited.min() == visited.max() == 1


@pytest.mark.parametrize("width", [5, 64, 640])
@pytest.mark.parametrize("block", [3, 1024])
def test_equal_rows_tie_wherever_they_are(monkeypatch, width, block):
    monkeypatch.setattr(scores, "CPU_BLOCK", block)
    random = torch.Generator().manual_seed(width)
    image_of_text = captions(40, seed=2)
    few_images = normalize(torch.randn(8, width, generator=random))
    few_texts = normalize(torch.randn(12, width, generator=random))
    of_image = torch.randint(8, (40,), generator=random)
    of_text = torch.randint(12, (len(image_of_text),), generator=random)
    score = (few_images.double() @ few_texts.double().T)[of_image][:, of_text]
    found = retrieval_ranks(few_images[of_image], few_texts[of_text], image_of_text)
    assert tuple(x.tolist() for x in found) == brute_force(score.numpy(), image_of_text.numpy())
    # Texts that equal their images: the scores are 1 within rounding, and every double of an image is a tie.
    _, text_rank = retrieval_ranks(few_images[of_image], few_images[of_image][image_of_text], image_of_text)
    doubles = (of_image[:, None] == of_image).sum(1) - 1
    assert torch.equal(text_rank, doubles[image_of_text])


def test_recall_and_median_from_ranks():
    ranks = torch.tensor([0, 0, 3, 8, 9, 40])
    assert recall_at(ranks, (1, 5, 10)) == {1: 2 / 6, 5: 3 / 6, 10: 5 / 6}
    # The median of ranks from 0 is 5.5.
    assert median_rank(ranks) == 6
    assert median_rank(torch.tensor([0, 0, 7])) == 1
    assert median_rank(torch.tensor([4])) == 5
    with pytest.raises(ValueError, match="not empty"):
        median_rank(ranks[:0])
    with pytest.raises(ValueError, match="at least 1"):
        recall_at(ranks, ())


def test_embeddings_in_half_precision_and_with_gradients_are_taken():
    random = torch.Generator().manual_seed(0)
    image, text = (normalize(torch.randn(30, 8, generator=random)).bfloat16() for _ in range(2))
    expected = retrieval_ranks(image.double(), text.double(), torch.arange(30))
    found = retrieval_ranks(image.requires_grad_(), text.requires_grad_(), torch.arange(30))
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(found, expected, strict=True))


def test_fast_products_that_are_switched_on_outside_make_no_ties():
    before = torch.get_float32_matmul_precision()
    random = torch.Generator().manual_seed(0)
    # All alike, so that scores are close.
    image, text = (normalize(1 + 0.3 * torch.randn(300, 640, generator=random)) for _ in range(2))
    expected = retrieval_ranks(image, text, torch.arange(300))
    try:
        torch.set_float32_matmul_precision("medium")
        found = retrieval_ranks(image, text, torch.arange(300))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


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
        (eye, eye, [0, 1, 2, 2], "has 4 entries, but there are 3 texts"),
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


def test_chance_has_a_median_where_its_recall_is_a_half():
    for images in (1, 20, 21):
        median = float((images + 1) // 2)
        pairs = torch.arange(images)
        assert chance_median_rank(pairs, images) == {"i2t_median_rank": median, "t2i_median_rank": median}
        assert median_rank(pairs) == median
    five = torch.arange(1000).repeat(5)
    half = int(chance_median_rank(five, 1000)["i2t_median_rank"])
    recall = chance_recall(five, 1000, ks=(half - 1, half))
    assert recall[f"i2t_r{half - 1}"] < 0.5 <= recall[f"i2t_r{half}"]


def test_alignment_uniformity_and_gap_by_hand():
    # Two points at a right angle: d^2 = 2. Opposite ones: d^2 = 4. Lengths do not matter.
    a, b = torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[0.0, 2.0], [-1.0, 0.0]])
    assert alignment(a, b) == pytest.approx(3)
    assert alignment(a, a) == 0
    assert uniformity(torch.cat([a[:1], b[:1]])) == pytest.approx(-4)
    assert uniformity(torch.ones(5, 3)) == pytest.approx(0, abs=1e-6)
    assert modality_gap(a, -a) == pytest.approx(2)
    # Means (1, 0) and (-1/2, 1/2).
    assert modality_gap(a, b) == pytest.approx(sqrt(1.5**2 + 0.5**2))
    for wrong, message in [((a, b[:1]), "2 images and 1 texts"), ((a, b[:, :1]), "one width"), ((a / 0, b), "finite")]:
        with pytest.raises(ValueError, match=message):
            alignment(*wrong)
    with pytest.raises(ValueError, match="at least 2 rows"):
        uniformity(a[:1])


@pytest.mark.parametrize("block", [1, 8, 1024])
def test_health_equals_the_full_matrices_and_heeds_no_autocast(monkeypatch, block):
    monkeypatch.setattr(scores, "CPU_BLOCK", block)
    random = np.random.default_rng(0)
    image, text = random.normal(size=(23, 5)), random.normal(size=(23, 5))
    unit, other = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
    near = np.exp(-2 * ((unit[:, None] - unit) ** 2).sum(2))[np.triu_indices(23, 1)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a, b = torch.from_numpy(image).float(), torch.from_numpy(text).float()
        assert uniformity(a) == pytest.approx(np.log(near.mean()), abs=1e-5)
        assert alignment(a, b) == pytest.approx(((unit - other) ** 2).sum(1).mean(), abs=1e-5)
        assert modality_gap(a, b) == pytest.approx(np.linalg.norm(unit.mean(0) - other.mean(0)), abs=1e-5)


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
