"""Training end to end on drawn pairs: what is written, resumed, stopped and refused."""

import csv
import itertools
import json
import signal
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from align_train.cli.train import train
from align_train.engine import Agreement, AtomicCheckpointIO, Contrastive, MetricsFile, read_checkpoint
from align_train.shipped import config_folder

Overrides = Callable[..., list[str]]


def run(overrides: list[str]) -> Path:
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose("train", [word for word in overrides if not word.startswith("hydra.")])
    assert isinstance(config, DictConfig)
    train(config)
    return Path(config.folder)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def weights(folder: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return read_checkpoint(folder / "checkpoints" / f"{name}.ckpt")["state_dict"]


def test_a_run_writes_what_it_promises(tiny_run: Overrides) -> None:
    folder = run(tiny_run("run", "export=true", "report=true"))
    assert "<h1>tiny" in (folder / "report.html").read_text()
    assert (folder / "report.md").is_file()
    assert (folder / "hf" / "model.safetensors").is_file()
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
    result = json.loads((folder / "result.json").read_text())
    assert result["steps"] == 6
    assert result["pairs_seen"] == 96
    assert result["export"]["largest_difference"] < 1e-5
    assert OmegaConf.load(folder / "resolved.yaml").max_steps == 6
    assert [int(row["step"]) for row in rows(folder)] == list(range(7))
    assert float(rows(folder)[0]["health/text_effective_rank"]) > 1
    assert not list(folder.rglob("*.tmp"))


def test_a_checkpoint_carries_its_recipe(tiny_run: Overrides) -> None:
    folder = run(tiny_run())
    assert read_checkpoint(folder)["recipe"] == (folder / "resolved.yaml").read_text()


def test_the_loss_goes_down_on_one_batch(tiny_run: Overrides) -> None:
    more = ("max_steps=40", "data.batch_size=64", "temperature_start=0.1", "optimizer.lr=0.01")
    more = tuple(word.replace("temperature_start", "model.temperature.start") for word in more)
    losses = [float(row["loss"]) for row in rows(run(tiny_run("run", *more)))]
    assert losses[-1] < losses[0] - 0.5


def test_bf16_keeps_weights_and_loss_in_float32(tiny_run: Overrides) -> None:
    folder = run(tiny_run("run", "trainer.precision=bf16-mixed"))
    plain = run(tiny_run("plain"))
    losses = [[float(row["loss"]) for row in rows(path) if row["loss"]] for path in (folder, plain)]
    assert losses[0][:3] == pytest.approx(losses[1][:3], abs=0.05)  # then rounding adds up
    assert losses[0] != losses[1]
    assert {value.dtype for value in weights(folder).values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize(("logger", "written"), [("tensorboard", "tensorboard/events.*"), ("wandb", "wandb/offline-*")])
def test_other_loggers_need_no_account(
    tiny_run: Overrides, logger: str, written: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    folder = run(tiny_run("run", f"logger={logger}", "max_steps=3"))
    assert list(folder.glob(written))
    assert len(rows(folder)) >= 2


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_equals_one_never_stopped(tiny_run: Overrides, workers: int) -> None:
    more = (f"data.workers={workers}", "model.text.dropout=0.1", "model.vision.stochastic_depth=0.5")
    whole = run(tiny_run("whole", *more))
    # the schedule is of 6 steps in both parts
    begun = run(tiny_run("parted", *more, "max_steps=3", "schedule.total_steps=6"))
    parted = run(tiny_run("parted", *more, f"resume={begun}"))
    losses = [[row["loss"] for row in rows(folder)] for folder in (whole, parted)]
    assert losses[0] == losses[1]
    assert len(set(losses[0]) - {""}) == 6
    first, second = weights(whole), weights(parted)
    assert list(first) == list(second)
    trained = [name for name in first if "running" not in name and "tracked" not in name]  # recalibrated at each end
    assert all(torch.equal(first[name], second[name]) for name in trained)


def test_rows_after_the_checkpoint_are_written_once(tiny_run: Overrides) -> None:
    folder = run(tiny_run("run", "max_steps=3", "schedule.total_steps=6"))
    with (folder / "metrics.csv").open("a") as file:
        file.write("3,9.0\n4,9.0\n5,")  # a killed run had gone on, and was torn
    resumed = run(tiny_run("run", f"resume={folder}"))
    assert [int(row["step"]) for row in rows(resumed)] == list(range(7))
    assert "9.0" not in [row["loss"] for row in rows(resumed)]


def test_a_finished_run_is_not_resumed(tiny_run: Overrides) -> None:
    folder = run(tiny_run())
    with pytest.raises(ValueError, match=r"at step 6 and max_steps is 6.*give a larger max_steps"):
        run(tiny_run("run", f"resume={folder}"))


def test_a_checkpoint_of_another_model_is_named(tiny_run: Overrides) -> None:
    folder = run(tiny_run())
    more = ("model.text.width=64", "max_steps=9", f"resume={folder}")
    with pytest.raises(
        ValueError, match=r"checkpoint of another model: .*word_embeddings.*\(30522, 64\).*\(30522, 32\)"
    ):
        run(tiny_run("run", *more))


def test_a_non_finite_loss_stops_before_the_weights(tiny_run: Overrides, monkeypatch: pytest.MonkeyPatch) -> None:
    honest, calls = Contrastive.__call__, itertools.count()

    def broken(self: Contrastive, *given: torch.Tensor) -> torch.Tensor:
        loss = honest(self, *given)
        return loss * float("nan") if next(calls) == 4 else loss

    monkeypatch.setattr(Contrastive, "__call__", broken)
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 4.*pair-000.*optimizer\.lr.*resume="):
        run(tiny_run("run", "recovery.rollbacks=0"))
    folder = Path(next(word for word in tiny_run() if word.startswith("folder=")).partition("=")[2])
    checkpoint = read_checkpoint(folder)
    assert checkpoint["global_step"] == 3
    assert all(torch.isfinite(value).all() for value in checkpoint["state_dict"].values())


def test_ctrl_c_saves_and_says_how_to_go_on(
    tiny_run: Overrides, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begin = Agreement.on_train_batch_start

    def interrupted(self: Agreement, trainer: L.Trainer, *rest: object) -> None:
        if trainer.global_step == 1:
            signal.raise_signal(signal.SIGINT)
        begin(self, trainer, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Agreement, "on_train_batch_start", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stop:
        run(tiny_run())
    assert stop.value.code == 130
    said = capsys.readouterr().out
    folder = Path(said.partition("resume=")[2].strip())
    assert "stopped at step 2; go on with: align-train train resume=" in said
    assert read_checkpoint(folder)["global_step"] == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_dropped_pairs_reach_metrics_and_result(tiny_run: Overrides, tmp_path: Path) -> None:
    overrides = tiny_run()
    shard = sorted((tmp_path / "shards").glob("*.tar"))[0]
    break_images(shard, 1)
    folder = run([*overrides, "max_steps=8"])
    assert json.loads((folder / "result.json").read_text())["dropped"]["corrupt_image"] == 2  # once an epoch
    assert float(rows(folder)[-1]["dropped/corrupt_image"]) == 2.0


def test_a_batch_larger_than_the_data_is_refused(tiny_run: Overrides) -> None:
    with pytest.raises(Exception, match=r"shards of pairs hold 64 pairs, and a batch takes 128"):
        run(tiny_run("run", "data.batch_size=128"))


def test_a_failed_write_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"recipe": "", "step": 1}, path)

    def torn(checkpoint: object, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="disk full"):
        AtomicCheckpointIO().save_checkpoint({"recipe": "", "step": 2}, path)
    assert read_checkpoint(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "evil.ckpt"
    torch.save({"recipe": "", "path": tmp_path}, path)  # pathlib.Path is a class, not a plain value
    with pytest.raises(ValueError, match=r"evil\.ckpt is not a readable checkpoint"):
        read_checkpoint(path)


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*last\.ckpt"):
        read_checkpoint(tmp_path)


def test_metrics_gain_columns_and_keep_rows(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path)
    metrics.log_metrics({"loss": 1.0}, 0)
    metrics.log_metrics({"loss": 2.0}, 1)
    metrics.log_metrics({"recall": 0.5}, 1)
    metrics.finalize("success")
    assert rows(tmp_path) == [{"step": "0", "loss": "1.0", "recall": ""}, {"step": "1", "loss": "2.0", "recall": "0.5"}]


def test_a_resumed_run_takes_the_new_learning_rate(tiny_run: Overrides) -> None:
    begun = run(tiny_run("run", "max_steps=3", "schedule=constant"))
    more = ("schedule=constant", "schedule.warmup_steps=2", "optimizer.lr=0.0005", "optimizer.weight_decay=0.0")
    folder = run(tiny_run("run", *more, f"resume={begun}"))
    assert [float(row["learning_rate"]) for row in rows(folder)[3:6]] == pytest.approx([0.0005] * 3)
    groups = read_checkpoint(folder)["optimizer_states"][0]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0}


def test_rows_stay_in_step_after_a_resume(tiny_run: Overrides) -> None:
    more = ("trainer.log_every_n_steps=2", "validate_every=5", "checkpoint_every=1")
    begun = run(tiny_run("run", *more, "max_steps=3", "schedule.total_steps=6"))
    folder = run(tiny_run("run", *more, f"resume={begun}"))
    logged = [row for row in rows(folder) if row["loss"]]
    assert [int(row["step"]) for row in logged] == [1, 3, 5]
    assert all(row["health/text_effective_rank"] and row["images_per_second"] for row in logged)


def test_validation_pairs_that_are_dropped_are_counted(tiny_run: Overrides, tmp_path: Path) -> None:
    overrides = tiny_run()
    break_images(next((tmp_path / "validation").glob("*.tar")), 1)
    assert float(rows(run(overrides))[3]["validation/dropped/corrupt_image"]) == 1.0
    for shard in (tmp_path / "validation").glob("*.tar"):
        break_images(shard, 24)
    with pytest.raises(ValueError, match=r"none of the validation pairs could be used \(corrupt_image 24\)"):
        run(tiny_run_again(overrides))


def break_images(shard: Path, count: int) -> None:
    """Turn the first JPEGs of a shard into noise."""
    content = shard.read_bytes()
    for _ in range(min(count, content.count(b"\xff\xd8\xff"))):
        start = content.index(b"\xff\xd8\xff")
        content = content[:start] + bytes(64) + content[start + 64 :]
    shard.write_bytes(content)


def tiny_run_again(overrides: list[str]) -> list[str]:
    return [word + "_again" if word.startswith("folder=") else word for word in overrides]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_steps=1e2", r"max_steps is 100\.0; it must be a whole number"),
        ("trainer.log_every_n_steps=0", r"log_every_n_steps is 0"),
        ("+trainer.limit_train_batches=4", "limit_train_batches would begin the data anew"),
        ("data.order.samples_per_epoch=0", r"data\.order\.samples_per_epoch is 0"),
        ("+trainer.accumulate_grad_batches=2", "would leave each part only its own negatives"),
        ("data.train.pairs.repeat=0", r"data\.train\.pairs\.repeat is 0"),
        ("data.train.pairs.shards=null", r"data\.train\.pairs\.shards is None"),
    ],
)
def test_a_wrong_number_is_named(tiny_run: Overrides, override: str, message: str) -> None:
    with pytest.raises(Exception, match=message):
        run(tiny_run("run", override))
