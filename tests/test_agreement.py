"""What all ranks do alike at a step's end: stop after a signal, save by time, go back where a loss is no number."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from conftest import drawn_pair, on_ranks
from test_resume import result, rows, run

from align_train import signals
from align_train.batch import StepBatch
from align_train.cli import trainers
from align_train.data import loading
from align_train.distributed import Ballot, rank
from align_train.engine import Agreement, AlignTraining, NonFinite, Recovery, budget, read_checkpoint, read_skipped
from align_train.engine.agreement import check_beginning
from align_train.models.memory import memory_of
from align_train.signals import Wish

Overrides = Callable[..., list[str]]


def folder_of(words: list[str]) -> Path:
    return Path(next(word for word in words if word.startswith("folder=")).partition("=")[2])


def at_step(step: int, do: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something when so many updates are done and the next batch is there."""
    begin = Agreement.on_train_batch_start

    def on_train_batch_start(self: Agreement, trainer: L.Trainer, *given: Any) -> None:
        if trainer.global_step == step:
            do()
        begin(self, trainer, *given)

    monkeypatch.setattr(Agreement, "on_train_batch_start", on_train_batch_start)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGUSR1, 75), (signal.SIGTERM, 143)])
def test_a_signal_saves_at_the_step_s_end_and_ends_with_its_status(
    tiny_run: Overrides, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, status: int
) -> None:
    words = tiny_run("run", "checkpoint_every=100")
    whole = run(tiny_run("whole"))
    with signals.listening(), monkeypatch.context() as patch:
        at_step(2, partial(signal.raise_signal, number), patch)
        with pytest.raises(SystemExit) as end:
            run(words)
        assert signals.wish() == Wish.NOTHING
    assert end.value.code == status
    assert read_checkpoint(folder_of(words))["global_step"] == 3
    folder = run([*words, f"resume={folder_of(words)}"])
    assert [row["loss"] for row in rows(folder)] == [row["loss"] for row in rows(whole)]


def test_a_signal_before_the_first_step_ends_the_run_without_one(tiny_run: Overrides) -> None:
    words = tiny_run()
    with signals.listening():
        signal.raise_signal(signal.SIGUSR1)
        with pytest.raises(signals.Asked) as end:
            run(words)
    assert end.value.code == 75
    assert not (folder_of(words) / "checkpoints").exists()


def test_a_signal_while_the_run_is_set_up_ends_it_before_the_first_step(
    tiny_run: Overrides, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then Lightning has put up handlers of its own, were they not kept away."""
    words, steps = tiny_run(), list[int]()
    monkeypatch.setattr(AlignTraining, "on_fit_start", lambda self: signal.raise_signal(signal.SIGTERM))
    at_step(0, lambda: steps.append(0), monkeypatch)
    with signals.listening(), pytest.raises(signals.Asked) as end:
        run(words)
    assert end.value.code == 143
    assert not steps


def test_of_two_signals_being_queued_again_wins() -> None:
    with signals.listening():
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert signals.wish() == Wish.REQUEUE
    with signals.listening():
        assert signals.wish() == Wish.NOTHING


def test_only_processes_that_read_for_a_listening_one_are_told() -> None:
    """Others are ended by SIGTERM as ever, or a script that stops reading would wait for them."""
    assert not loading._Begin(torch.zeros(1))._heard
    with signals.listening():
        assert loading._Begin(torch.zeros(1))._heard
    assert not signals.is_listening()


def test_after_listening_signals_do_what_they_did_before() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with signals.listening():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_process_that_reads_outlives_sigterm_for_a_while_and_no_longer() -> None:
    program = """
import signal
from align_train import signals
signals.LAST_SECONDS = 1
signals.work_to_the_end()
signal.raise_signal(signal.SIGUSR1)
signal.raise_signal(signal.SIGTERM)
print("still here", flush=True)
signal.pause()
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert ended.stdout == "still here\n"
    assert ended.returncode == -signal.SIGALRM


def test_lightning_has_what_is_kept_from_it() -> None:
    """Should Lightning rename them, its own handling would be back."""
    trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    assert callable(trainer._signal_connector.register_signal_handlers)
    assert callable(trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor)


def test_the_first_ranks_clock_saves_between_the_steps_that_do(
    tiny_run: Overrides, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, saved = [0.0], list[int]()
    monkeypatch.setattr(trainers, "Agreement", partial(Agreement, clock=lambda: now[0]))
    plain = L.Trainer.save_checkpoint

    def save(self: L.Trainer, *given: Any, **named: Any) -> None:
        saved.append(self.global_step)
        plain(self, *given, **named)

    monkeypatch.setattr(L.Trainer, "save_checkpoint", save)
    begin = AlignTraining.on_train_batch_start

    def a_minute_goes_by(self: AlignTraining, batch: StepBatch, index: int) -> None:
        now[0] += 60
        begin(self, batch, index)

    monkeypatch.setattr(AlignTraining, "on_train_batch_start", a_minute_goes_by)
    more = ("max_steps=8", "checkpoint_every=4", "recovery.checkpoint_minutes=2.5", "data.validation=null")
    run(tiny_run("run", *more))
    # by time, by steps, by time, before what follows the last step, by steps, at the end
    assert saved == [3, 4, 7, 8, 8, 8]


def count(number: int, folder: Path) -> None:
    """Each rank brings its own numbers; later collectives do not mix with the ballot."""
    torch.distributed.init_process_group("gloo", rank=number, world_size=2)
    ballots = [Ballot(torch.tensor([float(number), float(-number), float(turn)])) for turn in range(3)]
    torch.distributed.all_reduce(torch.ones(1))
    (folder / str(number)).write_text(json.dumps([ballot.result() for ballot in ballots]))
    check_beginning(7, torch.device("cpu"))
    with pytest.raises(OSError, match=f"go on from steps 2 to 3, this one from {2 + number}: a checkpoint could not"):
        check_beginning(2 + number, torch.device("cpu"))
    torch.distributed.destroy_process_group()


def test_a_ballot_is_the_largest_of_each_number_on_all_ranks(tmp_path: Path) -> None:
    on_ranks(2, count, tmp_path)
    expected = [[1.0, 0.0, float(turn)] for turn in range(3)]
    assert [json.loads((tmp_path / str(number)).read_text()) for number in range(2)] == [expected] * 2
    assert Ballot(torch.tensor([3.0])).result() == [3.0]


BROKEN = {drawn_pair(number).key for number in (1, 58)}  # two pairs make a loss that is no number


def break_some(on_rank: int = 0, bad: set[str] = BROKEN) -> None:
    """Where a batch has one of the pairs, the loss is no number, on one rank alone."""
    plain = AlignTraining.training_step

    def training_step(self: AlignTraining, batch: StepBatch, index: int) -> torch.Tensor:
        loss = plain(self, batch, index)
        return loss * float("nan") if bad & set(batch.keys) and rank() == on_rank else loss

    AlignTraining.training_step = training_step  # type: ignore[method-assign]


@pytest.fixture
def some_are_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AlignTraining, "training_step", AlignTraining.training_step)  # to be brought back
    break_some()


MORE = ("max_steps=5", "data.batch_size=8", "checkpoint_every=2", "data.validation=null", "recovery.skipped_steps=1",
        "data.order.shuffle_shards=4", "model.text.dropout=0.1", "model.vision.stochastic_depth=0.5")  # fmt: skip


@pytest.mark.usefixtures("some_are_broken")
def test_a_run_goes_back_and_on_without_the_pairs_that_broke_it(
    tiny_run: Overrides, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(budget, "memory_of", memory_of)  # which looks at what the broken step has left in the model
    words = tiny_run("run", *MORE, "recovery.rollbacks=5")
    folder = run(words)
    skipped = read_skipped(folder)
    assert [each.rolled_back_to for each in skipped] == [0, 2]  # once to the beginning, once to a checkpoint
    assert all("loss is nan at step" in each.reason and each.left_out["pairs"] == 8 for each in skipped)
    assert [row["step"] for row in rows(folder)] == [str(step) for step in range(5)]
    # the same as a run that had left them out from the beginning
    other = tiny_run("other", *MORE, "resume=auto")
    folder_of(other).mkdir()
    (folder_of(other) / "skipped.json").write_text((folder / "skipped.json").read_text())
    whole = run(other)
    assert [row["loss"] for row in rows(folder)] == [row["loss"] for row in rows(whole)]
    ends = [read_checkpoint(each)["state_dict"] for each in (folder, whole)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert result(folder)["pairs_seen"] == 40


@pytest.mark.usefixtures("some_are_broken")
def test_a_run_that_goes_back_too_often_ends_and_says_so(tiny_run: Overrides) -> None:
    words = tiny_run("run", *MORE, "recovery.rollbacks=0")
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step .*optimizer\.lr.*resume="):
        run(words)
    assert not (folder_of(words) / "skipped.json").exists()


def test_a_loss_that_never_is_a_number_ends_the_run(tiny_run: Overrides, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AlignTraining, "training_step", AlignTraining.training_step)
    break_some(bad={drawn_pair(number).key for number in range(64)})
    words = tiny_run("run", *MORE, "recovery.rollbacks=2")
    with pytest.raises(FloatingPointError, match=r"gone back 2 times before \(recovery.rollbacks=2\)"):
        run(words)
    assert [each.rolled_back_to for each in read_skipped(folder_of(words))] == [0, 0]


@pytest.mark.parametrize("ended_by", ["max_steps", "patience"])
def test_weights_that_the_last_step_broke_are_gone_back_from_too(
    tiny_run: Overrides, monkeypatch: pytest.MonkeyPatch, ended_by: str
) -> None:
    plain, broken = AlignTraining.optimizer_step, list[int]()

    def optimizer_step(self: AlignTraining, *given: Any, **named: Any) -> None:
        plain(self, *given, **named)
        if self.trainer.global_step == 4 and not broken:
            broken.append(5)
            torch.nn.init.constant_(next(self.model.parameters()), float("inf"))

    monkeypatch.setattr(AlignTraining, "optimizer_step", optimizer_step)
    words = tiny_run("run", *MORE)
    if ended_by == "patience":
        words.append("max_steps=9")
        stop = AlignTraining.on_train_batch_end

        def on_train_batch_end(self: AlignTraining, *given: Any) -> None:
            stop(self, *given)
            self.trainer.should_stop = self.trainer.global_step == 5

        monkeypatch.setattr(AlignTraining, "on_train_batch_end", on_train_batch_end)
    folder = run(words)
    assert [(each.last_step, each.rolled_back_to) for each in read_skipped(folder)] == [(4, 4)]
    assert "is not finite at step 5" in read_skipped(folder)[0].reason
    assert result(folder)["steps"] == 5


def two(number: int, words: list[str]) -> None:
    """One of two ranks; the loss is broken on the second."""
    break_some(on_rank=1)
    run(words)


def test_a_loss_that_is_no_number_on_one_rank_is_one_on_all(tiny_run: Overrides) -> None:
    words = tiny_run("run", *MORE, "recovery.rollbacks=5", "trainer.devices=2")
    on_ranks(2, two, words)
    assert len(read_skipped(folder_of(words))) >= 1
    assert result(folder_of(words))["steps"] == 5


def test_weights_that_overflowed_are_not_saved(tmp_path: Path) -> None:
    agreement = Agreement(tmp_path)
    trainer, module = SimpleNamespace(global_step=2), SimpleNamespace(device=torch.device("cpu"))
    good = {"state_dict": {"weight": torch.ones(2), "count": torch.tensor(3)}}
    agreement.on_save_checkpoint(trainer, module, good)  # type: ignore[arg-type]
    bad = {"state_dict": {"weight": torch.tensor([1.0, float("inf")])}}
    with pytest.raises(NonFinite, match="weight is not finite at step 2: the gradient overflowed") as error:
        agreement.on_save_checkpoint(trainer, module, bad)  # type: ignore[arg-type]
    assert error.value.step == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("checkpoint_minutes", 0), ("stall_minutes", -1), ("rollbacks", -1), ("skipped_steps", 0), ("failures", 1.5)],
)
def test_a_wrong_number_is_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"recovery\.{name} is {value}: give"):
        Recovery(**{name: value})
