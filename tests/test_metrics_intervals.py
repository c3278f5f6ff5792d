"""Bootstrap intervals against resampling by hand with the same draws."""

import numpy as np
import pytest
import torch

from align_train.metrics import class_mean_interval, intervals, mean_interval, median_interval

RANDOM = np.random.default_rng(7)
HITS = (RANDOM.random(60) < 0.3).astype(float)
RANKS = RANDOM.integers(0, 50, 60)
GROUPS = RANDOM.integers(0, 15, 60)


def draws(things: int, size: int) -> np.ndarray:
    """(1000, things) numbers below `size`."""
    return (np.random.default_rng(0).random((1000, things)) * size).astype(int)


def drawn_groups(values: np.ndarray) -> list[np.ndarray]:
    """Values of each of 1000 samples of groups."""
    names = np.unique(GROUPS)
    return [np.concatenate([values[names[g] == GROUPS] for g in sample]) for sample in draws(len(names), len(names))]


def percentiles(statistics: list[float]) -> tuple[float, float]:
    return pytest.approx(tuple(np.percentile(statistics, [2.5, 97.5])), abs=1e-12)


@pytest.mark.parametrize("held", [1, 1000, 2**20])
def test_intervals_equal_resampling_by_hand(monkeypatch, held):
    monkeypatch.setattr(intervals, "DRAWS", held)
    hits, ranks, groups = (torch.from_numpy(x) for x in (HITS, RANKS, GROUPS))
    assert mean_interval(hits) == percentiles([HITS[sample].mean() for sample in draws(60, 60)])
    assert mean_interval(hits, groups) == percentiles([x.mean() for x in drawn_groups(HITS)])
    medians = [np.floor(np.median(RANKS[sample])) + 1 for sample in draws(60, 60)]
    assert median_interval(ranks) == percentiles(medians)
    assert median_interval(ranks, groups) == percentiles([np.floor(np.median(x)) + 1 for x in drawn_groups(RANKS)])


def test_a_mean_of_classes_is_resampled_within_each_class():
    label = np.repeat([0, 1, 2], [30, 20, 10])
    uniform = np.random.default_rng(0).random((1000, 60))
    means = []
    for row in uniform:
        parts = [HITS[a:b][(row[a:b] * (b - a)).astype(int)] for a, b in ((0, 30), (30, 50), (50, 60))]
        means.append(np.mean([part.mean() for part in parts]))
    shuffle = np.argsort(np.arange(60) % 7, kind="stable")
    back = torch.from_numpy(label[shuffle]) * 3 - 1  # any integers
    within = class_mean_interval(torch.from_numpy(HITS), torch.from_numpy(label))
    assert within == percentiles(means)
    # In another order of the images other ones are drawn, so the interval is only nearly the same.
    assert class_mean_interval(torch.from_numpy(HITS[shuffle]), back) == pytest.approx(within, abs=0.03)


def test_an_interval_of_a_share_is_that_of_the_binomial():
    hits = torch.arange(5000) % 10 < 3
    low, high = mean_interval(hits, resamples=4000)
    half = 1.96 * (0.3 * 0.7 / 5000) ** 0.5
    assert (low, high) == pytest.approx((0.3 - half, 0.3 + half), abs=0.1 * half)
    narrow = mean_interval(hits, resamples=4000, level=0.5)
    assert low < narrow[0] < 0.3 < narrow[1] < high


def test_copies_within_a_group_say_nothing_new():
    hits, ranks, groups = torch.from_numpy(HITS), torch.from_numpy(RANKS), torch.arange(60)
    assert mean_interval(hits.repeat(5), groups.repeat(5)) == pytest.approx(mean_interval(hits))
    assert median_interval(ranks.repeat(5), groups.repeat(5)) == median_interval(ranks)
    alone = mean_interval(hits.repeat(5))
    assert alone[1] - alone[0] < 0.6 * (mean_interval(hits)[1] - mean_interval(hits)[0])


def test_what_never_varies_has_an_interval_of_no_width():
    assert mean_interval(torch.ones(7)) == (1, 1)
    assert median_interval(torch.tensor([4])) == (5, 5)
    assert class_mean_interval(torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0, 0, 1])) == (0.5, 0.5)


def test_the_seed_and_nothing_else_decides():
    hits = torch.from_numpy(HITS)
    torch.manual_seed(1)
    first = mean_interval(hits)
    torch.manual_seed(2)
    assert mean_interval(hits) == first
    assert mean_interval(hits, seed=1) != first


def test_intervals_reject_what_they_cannot_answer():
    hits = torch.from_numpy(HITS)
    for values, groups, message in [
        (hits[:0], None, "not empty"),
        (hits / 0, None, "finite"),
        (hits, torch.arange(3), "groups has 3 entries, but there are 60 values"),
    ]:
        with pytest.raises(ValueError, match=message):
            mean_interval(values, groups)
    with pytest.raises(ValueError, match="level"):
        mean_interval(hits, level=95)
    with pytest.raises(ValueError, match="resamples"):
        mean_interval(hits, resamples=0)
