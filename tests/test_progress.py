"""Speed, utilisation and memory of a run, and over which steps each number is."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from conftest import on_ranks
from lightning.pytorch.callbacks import ModelCheckpoint

from align_train.batch import Batch, StepBatch
from align_train.data import Steps
from align_train.distributed import rank
from align_train.engine.budget import Budget
from align_train.engine.device_speed import Peak
from align_train.engine.progress import Progress, told_rates
from align_train.engine.throughput import Spent, Throughput, peak_memory
from align_train.models.cost import Cost
from align_train.records import Tally

COST, PEAK = Cost(image=100.0, caption=(0.0, 10.0, 0.0)), Peak(50.0, "made up")


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def stepped(
    throughput: Throughput, waiting: float, working: float, flops: float = 100.0, devices: int = 1, peak: Peak = PEAK
) -> None:
    clock = throughput.clock
    assert isinstance(clock, Clock)
    clock.now += waiting
    throughput.batch_is_here(waiting)
    clock.now += working
    throughput.step_is_done(8, flops, devices, peak)


def begun(state: dict[str, Any] | None = None) -> Throughput:
    throughput = Throughput(clock=Clock())
    if state:
        throughput.restore(state)
    throughput.go_on()
    return throughput


def test_the_first_step_is_kept_out_of_the_speed() -> None:
    throughput = begun()
    stepped(throughput, 50.0, 50.0, devices=2)
    for _ in range(4):
        stepped(throughput, 0.5, 1.5, devices=2)
    assert throughput.first == Spent(8, 100.0, 100.0, 50.0, 200.0, 10000.0)
    rates = throughput.of_run()
    assert rates == {
        "images_per_second": 4.0,
        "images_per_second_per_device": 2.0,
        "model_flop_utilisation": 0.5,
        "data_wait_share": 0.25,
    }
    assert throughput.of_window() == rates
    assert throughput.total == Spent(40, 500.0, 108.0, 52.0, 216.0, 10800.0)


def test_a_window_is_the_steps_since_the_last() -> None:
    throughput = begun()
    stepped(throughput, 0.0, 10.0)
    assert throughput.of_window()["images_per_second"] == 0.8  # nothing else is known yet
    stepped(throughput, 0.0, 1.0)
    assert throughput.of_window()["images_per_second"] == 8.0
    stepped(throughput, 0.0, 2.0)
    assert throughput.of_window()["images_per_second"] == 4.0
    assert throughput.of_run()["images_per_second"] == pytest.approx(16 / 3)


def test_a_validation_is_no_step() -> None:
    throughput = begun()
    stepped(throughput, 0.0, 1.0)
    throughput.clock.now += 1000.0  # type: ignore[attr-defined]
    throughput.go_on()
    stepped(throughput, 1.0, 1.0)
    assert throughput.total.seconds == 3.0
    assert throughput.steady == Spent(8, 100.0, 2.0, 1.0, 2.0, 100.0)


def test_what_is_neither_waiting_nor_a_save_is_the_steps() -> None:
    throughput = begun()
    stepped(throughput, 0.0, 1.0)
    for _ in range(2):
        throughput.clock.now += 1.0  # type: ignore[attr-defined] # such as waiting for other ranks
        stepped(throughput, 1.0, 2.0)
    assert throughput.steady == Spent(16, 200.0, 8.0, 2.0, 8.0, 400.0)
    throughput.saving()
    for _ in range(2):  # the save is before the first of them alone
        throughput.clock.now += 1.0  # type: ignore[attr-defined]
        stepped(throughput, 1.0, 2.0)
    assert throughput.steady == Spent(32, 400.0, 15.0, 4.0, 15.0, 750.0)


def test_totals_survive_a_resume_and_its_first_step_is_kept_apart_too() -> None:
    before = begun()
    for seconds in (30.0, 1.0, 1.0):
        stepped(before, 0.0, seconds)
    after = begun(before.state())
    for seconds in (60.0, 1.0):
        stepped(after, 0.0, seconds)
    assert after.total == Spent(40, 500.0, 93.0, 0.0, 93.0, 4650.0)
    assert after.of_run()["images_per_second"] == 8.0
    assert after.of_run()["model_flop_utilisation"] == 2.0
    assert after.first is not None
    assert after.first.seconds == 60.0


def test_after_a_resume_on_other_devices_each_part_counts_with_its_own() -> None:
    before = begun()
    for seconds in (30.0, 10.0):
        stepped(before, 0.0, seconds, flops=1000.0, devices=8)  # possible: 4000
    after = begun(before.state())
    for seconds in (60.0, 2.0):
        stepped(after, 0.0, seconds, flops=200.0, devices=1, peak=Peak(1000.0, "another"))  # possible: 2000
    rates = after.of_run()
    assert rates["images_per_second"] == pytest.approx(16 / 12)
    assert rates["images_per_second_per_device"] == pytest.approx(16 / 82)
    assert rates["model_flop_utilisation"] == pytest.approx(1200 / 6000)


def test_a_run_of_one_step_has_its_speed() -> None:
    throughput = begun()
    assert throughput.of_run() == {}
    stepped(throughput, 0.0, 2.0)
    assert throughput.of_run()["images_per_second"] == 4.0


def test_without_a_cost_or_a_peak_there_is_no_utilisation() -> None:
    without_cost, without_peak = begun(), begun()
    stepped(without_cost, 0.0, 2.0, flops=0.0)
    without_peak.clock.now += 2.0  # type: ignore[attr-defined]
    without_peak.step_is_done(8, 100.0, 1, None)
    for throughput in (without_cost, without_peak):
        assert throughput.of_run()["images_per_second_per_device"] == 4.0
        assert "model_flop_utilisation" not in throughput.of_run()


def test_peak_memory_counts_what_was_given_back() -> None:
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(60_000_000)
    del held
    assert 1e7 < before <= peak_memory(torch.device("cpu"))
    assert peak_memory(torch.device("cpu")) > 2.4e8


def batch(*lengths: int) -> Any:
    class Pairs(SimpleNamespace):
        def __len__(self) -> int:
            return len(lengths)

    return Pairs(lengths=torch.tensor(lengths), dropped=Tally(corrupt_image=1), bytes=1000)


class Logged(dict[str, float]):
    """A module that takes metrics."""

    log_dict = dict.update


def progress_over(steps: int, budget: Budget | None, state: dict[str, Any] | None = None) -> tuple[Progress, Logged]:
    progress, module = Progress(budget), Logged()
    trainer: Any = SimpleNamespace(
        max_steps=steps,
        global_step=0,
        train_dataloader=Steps([]),
        log_every_n_steps=1,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        datamodule=SimpleNamespace(metrics=lambda: {"effective_epochs/x": 0.5}),
        callback_metrics={"loss": torch.tensor(1.5), "temperature": torch.tensor(0.07)},
    )
    if state:
        progress.load_state_dict(state)
    progress.on_train_start(trainer, module)  # type: ignore[arg-type]
    for _ in range(steps):
        progress.on_train_batch_start(trainer, module, batch(3, 5), 0)  # type: ignore[arg-type]
        trainer.global_step += 1
        progress.on_train_batch_end(trainer, module, None, batch(3, 5), 0)  # type: ignore[arg-type]
    shown = str(progress._bar)
    assert "loss 1.500, temperature 0.0700" in shown
    assert ("MFU" in shown) == (budget is not None)
    progress.on_train_end(trainer, module)  # type: ignore[arg-type]
    return progress, module


def budget() -> Budget:
    known = Budget()
    known.cost, known.peak = COST, Peak(1.0, "made up")
    return known


def test_a_run_has_its_numbers_in_metrics_and_in_facts() -> None:
    progress, metrics = progress_over(3, budget())
    facts = progress.facts()
    names = ("images_per_second", "images_per_second_per_device", "model_flop_utilisation", "data_wait_share")
    assert {*names, "first_step_seconds", "peak_memory_gb", "effective_epochs/x"} <= set(metrics)
    assert facts["model_flops"] == 3 * (2 * 100 + 8 * 10)
    assert facts["model_flop_utilisation"] == pytest.approx(facts["images_per_second"] * 140)
    assert (facts["pairs_seen"], facts["pairs_read"], facts["bytes_read"]) == (6, 9, 3000)
    assert facts["dropped"] == {"corrupt_image": 3}
    assert facts["peak_memory_gb"] == metrics["peak_memory_gb"] > 0.01
    assert facts["first_step_seconds"] < facts["training_seconds"]


def test_without_a_budget_there_is_no_utilisation() -> None:
    progress, metrics = progress_over(2, None)
    assert "model_flop_utilisation" not in metrics
    assert progress.facts()["model_flop_utilisation"] is None
    assert progress.facts()["model_flops"] is None


def test_counts_go_on_after_a_resume() -> None:
    state = progress_over(3, budget())[0].state_dict()
    facts = progress_over(2, budget(), state)[0].facts()
    assert facts["model_flops"] == 5 * 280
    assert (facts["pairs_seen"], facts["bytes_read"], facts["dropped"]) == (10, 5000, {"corrupt_image": 5})


def test_pairs_and_flops_are_those_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align_train.engine.progress.world_size", lambda: 3)
    facts = progress_over(3, budget())[0].facts()
    assert facts["model_flops"] == 3 * 3 * 280
    assert facts["pairs_seen"] == 3 * 3 * 2
    assert facts["images_per_second"] == pytest.approx(3 * facts["images_per_second_per_device"])
    assert facts["model_flop_utilisation"] == pytest.approx(facts["images_per_second_per_device"] * 140)


class Pairs(L.LightningDataModule):
    """Steps of 4 micro-batches of one pair each; fetching one takes 0.5 seconds of `clock`."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def train_dataloader(self) -> Steps:
        return Steps(self, 4)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        for name in range(5 * 4):
            self.clock.now += 0.5
            one = torch.zeros(1, 2, dtype=torch.int64)
            yield Batch(torch.zeros(1, 3, 4, 4), one, one, (str(name),), torch.tensor([2]), one)

    def metrics(self) -> dict[str, float]:
        return {}


class Trained(L.LightningModule):
    """A step takes 6 seconds of `clock`, and a save 100."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock, self.weight = clock, torch.nn.Parameter(torch.ones(()))

    def training_step(self, batch: StepBatch, index: int) -> torch.Tensor:
        self.clock.now += 6.0
        self.log_dict({"loss": self.weight, "temperature": self.weight})
        return self.weight * 1.0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.clock.now += 100.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_with_lightning_waiting_is_fetching_and_a_save_is_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, progress = Clock(), Progress()
    monkeypatch.setattr("align_train.data.loading.perf_counter", clock)
    progress.throughput.clock = clock
    save = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    trainer = L.Trainer(
        max_steps=4, callbacks=[progress, save], accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Trained(clock), datamodule=Pairs(clock))
    assert clock.now == 5 * 2 + 4 * 6 + 4 * 100  # one more is fetched, before training starts
    assert progress.throughput.total == Spent(16, 0.0, 4 * 8.0, 4 * 2.0, 4 * 8.0)
    assert progress.facts()["data_wait_share"] == 0.25
    assert progress.facts()["images_per_second"] == 0.5


class Counted(Pairs):
    """The pairs of a rank are larger the higher its number is, and as many were dropped before each."""

    def __iter__(self) -> Iterator[Batch]:
        number = rank() + 1
        for batch in super().__iter__():
            yield replace(batch, bytes=1000 * number, dropped=Tally(corrupt_image=number))


def stopped_and_resumed(number: int, folder: Path) -> None:
    """Four steps, of which the first three are in a row of metrics, and one more after a resume."""
    for steps, checkpoint in ((4, None), (5, folder / "4.ckpt")):
        progress, clock = Progress(), Clock()
        trainer = L.Trainer(
            max_steps=5, log_every_n_steps=3, callbacks=[progress, Stopped(folder)], accelerator="cpu", devices=2,
            strategy="ddp", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Trained(clock), datamodule=Counted(clock), ckpt_path=checkpoint, weights_only=True)
        (folder / f"{steps}-{number}.json").write_text(json.dumps(progress.facts()))


class Stopped(L.Callback):
    """After the fourth step, with a save."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: L.Trainer, *given: Any) -> None:
        if trainer.global_step == 4:
            trainer.save_checkpoint(self.folder / "4.ckpt", weights_only=False)
            trainer.should_stop = True


def test_a_save_between_two_rows_has_the_counts_of_all_ranks(tmp_path: Path) -> None:
    on_ranks(2, stopped_and_resumed, tmp_path)
    state = torch.load(tmp_path / "4.ckpt", weights_only=True)["callbacks"]["Progress"]
    assert (state["bytes"], state["dropped"]) == (4 * 4 * 3000, {"corrupt_image": 4 * 4 * 3})
    for steps in (4, 5):
        first, second = (json.loads((tmp_path / f"{steps}-{number}.json").read_text()) for number in range(2))
        assert (first["bytes_read"], first["dropped"]) == (steps * 4 * 3000, {"corrupt_image": steps * 4 * 3})
        assert (second["bytes_read"], second["dropped"]) == (0, {})  # all was handed over, and once


def test_the_bar_tells_what_is_known() -> None:
    rates = {"images_per_second": 120.4, "images_per_second_per_device": 15.05, "data_wait_share": 0.031}
    assert told_rates(rates) == "120 images/s (15 a device), waiting 3 %"
    alone = {**rates, "images_per_second_per_device": 120.4, "model_flop_utilisation": 0.412}
    assert told_rates(alone) == "120 images/s, waiting 3 %, MFU 41 %"
