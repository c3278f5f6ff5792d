"""Speed, utilisation and memory of a run, and over which steps each number is."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from align_train.engine.budget import Budget
from align_train.engine.device_speed import Peak
from align_train.engine.progress import Progress
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


def stepped(throughput: Throughput, waiting: float, working: float, pairs: int = 8, flops: float = 100.0) -> None:
    clock = throughput.clock
    assert isinstance(clock, Clock)
    clock.now += waiting
    throughput.batch_is_here()
    clock.now += working
    throughput.step_is_done(pairs, flops)


def begun(state: dict[str, Any] | None = None) -> Throughput:
    throughput = Throughput(clock=Clock())
    if state:
        throughput.restore(state)
    throughput.go_on()
    return throughput


def test_the_first_step_is_kept_out_of_the_speed() -> None:
    throughput = begun()
    stepped(throughput, 50.0, 50.0)
    for _ in range(4):
        stepped(throughput, 0.5, 1.5)
    assert throughput.first == Spent(8, 100.0, 100.0, 50.0)
    rates = throughput.of_run(devices=2, peak=PEAK)
    assert rates == {
        "images_per_second": 4.0,
        "images_per_second_per_device": 2.0,
        "model_flop_utilisation": 0.5,
        "data_wait_share": 0.25,
    }
    assert throughput.of_window(2, PEAK) == rates
    assert throughput.total == Spent(40, 500.0, 108.0, 52.0)


def test_a_window_is_the_steps_since_the_last() -> None:
    throughput = begun()
    stepped(throughput, 0.0, 10.0)
    assert throughput.of_window(1, None)["images_per_second"] == 0.8  # nothing else is known yet
    stepped(throughput, 0.0, 1.0)
    assert throughput.of_window(1, None)["images_per_second"] == 8.0
    stepped(throughput, 0.0, 2.0)
    assert throughput.of_window(1, None)["images_per_second"] == 4.0
    assert throughput.of_run(1, None)["images_per_second"] == pytest.approx(16 / 3)


def test_a_validation_is_no_step() -> None:
    throughput = begun()
    stepped(throughput, 0.0, 1.0)
    throughput.clock.now += 1000.0  # type: ignore[attr-defined]
    throughput.go_on()
    stepped(throughput, 1.0, 1.0)
    assert throughput.total.seconds == 3.0
    assert throughput.steady == Spent(8, 100.0, 2.0, 1.0)


def test_totals_survive_a_resume_and_its_first_step_is_kept_apart_too() -> None:
    before = begun()
    for seconds in (30.0, 1.0, 1.0):
        stepped(before, 0.0, seconds)
    after = begun(before.state())
    for seconds in (60.0, 1.0):
        stepped(after, 0.0, seconds)
    assert after.total == Spent(40, 500.0, 93.0, 0.0)
    assert after.of_run(1, PEAK)["images_per_second"] == 8.0
    assert after.of_run(1, PEAK)["model_flop_utilisation"] == 2.0
    assert after.first is not None
    assert after.first.seconds == 60.0


def test_a_run_of_one_step_has_its_speed() -> None:
    throughput = begun()
    assert throughput.of_run(1, PEAK) == {}
    stepped(throughput, 0.0, 2.0)
    assert throughput.of_run(1, PEAK)["images_per_second"] == 4.0


def test_without_a_cost_there_is_no_utilisation() -> None:
    throughput = begun()
    stepped(throughput, 0.0, 2.0, flops=0.0)
    assert "model_flop_utilisation" not in throughput.of_run(1, PEAK)
    assert "model_flop_utilisation" not in Spent(1, 1.0, 1.0).rates(1, None)


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
