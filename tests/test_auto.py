"""`resume=auto`: one command that begins a run, and goes on with it from its newest complete checkpoint."""

import json
import logging
import shutil
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import wandb
from test_agreement import at_step, folder_of
from test_resume import result, rows, run

from align_train import signals
from align_train.cli import main
from align_train.cli.attempts import read_attempts
from align_train.cli.resuming import continued
from align_train.engine import AlignTraining, Examination, newest_checkpoint, read_checkpoint
from align_train.signals import Wish

Overrides = Callable[..., list[str]]


class Killed(RuntimeError):
    """In the place of a signal that nothing can be done about."""


def killed() -> None:
    raise Killed


def unreadable(*given: Any, **named: Any) -> None:
    raise OSError("the disk is away")


def killed_at(step: int, words: list[str], patch: pytest.MonkeyPatch) -> None:
    at_step(step, killed, patch)
    with pytest.raises(Killed):
        run(words)


def at(module: AlignTraining, step: int, do: Callable[[], None], plain: Callable[[AlignTraining], None]) -> None:
    """Do that in the place of what is plain, at a step."""
    do() if module.trainer.global_step == step else plain(module)


def test_the_same_words_begin_go_on_and_end(tiny_run: Overrides, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, words = run(tiny_run("whole")), tiny_run("run", "resume=auto", "checkpoint_every=2")
    for step in (1, 3, 5):
        with monkeypatch.context() as patch:
            killed_at(step, words, patch)
    folder = run(words)
    assert [row["loss"] for row in rows(folder)] == [row["loss"] for row in rows(whole)]
    assert [row["step"] for row in rows(folder)] == [row["step"] for row in rows(whole)]
    ends = [read_checkpoint(each)["state_dict"] for each in (folder, whole)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_a_run_that_is_done_is_left_as_it_is(tiny_run: Overrides, capsys: pytest.CaptureFixture[str]) -> None:
    words = tiny_run("run", "resume=auto", "report=true")
    folder = run(words)
    before, changed = result(folder), (folder / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    run(words)
    assert f"the run is done: {folder}" in capsys.readouterr().out
    assert (folder / "checkpoints" / "last.ckpt").stat().st_mtime_ns == changed
    (folder / "report.md").unlink()  # as if it had been killed after its last step
    run(words)
    own = ("weights_sha256", "effective_epochs", "pairs_seen", "pairs_read", "dropped")
    assert {name: result(folder)[name] for name in own} == {name: before[name] for name in own}
    assert result(folder)["peak_memory_gb"] >= before["peak_memory_gb"]
    assert (folder / "report.md").is_file()


@pytest.mark.parametrize(("stop", "step"), [("signal", 2), ("signal", 6), ("kill", 2), ("kill", 6), ("kill after", 4)])
def test_a_stop_at_a_validation_changes_neither_rows_nor_the_best(
    tiny_run: Overrides, monkeypatch: pytest.MonkeyPatch, stop: str, step: int
) -> None:
    """The shipped layout: saves and validations at the same steps, rows at some."""
    more = ("checkpoint_every=2", "validate_every=2", "trainer.log_every_n_steps=2", "resume=auto")
    whole, words = run(tiny_run("whole", *more)), tiny_run("run", *more)
    with monkeypatch.context() as patch:
        if stop == "signal":
            at_step(step - 1, lambda: signals.ask(Wish.REQUEUE), patch)
        elif stop == "kill":
            plain = AlignTraining.on_validation_epoch_end
            patch.setattr(AlignTraining, "on_validation_epoch_end", partialmethod(at, step, killed, plain))
        else:
            at_step(step - 1, killed, patch)
        with pytest.raises((Killed, SystemExit)):
            run(words)
    folder = run(words)
    kept = ("step", "loss", "validation/mean_r5", "learning_rate")
    assert [{name: row[name] for name in kept} for row in rows(folder)] == [
        {name: row[name] for name in kept} for row in rows(whole)
    ]
    best = [
        torch.load(each / "checkpoints" / "best.ckpt", weights_only=True)["global_step"] for each in (folder, whole)
    ]
    assert best[0] == best[1]


@pytest.mark.parametrize("where", ["last step", "exams"])
def test_a_signal_near_the_end_leaves_the_rest_to_the_next_start(
    tiny_run: Overrides, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    words = tiny_run("run", "resume=auto", "max_steps=3", "data.validation=null")
    with monkeypatch.context() as patch:
        if where == "last step":
            at_step(2, lambda: signals.ask(Wish.REQUEUE), patch)
        else:
            plain = Examination.at_end
            patch.setattr(Examination, "at_end", lambda *given: (signals.ask(Wish.REQUEUE), plain(*given))[1])
        with pytest.raises(SystemExit) as end:
            run(words)
    signals.fulfilled()
    assert end.value.code == 75
    assert not (folder_of(words) / "result.json").exists()
    assert result(run(words))["steps"] == 3


def test_the_newest_checkpoint_that_can_be_read_is_taken(
    tiny_run: Overrides, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    words = tiny_run(
        "run", "resume=auto", "checkpoint_every=4", "validate_every=3"
    )  # best.ckpt is of step 3, last of 4
    with monkeypatch.context() as patch:
        killed_at(5, words, patch)
    folder = folder_of(words)
    last, best = (folder / "checkpoints" / f"{name}.ckpt" for name in ("last", "best"))
    assert newest_checkpoint(folder) == last
    half = last.read_bytes()[: last.stat().st_size // 2]
    (folder / "checkpoints" / ".last.ckpt.17.tmp").write_bytes(half)  # a process was killed while it wrote
    assert newest_checkpoint(folder) == last
    last.write_bytes(half)  # a disk has failed
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(folder) == best
    assert "passed over: " in caplog.text
    assert "last.ckpt is not a readable checkpoint" in caplog.text
    run(words)
    assert [row["loss"] for row in rows(folder)] == [row["loss"] for row in rows(run(tiny_run("whole")))]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", unreadable)
        with pytest.raises(OSError, match="the disk is away"):  # no reason to go back further, or to give up for good
            newest_checkpoint(folder)
    best.write_bytes(b"")
    last.write_bytes(b"")
    with pytest.raises(ValueError, match=r"nothing to go on from: .*best\.ckpt.*; .*last\.ckpt"):
        run(words)


def test_a_checkpoint_that_is_half_written_never_has_its_name(
    tiny_run: Overrides, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = tiny_run("run", "resume=auto", "checkpoint_every=2", "data.validation=null")
    plain = torch.save

    def torn(checkpoint: dict[str, Any], file: Any) -> None:
        if checkpoint["global_step"] == 4:
            file.write(b"half")
            killed()
        plain(checkpoint, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", torn)
        with pytest.raises(Killed):
            run(words)
    assert newest_checkpoint(folder_of(words)) == folder_of(words) / "checkpoints" / "last.ckpt"
    assert read_checkpoint(folder_of(words))["global_step"] == 2


def test_all_parts_of_a_run_have_one_id(tiny_run: Overrides, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb.finish()  # what another test of this process has begun
    words = tiny_run("run", "resume=auto", "logger=wandb", "max_steps=4", "checkpoint_every=2", "data.validation=null")
    with monkeypatch.context() as patch:
        killed_at(3, words, patch)
    wandb.finish()  # as the end of a process does
    folder = folder_of(words)
    run(words)
    number = (folder / "run_id").read_text()
    # offline-run-TIME-ID; the second of two within one second has another -1 after it
    parts = {path.name.split("-")[3] for path in (folder / "wandb").glob("offline-run-*")}
    assert parts == {number}
    wandb.finish()
    other = run(tiny_run("other", "max_steps=3", "data.validation=null"))
    assert (other / "run_id").read_text() != number


def test_a_new_run_does_not_begin_among_the_checkpoints_of_another(tiny_run: Overrides) -> None:
    words = tiny_run("run", "max_steps=3", "data.validation=null")
    folder = run(words)
    with pytest.raises(ValueError, match=r"run holds a run already: go on with resume=.*, or name another folder"):
        run(words)
    shutil.rmtree(folder / "checkpoints")
    (folder / "skipped.json").write_text("what another run had left out")
    before = rows(folder)
    run(words)
    assert [row["loss"] for row in rows(folder)] == [row["loss"] for row in before]
    assert not (folder / "skipped.json").exists()


def test_without_a_job_the_folder_has_to_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(ValueError, match=r"resume=auto needs the run's folder .*hydra\.run\.dir=FOLDER"):
        continued(["resume=auto"])
    assert continued(["seed=1", f"hydra.run.dir={tmp_path}/run", "resume=auto", "seed=2"]) == [
        "seed=2",
        f"hydra.run.dir={tmp_path}/run",
        "resume=auto",
    ]


def test_a_job_is_stopped_and_goes_on_by_the_same_command(
    tiny_run: Overrides, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command line, with the environment of a job: folder, attempts, exit status, last words."""
    monkeypatch.chdir(tmp_path)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "b7", "SLURM_CLUSTER_NAME": "c", "SLURM_RESTART_COUNT": "0"}
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("align_train.cli.trainers.plugins", list)  # Lightning would ask for the rest of a job
    words = ["train", *(word for word in tiny_run() if not word.startswith(("folder=", "hydra."))), "resume=auto"]
    with monkeypatch.context() as patch:
        at_step(2, lambda: signals.ask(Wish.REQUEUE), patch)
        with pytest.raises(SystemExit) as end:
            main(words)
    assert end.value.code == 75
    assert f"stopped by SIGUSR1 at step 3; run folder {tmp_path / 'outputs/slurm/b7-7'}" in capsys.readouterr().out
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    main(words)
    folder = tmp_path / "outputs" / "slurm" / "b7-7"
    assert [(each.first_step, each.reached, each.how) for each in read_attempts(folder)] == [
        (0, 3, "REQUEUE"),
        (3, 6, "done"),
    ]
    assert result(folder)["steps"] == 6
    assert json.loads((folder / "attempts.json").read_text())[0]["job"]["number"] == "7"


def test_ranks_do_not_wait_for_lightning_at_each_step(tiny_run: Overrides, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its handler of SIGTERM asks other ranks from within the handler."""
    seen = list[L.Trainer]()
    begin = L.Trainer.fit

    def fit(self: L.Trainer, *given: Any, **named: Any) -> None:
        begin(self, *given, **named)
        seen.append(self)

    monkeypatch.setattr(L.Trainer, "fit", fit)
    run(tiny_run("run", "max_steps=1", "data.validation=null", "schedule.warmup_steps=0"))
    assert seen[0]._signal_connector.register_signal_handlers.__name__ == "_nothing"
    assert seen[0].fit_loop.epoch_loop._broadcast_sigterm_tensor.__name__ == "_nothing"
