"""What a step took whose loss was no number is taken by no step again; all else comes as if it had never been there."""

import copy
import json
from collections.abc import Callable, Sequence
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from conftest import drawn_image, drawn_pair
from metadata import parquet
from reading import FULL, NONE, SMALL, keys, order_of, sources, write_tar

from align_train.batch import StepBatch
from align_train.corpus.fetch import Fetcher
from align_train.corpus.fetch.client import Limits, Permissions
from align_train.corpus.images import ImageSettings
from align_train.corpus.shards import write_shards
from align_train.corpus.stream import CoyoStream
from align_train.data import BatchPlans, OrderSettings, Reading, Source
from align_train.data.storage.cache import Cache
from align_train.engine.data import PairData
from align_train.engine.skipping import FILE, Skipped, forget_skipped, note_skipped, ranges, read_skipped
from align_train.engine.stream import StreamData

Ranges = Sequence[tuple[int, int]]
RANGES: dict[str, Ranges] = {
    "one batch": [(12, 18)],
    "the very first": [(0, 6)],
    "within a batch": [(13, 15)],
    "over batches' borders": [(10, 21)],
    "touching": [(18, 24), (12, 18)],
    "overlapping": [(12, 24), (6, 18), (13, 14)],
    "over an epoch's end": [(25, 37)],
    "longer than an epoch": [(20, 70)],
    "several in a batch": [(1, 2), (3, 5), (6, 9), (40, 41)],
}


def written(folder: Path, count: int, first: int = 0) -> Path:
    """That many drawn pairs, four a shard."""
    write_shards((drawn_pair(first + number) for number in range(count)), folder, "", 4)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty pairs in eight shards, the last of them short."""
    return written(tmp_path_factory.mktemp("pairs"), 30)


@pytest.fixture(scope="module")
def mixed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    """Thirty pairs and ten others, three of which to one."""
    other = written(tmp_path_factory.mktemp("other"), 10, 100)
    return sources(big={"shards": str(folder), "weight": 3}, small={"shards": str(other), "weight": 1})


def planned(
    read: list[Source], skipped: Ranges, steps: int = 9, batch: int = 6, layout: tuple[int, int] = (1, 1), **given: Any
) -> list[list[tuple[int, str]]]:
    """Of each step, the number and the key of each pair, put together from all ranks' micro-batches."""
    (ranks, parts), start, state = layout, given.pop("start", 0), given.pop("state", None)
    each = [
        list(BatchPlans(order_of(read, state, **given), batch, start, steps, rank, ranks, parts, skipped))
        for rank in range(ranks)
    ]
    found = []
    for step in range(steps - start):
        plans = [plan for plans in each for plan in plans[parts * step : parts * (step + 1)]]
        pairs = [(p.first + n * p.stride, place.key) for p in plans for n, place in enumerate(p.places)]
        found.append(sorted(pairs))
    return found


def without(found: Sequence[str], skipped: Ranges) -> list[str]:
    """All but what has a number in one of the ranges."""
    return [key for number, key in enumerate(found) if not any(begin <= number < end for begin, end in skipped)]


def keys_of(found: list[list[tuple[int, str]]]) -> list[str]:
    return [key for step in found for _, key in step]


# Plans


@pytest.mark.parametrize("layout", [(1, 1), (3, 2)])
@pytest.mark.parametrize("skipped", RANGES.values(), ids=RANGES)
def test_no_step_takes_what_is_skipped_and_nothing_else_is_lost(
    folder: Path, skipped: Ranges, layout: tuple[int, int]
) -> None:
    read = sources(pairs=folder)
    whole = keys(order_of(read, shuffle_shards=3), 180, 6)
    found = planned(read, skipped, layout=layout, shuffle_shards=3)
    assert keys_of(found) == without(whole, skipped)[: 9 * 6]
    numbers = [number for step in found for number, _ in step]
    assert numbers == sorted(set(numbers))  # each is the seed of one pair
    assert all(step[-1][0] - step[0][0] == 5 for step in found)


@pytest.mark.parametrize("skipped", [RANGES["over batches' borders"], RANGES["overlapping"]])
def test_a_mixture_of_sources_skips_by_the_same_numbers(mixed: list[Source], skipped: Ranges) -> None:
    whole = keys(order_of(mixed), 180, 6)
    assert keys_of(planned(mixed, skipped, layout=(2, 1))) == without(whole, skipped)[: 9 * 6]


@pytest.mark.parametrize("step", [0, 1, 2, 4, 5, 8])
@pytest.mark.parametrize("skipped", [RANGES["the very first"], RANGES["several in a batch"], [(25, 37), (44, 50)]])
def test_going_on_before_or_behind_skips_the_same(mixed: list[Source], skipped: Ranges, step: int) -> None:
    plans = BatchPlans(order_of(mixed), 6, 0, 9, skipped=skipped)
    whole = list(plans)
    state = json.loads(json.dumps(plans.state_at(step)))
    rest = list(BatchPlans(order_of(mixed, state), 6, step, 9, skipped=skipped))
    assert rest == whole[step:]  # spares and counts too
    assert keys_of(planned(mixed, skipped, layout=(3, 1), start=step, state=state)) == [
        place.key for plan in rest for place in plan.places
    ]


@pytest.mark.parametrize("after", [2, 4, 9, 12])
def test_what_was_taken_in_other_batches_is_skipped_wherever_it_begins(folder: Path, after: int) -> None:
    read = sources(pairs=folder)
    whole = keys(order_of(read), 180, 6)
    begun = BatchPlans(order_of(read), 6, 0, 9)
    list(begun)
    skipped = [begun.numbers(3, 4)]
    assert skipped == [(18, 30)]
    found = planned(read, skipped, 12, after, start=2, state=begun.state_at(2))
    assert keys_of(found) == without(whole, skipped)[12:][: 10 * after]


def test_a_place_within_what_is_skipped_goes_on_behind_it(folder: Path) -> None:
    """A step before the checkpoint is left out too, though its weights are kept."""
    read = sources(pairs=folder)
    whole = keys(order_of(read), 60, 6)
    order = order_of(read)
    order.take(12)
    [plan] = BatchPlans(order, 6, 2, 3, skipped=[(9, 20)])
    assert [place.key for place in plan.places] == whole[20:26]
    assert (plan.first, plan.dropped) == (20, {"skipped": 8})


def test_where_epochs_ends_are_dropped_the_batches_behind_stay_the_same(folder: Path) -> None:
    def batches(skipped: Ranges, steps: int) -> list[list[str]]:
        found = planned(sources(pairs=folder), skipped, steps, 8, epoch_end="drop", shuffle_shards=3)
        return [[key for _, key in step] for step in found]

    whole = batches([], 12)
    assert batches([(16, 40)], 9) == whole[:2] + whole[5:]  # the first epoch's end is among them


def test_what_is_skipped_is_counted_once(tmp_path: Path) -> None:
    members = [(f"{n}.{kind}", b"x") for n in range(6) for kind in ("jpg", "txt")]
    path = write_tar(tmp_path / "a.tar", [*members, ("lonely.txt", b"no image")])
    plans = [list(BatchPlans(order_of(sources(pairs=path)), 4, 0, 3, rank, 2, 1, [(4, 15)])) for rank in range(2)]
    assert [plan.dropped for plan in plans[0]] == [{"no_image": 1}, {"skipped": 11, "no_image": 3}, {}]
    assert not any(plan.dropped for plan in plans[1])


def test_spares_are_neither_of_the_batch_nor_of_what_is_skipped(make_shards: Callable[..., Path]) -> None:
    order = order_of(sources(pairs=make_shards(60, 60)))
    whole, skipped = keys(order.at(order.state), 60), [(12, 18), (32, 33)]
    bad = set(whole) - set(without(whole, skipped))
    ranks = [BatchPlans(order, 6, 0, 8, rank, 2, 1, skipped) for rank in range(2)]
    for plans in zip(*ranks, strict=True):
        spares = [place.key for plan in plans for place in plan.spares]
        assert len(spares) == len(set(spares)) == 6
        assert bad.union(place.key for plan in plans for place in plan.places).isdisjoint(spares)


def test_places_of_the_last_steps_are_known_and_of_no_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align_train.data.batches.KEPT", 3)
    plans = BatchPlans(order_of(sources(pairs=folder)), 6, 0, 9, skipped=[(6, 8), (26, 28)])
    coming = iter(plans)
    list(islice(coming, 6))
    assert plans.numbers(-5, 0) == plans.numbers(0, 0) == (0, 6)
    assert plans.numbers(1, 1) == (8, 14)
    plans.state_at(5)
    assert plans.numbers(0, 4) == plans.numbers(2, 4) == (14, 34)
    for first, last in ((0, 1), (4, 6), (5, 4)):
        with pytest.raises(ValueError, match=rf"step {last} is none .*: these are steps 2 to 5"):
            plans.numbers(first, last)
    with pytest.raises(RuntimeError, match="would repeat their pairs"):
        next(iter(plans))


# Shards


class Fit:
    """What a fit does with the data module: loads the checkpoint's place, takes batches, saves places."""

    def __init__(self, data: PairData | StreamData, step: int = 0, place: dict[str, Any] | None = None) -> None:
        self.trainer = SimpleNamespace(
            global_step=step, max_steps=10, strategy=SimpleNamespace(root_device=torch.device("cpu"))
        )
        self.data, data.trainer = data, self.trainer  # type: ignore[assignment]
        if place is not None:
            data.load_state_dict(copy.deepcopy(place))
        self._coming = iter(data.train_dataloader())
        self.places = {step: data.state_dict()}

    def step(self) -> StepBatch:
        batch = self.data.on_after_batch_transfer(next(self._coming), 0)
        self.trainer.global_step += 1
        self.places[self.trainer.global_step] = self.data.state_dict()
        return batch

    def steps(self, count: int) -> list[StepBatch]:
        return [self.step() for _ in range(count)]


def pair_data(folder: Path, skipped: Ranges = (), batch_size: int = 6, **given: Any) -> PairData:
    reading = Reading(stall_seconds=60, max_quarantined=0.5, cache=Cache("unused"), use=given.pop("use", "threads"))
    order = OrderSettings(seed=3, shuffle_shards=3, samples_per_epoch=given.pop("samples_per_epoch", None))
    made = PairData({"pairs": {"shards": str(folder)}}, batch_size, SMALL, FULL, order=order, reading=reading, **given)
    made.skipped = list(skipped)
    return made


def same(found: Sequence[StepBatch], wanted: Sequence[StepBatch]) -> bool:
    """Whether keys, pixels and counts are equal."""
    parts = [list(chain.from_iterable(step.parts for step in steps)) for steps in (found, wanted)]
    return len(found) == len(wanted) and all(
        one.keys == other.keys and torch.equal(one.pixels, other.pixels) and one.dropped == other.dropped
        for one, other in zip(*parts, strict=True)
    )


@pytest.mark.parametrize("back_to", [0, 2])
@pytest.mark.parametrize(
    "given", [{}, {"micro_batch": 2, "workers": 2}, {"workers": 1, "use": "processes"}], ids=["0", "2x3", "process"]
)
def test_after_a_rollback_it_is_a_run_that_had_always_skipped_it(
    folder: Path, back_to: int, given: dict[str, Any]
) -> None:
    whole = Fit(pair_data(folder, [(18, 30)], **given))
    wanted = whole.steps(8)
    data = pair_data(folder, **given)
    fit = Fit(data)
    begun = fit.steps(5)
    assert data.skip(3, 4) == {"first_pair": 18, "pairs": 12}
    again = Fit(data, back_to, fit.places[2] if back_to else None)
    found = again.steps(8 - back_to)
    assert same(found, wanted[back_to:])
    assert same(begun[:3], wanted[:3])
    del again.places[back_to]  # as it came
    assert again.places == {step: place for step, place in whole.places.items() if step > back_to}
    assert data.facts() == whole.data.facts()
    later = Fit(pair_data(folder, data.skipped, **given), 3, again.places[3])  # another process
    assert same(later.steps(5), wanted[3:])


def test_a_second_rollback_leaves_both_out(folder: Path) -> None:
    data = pair_data(folder)
    first = Fit(data)
    first.steps(4)
    assert data.skip(2, 2) == {"first_pair": 12, "pairs": 6}
    second = Fit(data, 1, first.places[1])
    second.steps(4)
    assert data.skip(2, 3) == {"first_pair": 18, "pairs": 12}  # the step that now is number 2 begins behind
    third = Fit(data, 1, first.places[1])
    assert data.skipped == [(12, 18), (18, 30)]
    assert same(third.steps(5), Fit(pair_data(folder, [(12, 30)])).steps(6)[1:])


def test_steps_of_an_earlier_process_are_passed_over(folder: Path) -> None:
    fit = Fit(pair_data(folder))
    fit.steps(3)
    data = pair_data(folder)
    Fit(data, 3, fit.places[3]).steps(1)
    assert data.skip(-1, 3) == {"first_pair": 18, "pairs": 6}


def test_steps_that_were_not_taken_cannot_be_skipped(folder: Path) -> None:
    data = pair_data(folder)
    with pytest.raises(ValueError, match=r"step 4 cannot be skipped: no step has been taken"):
        data.skip(3, 4)
    Fit(data).steps(2)
    data.skip(1, 1)
    with pytest.raises(ValueError, match=r"step 1 cannot be skipped: no step has been taken"):
        data.skip(1, 1)


def test_a_place_that_is_loaded_wins_over_where_the_fit_before_stood(folder: Path) -> None:
    larger = Fit(pair_data(folder, batch_size=8))
    larger.step()
    data = pair_data(folder)
    Fit(data).steps(2)
    again = Fit(data, 1, larger.places[1])
    assert again.places[1]["order"]["cursors"] == {"pairs": [0, 0, 8]}


def test_epochs_go_by_and_broken_shards_stay_known(tmp_path: Path) -> None:
    folder = written(tmp_path, 30)
    (folder / "00001.tar").write_bytes(b"<html>" * 200)
    given = {"samples_per_epoch": 26}
    data = pair_data(folder, **given)
    fit = Fit(data)
    fit.steps(6)
    broken = dict(data.opener.quarantine.names)
    data.skip(4, 5)
    again, whole = Fit(data, 1, fit.places[1]), Fit(pair_data(folder, [(24, 36)], **given))
    again.steps(5)
    whole.steps(6)
    assert data.facts() == whole.data.facts() == {"effective_epochs": {"all": 48 / 26}, "quarantined": broken}
    assert data.metrics() == {"effective_epochs/all": 48 / 26, "quarantined_shards": 1.0}


class Toy(L.LightningModule):
    """A weight, and the pairs that moved it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(1)), list[tuple[str, ...]]()

    def training_step(self, batch: StepBatch, number: int) -> torch.Tensor:
        self.seen.append(batch.keys)
        return self.weight.sum()

    def validation_step(self) -> None:
        """Lightning asks for it where there may be validation."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("saved", [None, 2])
def test_a_new_trainer_goes_on_with_the_same_data_module(folder: Path, tmp_path: Path, saved: int | None) -> None:
    def trained(data: PairData, steps: int, path: Path | None = None) -> tuple[L.Trainer, Toy]:
        quiet = {
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
            "max_epochs": -1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        trainer = L.Trainer(accelerator="cpu", max_steps=steps, enable_checkpointing=False, **quiet)
        trainer.fit(toy := Toy(), data, ckpt_path=path, weights_only=True)
        return trainer, toy

    _, wanted = trained(pair_data(folder, [(18, 24)]), 7)
    data, path = pair_data(folder), None
    if saved:
        trainer, _ = trained(data, saved)
        trainer.save_checkpoint(path := tmp_path / "last.ckpt")
        data = pair_data(folder)
    trained(data, 4, path)
    data.skip(3, 3)
    _, found = trained(data, 7, path)
    assert found.seen == wanted.seen[saved or 0 :]


# A stream


@pytest.fixture
def stream(tmp_path: Path) -> CoyoStream:
    """Forty links to one image that costs no network."""
    (tmp_path / "picture.jpg").write_bytes(drawn_image(1))
    url = (tmp_path / "picture.jpg").as_uri()
    path = parquet(tmp_path / "rows.parquet", [{"id": number, "url": url} for number in range(40)])
    limits = Limits(connect_seconds=5, total_seconds=5, retries=0, window=8)
    fetcher = Fetcher(limits, Permissions(files=True), ImageSettings(mode="original", reencode=False))
    return CoyoStream(path, {}, fetcher, block=8)


def test_a_stream_goes_on_from_where_it_is(stream: CoyoStream) -> None:
    def batches() -> list[tuple[str, ...]]:
        return [step.keys for step in Fit(StreamData(stream, 4, SMALL, NONE)).steps(8)]

    wanted = batches()
    data = StreamData(stream, 4, SMALL, NONE)
    fit = Fit(data)
    fit.steps(4)
    assert data.skip(2, 3) == {"batches": 2}
    again = Fit(data, 1, fit.places[1])
    assert again.places[1] == fit.places[4]
    assert [step.keys for step in again.steps(2)] == wanted[4:6]
    assert data.skip(-1, 2) == {"batches": 3}
    begun = Fit(data)  # without a checkpoint
    assert begun.step().keys == wanted[6]
    resumed = Fit(data, 1, fit.places[2])  # only the next place was to be ignored
    assert resumed.step().keys == wanted[2]
    assert data.skipped == []


# The record


def records() -> list[Skipped]:
    return [
        Skipped(3, 4, "the loss was nan", 2, {"first_pair": 18, "pairs": 12}),
        Skipped(7, 7, "the loss was inf", 0, {"batches": 1}),
    ]


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert read_skipped(run) == []
    written = records()
    for record in written:
        note_skipped(run, record)
    assert read_skipped(run) == written
    assert ranges(written) == [(18, 30)]
    assert [path.name for path in run.iterdir()] == [FILE]
    assert written[0].time.endswith("+00:00")
    forget_skipped(run)
    assert read_skipped(run) == []


def test_only_rank_0_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align_train.distributed.rank", lambda: 1)
    note_skipped(tmp_path, records()[0])
    assert read_skipped(tmp_path) == []


@pytest.mark.parametrize(
    "content",
    ["", "[{", "null", "7", "[7]", '{"a": 1}', "[{}]", "\xff", *(f'[{{"first_step": {x}}}]' for x in ("0", "null"))],
)
def test_a_damaged_file_is_named_and_stays(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content, encoding="latin-1")
    for use in (lambda: read_skipped(tmp_path), lambda: note_skipped(tmp_path, records()[0])):
        with pytest.raises(ValueError, match=rf"{FILE} is damaged \(.*\): bring it back from a copy, or delete it"):
            use()
    assert (tmp_path / FILE).read_text(encoding="latin-1") == content


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"first_step": -1}, "not a number from 0 on"),
        ({"first_step": 2.5}, "not a number from 0 on"),
        ({"rolled_back_to": None}, "not a number from 0 on"),
        ({"first_step": 5}, "step 4 is before step 5"),
        ({"left_out": {"first_pair": 3}}, "neither first_pair and pairs nor batches"),
        ({"left_out": {"first_pair": 3, "pairs": "12"}}, "not a number from 0 on"),
        ({"left_out": [3, 12]}, "damaged"),
        ({"time": "yesterday"}, "yesterday"),
        ({"time": "2024-01-01T00:00:00"}, "no zone"),
    ],
)
def test_a_record_that_cannot_be_is_named(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    note_skipped(tmp_path, records()[0])
    [good] = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps([{**good, **changed}]))
    with pytest.raises(ValueError, match=rf"{FILE} is damaged .*{message}|{FILE} is {message}"):
        read_skipped(tmp_path)
