"""A run that was killed goes on at the very next pair, on as many ranks and workers as there then are."""

import csv
import json
import os
import shutil
import signal
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from conftest import drawn_pair, on_ranks
from hydra import compose, initialize_config_dir
from torch.multiprocessing import ProcessExitedException

from align_train.cli.train import train
from align_train.data import Augmentation
from align_train.engine import PairData, Progress, StreamData, read_checkpoint, recalibration
from align_train.records import Preprocessing
from align_train.shipped import config_folder

Overrides = Callable[..., list[str]]


def run(overrides: list[str]) -> Path:
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose("train", [word for word in overrides if not word.startswith("hydra.")])
    train(config)
    return Path(config.folder)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def result(folder: Path) -> dict[str, object]:
    return json.loads((folder / "result.json").read_text())


def killed(_: int, overrides: list[str], step: int) -> None:
    """A run whose process is killed at the end of a step."""
    end = Progress.on_train_batch_end

    def die(self: Progress, trainer: L.Trainer, *rest: object) -> None:
        if trainer.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        end(self, trainer, *rest)  # type: ignore[arg-type]

    Progress.on_train_batch_end = die  # type: ignore[method-assign]
    run(overrides)


@pytest.mark.parametrize(("step", "workers", "use"), [(3, 2, "processes"), (5, 1, "threads")])
def test_after_kill_9_the_curve_is_that_of_a_run_never_stopped(
    tiny_run: Overrides, step: int, workers: int, use: str
) -> None:
    more = (
        "max_steps=9", "checkpoint_every=2", "validate_every=4", "data.order.shuffle_shards=2", "data.batch_size=12",
        "model.text.dropout=0.1", "model.vision.stochastic_depth=0.5", "data.augmentation.rotation=10.0",
        f"data.workers={workers}", f"data.reading.use={use}", "data.reading.prefetch=2",
    )  # fmt: skip
    whole = run(tiny_run("whole", *more))
    words = tiny_run("parted", *more)
    with pytest.raises(ProcessExitedException) as end:
        on_ranks(1, killed, words, step)
    assert end.value.exit_code == -signal.SIGKILL
    parted = Path(next(word for word in words if word.startswith("folder=")).partition("=")[2])
    assert read_checkpoint(parted)["global_step"] == 2 * (step // 2)
    run([*words, f"resume={parted}"])
    losses = [[row["loss"] for row in rows(folder)] for folder in (whole, parted)]
    assert losses[0] == losses[1]
    assert len(set(losses[0]) - {""}) == 9
    first, second = (read_checkpoint(folder)["state_dict"] for folder in (whole, parted))
    assert all(torch.equal(first[name], second[name]) for name in first)
    counts = ("pairs_read", "pairs_seen", "bytes_read", "dropped", "effective_epochs", "quarantined")
    assert {name: result(parted)[name] for name in counts} == {name: result(whole)[name] for name in counts}


def part(number: int, words: list[str], keys: Path) -> None:
    """One of the ranks that train together; notes the pairs that it trains on."""
    recalibration.BATCHES = 1
    seen: list[str] = []
    PairData.on_after_batch_transfer = lambda self, batch, index: (  # type: ignore[method-assign]
        (seen.extend(batch.keys) if self.trainer.training else None) or batch
    )
    run(words)
    keys.with_name(f"{keys.name}-{number}.json").write_text(json.dumps(seen))


def test_another_number_of_ranks_and_workers_sees_each_pair_once(
    tiny_run: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = tiny_run("run", "data.batch_size=8", "data.order.shuffle_shards=2", "data.validation=null")
    words = [*words, "schedule.total_steps=8"]
    folder = Path(next(word for word in words if word.startswith("folder=")).partition("=")[2])
    two = [*words, "max_steps=3", "data.workers=1", "trainer.devices=2"]
    on_ranks(2, part, two, tmp_path / "two")
    for changed, name in ((PairData, "on_after_batch_transfer"), (recalibration, "BATCHES")):
        monkeypatch.setattr(changed, name, getattr(changed, name))  # what `part` changes is changed back
    part(0, [*words, "max_steps=8", "data.workers=2", f"resume={folder}"], tmp_path / "one")
    seen = [key for path in sorted(tmp_path.glob("*-?.json")) for key in json.loads(path.read_text())]
    assert Counter(seen) == {drawn_pair(number).key: 1 for number in range(64)}
    assert result(folder)["effective_epochs"] == {"pairs": 1.0}
    assert result(folder)["pairs_seen"] == 64


def test_ranks_that_read_different_data_are_found_out(tiny_run: Overrides, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "align_train.engine.data.gather_objects", lambda state: [state, {**state, "cursors": {"x": []}}]
    )
    with pytest.raises(ValueError, match=r"ranks are not at the same place .*rank 1: .*Resume from the checkpoint"):
        run(tiny_run())


def test_what_differs_between_the_ranks_is_told(tiny_run: Overrides, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align_train.engine.data.gather_objects", lambda state: [state, {**state, "window_pairs": {}}])
    with pytest.raises(
        ValueError, match=r"\(rank 0: \{'window_pairs': .*\}; rank 1: \{'window_pairs': \{\}\}\), since"
    ):
        run(tiny_run())


def refused(number: int, words: list[str], folder: Path) -> None:
    """One of two ranks, each with shards of its own, then with metadata in an order of its own."""
    shards = f"data.train.pairs.shards={folder}/{number}/*.tar"
    with pytest.raises(ValueError, match="Put them where all nodes see the same") as error:
        run([*words, shards])
    (folder / f"{number}.txt").write_text(str(error.value))
    stream = SimpleNamespace(files=["a/x.parquet", "a/y.parquet"][:: 1 - 2 * number])
    preprocessing, augmentation = Preprocessing(resize=12, crop=10, max_tokens=8), Augmentation()
    data = StreamData(stream, 4, preprocessing, augmentation)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"has 2 files of data.stream.metadata where .* has 2: in another order\. Put"):
        data.setup("fit")


def test_ranks_with_other_shards_are_refused_before_the_first_step(tiny_run: Overrides, tmp_path: Path) -> None:
    for number in range(2):
        shutil.copytree(tmp_path / "shards", tmp_path / str(number))
    (tmp_path / "1" / "00002.tar").unlink()
    on_ranks(2, refused, tiny_run("run", "trainer.devices=2"), tmp_path)
    first, second = ((tmp_path / f"{number}.txt").read_text() for number in range(2))
    assert first == second
    host = socket.gethostname()
    assert first.startswith(f"rank 1 ({host}) has 3 shards of pairs where rank 0 ({host}) has 4: missing there: ")
    assert "missing there: " + str(tmp_path / "0" / "00002.tar") + ". Put" in first
    assert not list((tmp_path / "run").rglob("*.ckpt"))


def test_a_checkpoint_without_a_place_in_the_data_is_refused(tiny_run: Overrides) -> None:
    folder = run(tiny_run("run", "max_steps=3", "data.validation=null"))
    path = folder / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["PairData"]
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match="of step 3 and says nothing of its place in the data"):
        run(tiny_run("run", "data.validation=null", f"resume={folder}"))


def test_what_was_read_is_in_the_metrics_and_in_the_result(tiny_run: Overrides, tmp_path: Path) -> None:
    overrides = tiny_run("run", "data.reading.max_quarantined=0.5", "data.batch_size=16", "max_steps=6")
    (tmp_path / "shards" / "00000.tar").write_bytes(b"<html>" * 200)
    folder = run(overrides)
    said = result(folder)
    assert said["pairs_read"] == said["pairs_seen"] == 96
    assert said["effective_epochs"] == {"pairs": 2.0}
    assert list(said["quarantined"]) == [str(tmp_path / "shards" / "00000.tar")]
    content = sum(len(drawn_pair(n).image) + len(drawn_pair(n).caption) for n in range(16, 64))
    assert said["bytes_read"] == 2 * content
    last = rows(folder)[-2]  # the last row is of validation
    assert float(last["bytes_read"]) == 2 * content
    assert float(last["effective_epochs/pairs"]) == 2.0
    assert float(last["quarantined_shards"]) == 1.0
    assert float(last["pairs_read"]) == 96.0
