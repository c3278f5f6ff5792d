"""The order of training: every pair once an epoch, fixed by seed and epoch, the same for any number of ranks."""

import pickle
from itertools import chain

import pytest

from align_train.data.order import Order, Place
from align_train.data.pairs import GlobalBatches

COUNTS = [5, 0, 7, 1, 4]  # an empty shard too
EVERY_PAIR = sorted(Place(shard, row) for shard, count in enumerate(COUNTS) for row in range(count))


def epoch(order, number=0):
    return [order[position] for position in range(number * len(order), (number + 1) * len(order))]


@pytest.mark.parametrize("window", [1, 3, 5, 100])
@pytest.mark.parametrize("seed", range(5))
def test_each_pair_once_an_epoch(window, seed):
    order = Order(COUNTS, seed, window)
    assert len(order) == 17
    for number in range(3):
        assert sorted(epoch(order, number)) == EVERY_PAIR


@pytest.mark.parametrize("window", [1, 3])
def test_only_one_window_of_shards_is_read_at_a_time(window):
    order = Order([10] * 9, 0, window)
    places = epoch(order, 4)
    for first in range(0, 90, 10 * window):
        assert len({place.shard for place in places[first : first + 10 * window]}) == window


def test_a_window_mixes_its_shards():
    order = Order([50, 50], 0, window=2)
    assert len({place.shard for place in epoch(order)[:20]}) == 2
    assert [place.row for place in epoch(Order([50], 0, 1))] != list(range(50))


def test_epochs_differ():
    order = Order([8] * 6, 0, window=2)
    orders = [tuple(epoch(order, number)) for number in range(4)]
    assert len(set(orders)) == 4
    shards = [tuple(dict.fromkeys(place.shard for place in epoch(Order([8] * 6, 0, 1), n))) for n in range(4)]
    assert len(set(shards)) == 4  # shards move too


def test_windows_of_an_epoch_are_shuffled_differently():
    rows = [place.row for place in epoch(Order([20] * 4, 0, 1))]
    assert len({tuple(rows[first : first + 20]) for first in range(0, 80, 20)}) == 4


def test_the_seed_alone_fixes_the_order():
    assert epoch(Order(COUNTS, 3, 2), 1) == epoch(Order(list(COUNTS), 3, 2), 1)
    assert epoch(Order(COUNTS, 3, 2), 1) != epoch(Order(COUNTS, 4, 2), 1)


def test_any_position_at_once():
    order = Order(COUNTS, 1, 2)
    whole = [order[position] for position in range(100)]
    backwards = Order(COUNTS, 1, 2)
    assert [backwards[position] for position in reversed(range(100))] == whole[::-1]
    assert Order(COUNTS, 1, 2)[17 * 10**6] == Order(COUNTS, 1, 2)[17 * 10**6]


def test_a_shard_listed_twice_comes_twice():
    paths = ["a", "b", "a"]
    counts = {"a": 3, "b": 2}
    seen = [(paths[place.shard], place.row) for place in epoch(Order([counts[path] for path in paths], 0, 2))]
    assert sorted(seen) == sorted([("a", row) for row in range(3)] * 2 + [("b", row) for row in range(2)])


def test_pickling_leaves_the_caches_behind():
    order = Order([100_000], 5, 2)
    before = pickle.dumps(order)
    places = [order[position] for position in range(50)]
    assert order._rows.cache_info().currsize == 1  # a window of 100,000 rows is in memory now
    after = pickle.dumps(order)
    assert after == before
    assert len(after) < 1000
    copy = pickle.loads(after)  # noqa: S301
    assert [copy[position] for position in range(50)] == places
    assert copy._rows is not order._rows


def test_a_window_is_shuffled_once_and_few_are_kept():
    order = Order([10] * 12, 0, 2)
    epoch(order)
    assert order._rows.cache_info().misses == 6
    assert order._rows.cache_info().currsize == 2
    assert order._epoch.cache_info().misses == 1


def test_no_pair_and_no_window_are_errors():
    with pytest.raises(ValueError, match="the 2 shards hold no pair"):
        Order([0, 0], 0)
    with pytest.raises(ValueError, match="the 0 shards hold no pair"):
        Order([], 0)
    with pytest.raises(ValueError, match=r"data\.shuffle_shards is 0"):
        Order([1], 0, 0)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 12])
def test_any_number_of_ranks_covers_the_same_batches(world_size):
    ranks = [list(GlobalBatches(12, 2, 5, rank, world_size)) for rank in range(world_size)]
    shares = list(zip(*ranks, strict=True))
    assert len(shares) == 3
    for step, parts in zip(range(2, 5), shares, strict=True):
        assert {len(part) for part in parts} == {12 // world_size}
        assert list(chain(*parts)) == list(range(step * 12, step * 12 + 12))


def test_a_start_in_the_middle_is_the_tail_of_the_whole():
    whole = list(GlobalBatches(6, 0, 7, 1, 3))
    assert list(GlobalBatches(6, 4, 7, 1, 3)) == whole[4:]
    assert len(GlobalBatches(6, 4, 7, 1, 3)) == 3
    assert len(GlobalBatches(6, 7, 7)) == len(GlobalBatches(6, 9, 7)) == 0
    assert list(GlobalBatches(6, 9, 7)) == []


@pytest.mark.parametrize(("batch_size", "world_size"), [(10, 4), (3, 4), (0, 1), (-4, 2)])
def test_uneven_shares_are_an_error(batch_size, world_size):
    with pytest.raises(ValueError, match=rf"batch_size is {batch_size} .*{world_size} ranks"):
        GlobalBatches(batch_size, 0, 1, 0, world_size)
