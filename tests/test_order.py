"""The order of pairs: fixed by seed, epoch and shard list; cut into batches and shares; gone on with anywhere."""

import json
from collections import Counter
from itertools import chain, islice, pairwise

import pytest
from conftest import drawn_pair
from reading import NONE, batches, keys, order_of, pair_members, sources, write_tar

from align_train.data import BatchPlans, OrderSettings

ALL = [drawn_pair(number).key for number in range(30)]


@pytest.fixture
def folder(make_shards):
    """Thirty pairs in eight shards, the last of them short."""
    return make_shards(30, 4)


def state_of(order):
    """As a checkpoint gives it back."""
    return json.loads(json.dumps(order.state))


# Epochs


@pytest.mark.parametrize("window", [1, 3, 8, 100])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("batch", [1, 7, 30])
def test_each_pair_once_an_epoch(folder, window, seed, batch):
    order = order_of(sources(pairs=folder), seed=seed, shuffle_shards=window)
    found = keys(order, 210, batch)
    for epoch in range(7):
        assert sorted(found[30 * epoch : 30 * epoch + 30]) == ALL


def test_the_seed_alone_fixes_the_order(folder):
    def drawn(**settings):
        return keys(order_of(sources(pairs=folder), **settings), 60, 10)

    assert drawn(seed=3) == drawn(seed=3)
    assert drawn(seed=3) != drawn(seed=4)
    assert drawn(seed=3)[:30] != drawn(seed=3)[30:]
    assert drawn(seed=3) == keys(order_of(sources(pairs=f"{folder}/*.tar"), seed=3), 60, 30)


def test_only_one_window_of_shards_is_read_at_a_time(folder):
    found = [ALL.index(key) // 4 for key in keys(order_of(sources(pairs=folder), shuffle_shards=2), 30)]
    windows, start = [], 0
    while start < 30:
        shards = set(found[start : start + 5])
        size = sum(found.count(shard) for shard in shards)
        assert len(shards) == 2
        assert set(found[start : start + size]) == shards
        windows.append(shards)
        start += size
    assert len(windows) == 4


def test_a_window_mixes_its_shards(folder):
    found = [ALL.index(key) // 4 for key in keys(order_of(sources(pairs=folder), shuffle_shards=8), 30)]
    assert sum(one != other for one, other in pairwise(found)) > 15


def test_a_shard_listed_twice_comes_twice(folder):
    found = keys(order_of(sources(pairs={"shards": str(folder), "repeat": 2})), 60)
    assert Counter(found) == dict.fromkeys(ALL, 2)


def test_dropping_the_end_of_an_epoch_counts_it(folder):
    order = order_of(sources(pairs=folder), epoch_end="drop", shuffle_shards=3)
    for _ in range(3):
        epoch, dropped = [], []
        for _ in range(3):
            taken, lost = order.take(9)
            epoch += [window[pair].key for window, pair in taken]
            dropped.append(lost["epoch_tail"])
        assert len(set(epoch)) == 27
        assert dropped == ([3, 0, 0] if order.state["cursors"]["pairs"][0] else [0, 0, 0])


def test_carrying_over_mixes_epochs_in_one_batch_and_loses_nothing(folder):
    order = order_of(sources(pairs=folder))
    assert sorted(keys(order, 90, 9)) == sorted(ALL * 3)


def test_a_batch_larger_than_an_epoch_is_an_error(folder):
    with pytest.raises(ValueError, match=r"shards of pairs hold 30 pairs, and a batch takes 31 of them"):
        order_of(sources(pairs=folder)).take(31)


def test_shards_without_a_pair_are_an_error(tmp_path):
    empty, texts = write_tar(tmp_path / "a.tar", []), write_tar(tmp_path / "b.tar", [("x.txt", b"x")])
    order = order_of(sources(pairs={"shards": [str(empty), str(texts)]}))
    with pytest.raises(ValueError, match=r"the 2 shards of pairs hold no pair \(left out: no_image 1\)"):
        order.take(1)


# Going on


@pytest.mark.parametrize("window", [1, 3, 100])
@pytest.mark.parametrize("step", range(0, 11, 2))
def test_it_goes_on_where_it_stood(folder, window, step):
    whole = keys(order_of(sources(pairs=folder), shuffle_shards=window), 77, 7)
    order = order_of(sources(pairs=folder), shuffle_shards=window)
    begun = keys(order, 7 * step, 7) if step else []
    resumed = order_of(sources(pairs=folder), state_of(order), shuffle_shards=window)
    assert begun + keys(resumed, 77 - 7 * step, 7) == whole


def test_another_batch_size_goes_on_too(folder):
    order = order_of(sources(pairs=folder), shuffle_shards=3)
    begun = keys(order, 14, 7)
    assert sorted(begun + keys(order_of(sources(pairs=folder), state_of(order), shuffle_shards=3), 16, 4)) == ALL


@pytest.mark.parametrize(("before", "after"), [((1, 0), (2, 1)), ((2, 1), (1, 2)), ((3, 0), (2, 2)), ((2, 0), (6, 0))])
def test_another_number_of_ranks_and_workers_sees_each_pair_once(folder, before, after):
    """The position is that of the last batch used, not of the last one read ahead."""
    read = sources(pairs=folder)

    def part(ranks, workers, start, stop, state=None):
        found = []
        for rank in range(ranks):
            made = batches(
                read, batch_size=6, start=start, steps=5, workers=workers, rank=rank, world_size=ranks, state=state,
                augmentation=NONE, shuffle_shards=3,
            )  # fmt: skip
            found += [key for batch in islice(made, stop - start) for key in batch.keys]
        return found

    order = order_of(read, seed=1, shuffle_shards=3)
    plans = BatchPlans(order, 6, 0, 5)
    list(plans)  # all are read ahead
    state = json.loads(json.dumps(plans.state_at(2)))
    assert sorted(part(*before, 0, 2) + part(*after, 2, 5, state)) == ALL


def test_other_shards_are_refused_or_begin_the_next_epoch(folder, make_shards):
    order = order_of(sources(pairs=folder))
    keys(order, 12)
    more = {"shards": [str(folder), str(make_shards(4, 4, "more", first=30))]}
    with pytest.raises(ValueError, match=r"shards was \[\['pairs', 8, .*now .*\['pairs', 9, .*on_change=next_epoch"):
        order_of(sources(pairs=more), state_of(order))
    with pytest.raises(ValueError, match="seed was 0, now 5"):
        order_of(sources(pairs=folder), state_of(order), seed=5)
    resumed = order_of(sources(pairs=more), state_of(order), on_change="next_epoch")
    assert sorted(keys(resumed, 34)) == sorted([*ALL, *(drawn_pair(30 + n).key for n in range(4))])
    assert resumed.drawn == 46
    assert resumed.state["epochs"]["pairs"] == 2


def test_a_window_that_has_changed_is_refused_or_left(folder):
    """A shard that was broken has been mended: the pairs of the window are others now."""
    second = sorted(folder.glob("*.tar"))[1]
    whole = second.read_bytes()
    second.write_bytes(b"<html>" * 100)
    order = order_of(sources(pairs=folder))
    keys(order, 12)
    second.write_bytes(whole)
    with pytest.raises(ValueError, match=r"16 shards that were being read had 26 pairs, and now 30: .*on_change"):
        order_of(sources(pairs=folder), state_of(order)).take(6)
    resumed = order_of(sources(pairs=folder), state_of(order), on_change="next_epoch")
    assert sorted(keys(resumed, 30, 10)) == ALL
    twice = order_of(sources(pairs=folder), state_of(order)).at(state_of(order))
    with pytest.raises(ValueError, match="had 26 pairs, and now 30"):
        twice.at(twice.state).take(6)


def test_a_broken_shard_is_not_tried_again_in_the_run(folder):
    second = sorted(folder.glob("*.tar"))[1]
    whole = second.read_bytes()
    second.write_bytes(b"<html>" * 100)
    order = order_of(sources(pairs=folder))
    first = keys(order, 26)
    second.write_bytes(whole)
    assert sorted(keys(order, 52, 26)) == sorted(first * 2)


def test_a_corpus_that_was_moved_is_the_same(folder):
    whole = keys(order_of(sources(pairs=folder)), 24, 6)
    order = order_of(sources(pairs=folder))
    keys(order, 12, 6)
    elsewhere = folder.rename(folder.with_name("elsewhere"))
    assert keys(order_of(sources(pairs=elsewhere), state_of(order)), 12, 6) == whole[12:]


def test_epochs_are_counted(folder):
    order = order_of(sources(pairs=folder), shuffle_shards=2)
    assert order.state["epochs"] == {"pairs": 0.0}
    before = 0.0
    for _ in range(6):
        order.take(10)
        assert before < order.state["epochs"]["pairs"] < before + 0.45
        before = order.state["epochs"]["pairs"]
    assert order.state["epochs"]["pairs"] == 2.0


# Several sources


@pytest.fixture
def mixed(folder, make_shards):
    """Thirty pairs and ten others, three of which to one."""
    other = make_shards(10, 4, "other", first=100)
    return sources(big={"shards": str(folder), "weight": 3}, small={"shards": str(other), "weight": 1.0})


def is_small(key):
    return int(key[-5:]) >= 100


def test_sources_without_weights_are_one_sequence(folder, make_shards):
    other = make_shards(10, 4, "other", first=100)
    order = order_of(sources(big=folder, small=other))
    assert sorted(keys(order, 40, 8)) == sorted(ALL + [drawn_pair(100 + n).key for n in range(10)])
    assert list(order.state["cursors"]) == ["big+small"]


def test_weights_fix_the_shares_and_each_source_has_its_epochs(mixed):
    order = order_of(mixed)
    found = keys(order, 4000, 20)
    small = [key for key in found if is_small(key)]
    big = [key for key in found if not is_small(key)]
    assert len(small) / 4000 == pytest.approx(0.25, abs=0.03)  # four standard errors
    for part, names in ((big, ALL), (small, [drawn_pair(100 + n).key for n in range(10)])):
        epochs = [part[start : start + len(names)] for start in range(0, len(part), len(names))]
        assert all(sorted(epoch) == names for epoch in epochs[:-1])
        assert epochs[0] != epochs[1]
    assert order.state["epochs"]["small"] == pytest.approx(len(small) / 10, abs=0.5)


@pytest.mark.parametrize("step", [1, 5, 11])
def test_a_mixture_goes_on_where_it_stood(mixed, step):
    whole = keys(order_of(mixed), 240, 20)
    order = order_of(mixed)
    begun = keys(order, 20 * step, 20)
    assert begun + keys(order_of(mixed, state_of(order)), 240 - 20 * step, 10) == whole


def test_a_source_too_small_for_its_share_is_named(folder, make_shards):
    other = make_shards(2, 4, "other", first=100)
    read = sources(big={"shards": str(folder), "weight": 1}, small={"shards": str(other), "weight": 1})
    with pytest.raises(ValueError, match=r"shards of small hold 2 pairs, and a batch takes \d+ of them.*the weight"):
        keys(order_of(read), 80, 20)


def test_dropping_with_weights_ends_in_an_error_not_in_a_loop(folder, make_shards):
    other = make_shards(10, 4, "other", first=100)
    read = sources(big={"shards": str(folder), "weight": 10}, small={"shards": str(other), "weight": 1})
    with pytest.raises(ValueError, match=r"shards of (big|small) hold \d+ pairs, and a batch takes \d+ of them"):
        keys(order_of(read, epoch_end="drop"), 20_000, 100)


def test_another_order_of_the_sources_is_refused(folder, make_shards):
    other = str(make_shards(10, 4, "other", first=100))
    given = {"big": {"shards": str(folder), "weight": 3}, "small": {"shards": other, "weight": 1}}
    order = order_of(sources(**given))
    keys(order, 20)
    with pytest.raises(ValueError, match="shards was"):
        order_of(sources(**dict(reversed(given.items()))), state_of(order))


def test_with_replacement_shards_are_drawn_anew(folder):
    settings = {"replacement": True, "shuffle_shards": 2}
    found = keys(order_of(sources(pairs=folder), **settings), 400, 8)
    assert len(set(found)) == 30
    assert max(Counter(found[:30]).values()) > 1
    assert all(len(set(found[start : start + 8])) > 4 for start in range(0, 400, 8))
    begun = order_of(sources(pairs=folder), **settings)
    first = keys(begun, 200, 8)
    assert first + keys(
        order_of(sources(pairs=folder), state_of(begun), replacement=True, shuffle_shards=2), 200, 8
    ) == (found)


def test_with_replacement_fewer_shards_than_a_window_are_an_epoch(make_shards):
    order = order_of(sources(pairs=make_shards(12, 4)), replacement=True)
    assert sorted(keys(order, 24, 12)) == sorted([drawn_pair(n).key for n in range(12)] * 2)
    assert order.state["epochs"] == {"pairs": 2.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shuffle_shards": 0}, r"data\.order\.shuffle_shards is 0"),
        ({"samples_per_epoch": 0}, r"data\.order\.samples_per_epoch is 0"),
        ({"samples_per_epoch": 1.5}, r"data\.order\.samples_per_epoch is 1\.5"),
        ({"epoch_end": "cut"}, r"data\.order\.epoch_end is 'cut': choose carry_over or drop"),
        ({"on_change": "ignore"}, r"data\.order\.on_change is 'ignore': choose refuse or next_epoch"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        OrderSettings(**settings)


# Batches


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_any_number_of_ranks_covers_the_same_batches(folder, world_size):
    def plans(rank, ranks):
        return [
            [place.key for place in plan.places]
            for plan in BatchPlans(order_of(sources(pairs=folder)), 6, 0, 10, rank, ranks)
        ]

    parts = [plans(rank, world_size) for rank in range(world_size)]  # pairs are dealt out in turn
    assert [list(chain(*zip(*shares, strict=True))) for shares in zip(*parts, strict=True)] == plans(0, 1)


@pytest.mark.parametrize(("ranks", "parts"), [(1, 4), (2, 2), (4, 1)])
def test_micro_batches_are_the_same_on_any_number_of_ranks(folder, ranks, parts):
    def plans(rank, ranks, parts):
        return list(BatchPlans(order_of(sources(pairs=folder)), 8, 0, 5, rank, ranks, parts))

    each = [plans(rank, ranks, parts) for rank in range(ranks)]
    assert [len(found) for found in each] == [5 * parts] * ranks
    for number, whole in enumerate(plans(0, 1, 1)):
        for rank in range(ranks):
            for part in range(parts):
                plan, place = each[rank][number * parts + part], rank + ranks * part
                assert (plan.first, plan.stride) == (whole.first + place, 4)
                assert [pair.key for pair in plan.places] == [pair.key for pair in whole.places[place::4]]


def test_a_batch_that_cannot_be_cut_into_micro_batches_is_refused(folder):
    with pytest.raises(ValueError, match=r"12 over all ranks, but there are 2 ranks with 4 micro-batches each.*of 8"):
        BatchPlans(order_of(sources(pairs=folder)), 12, 0, 5, 0, 2, 4)


def test_fewer_shards_than_ranks_and_workers(tmp_path):
    """One shard, four ranks, two workers each: no rank starves, and the epochs go on."""
    path = write_tar(tmp_path / "a.tar", [member for n in range(6) for member in pair_members(n)])
    parts = [
        [b.keys for b in batches(sources(pairs=path), batch_size=4, steps=6, workers=2, rank=r, world_size=4)]
        for r in range(4)
    ]
    assert [len(part) for part in parts] == [6] * 4
    found = [key for step in zip(*parts, strict=True) for share in step for key in share]
    assert Counter(found) == dict.fromkeys((drawn_pair(n).key for n in range(6)), 4)


def test_spares_are_not_of_the_batch(folder):
    for plan in BatchPlans(order_of(sources(pairs=folder)), 6, 0, 4):
        assert plan.spares
        assert {place.key for place in plan.spares}.isdisjoint(place.key for place in plan.places)


def test_what_is_left_out_is_counted_once(tmp_path):
    members = [member for n in range(6) for member in pair_members(n)]
    path = write_tar(tmp_path / "a.tar", [*members, ("lonely.txt", b"no image")])
    parts = [list(BatchPlans(order_of(sources(pairs=path)), 4, 0, 3, rank, 2)) for rank in range(2)]
    assert [plan.dropped["no_image"] for plan in parts[0]] == [1, 1, 0]  # as the first and the second epoch begin
    assert not any(plan.dropped for plan in parts[1])
    plans = BatchPlans(order_of(sources(pairs=path)), 4, 0, 3)
    list(plans)
    rest = BatchPlans(order_of(sources(pairs=path), plans.state_at(1)), 4, 1, 3)
    assert [plan.dropped["no_image"] for plan in rest] == [1, 0]


@pytest.mark.parametrize(("batch_size", "world_size"), [(10, 4), (3, 4), (0, 1), (-4, 2)])
def test_uneven_shares_are_an_error(folder, batch_size, world_size):
    with pytest.raises(ValueError, match=rf"data\.batch_size is {batch_size} .* {world_size} ranks"):
        BatchPlans(order_of(sources(pairs=folder)), batch_size, 0, 1, 0, world_size)
