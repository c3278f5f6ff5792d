"""What tests share: drawn images in shards, runs and ranks that cost little, and the folder of large golden vectors."""

import io
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before torch is imported. Toy tensors gain nothing from threads, which spin against each other on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
from PIL import Image

from align_train.corpus.shards import write_shards
from align_train.distributed import leave
from align_train.records import Pair

if TYPE_CHECKING:
    from align_train.models import Align

WORDS = ("red", "green", "blue", "cat", "dog", "tree", "house", "boat")


def small_text(layers: int) -> dict[str, object]:
    """The text node of a model for tests: narrow, without dropout, with a vocabulary of 50."""
    sizes = {"layers": layers, "width": 32, "heads": 2, "positions": 64, "vocabulary": 50}
    return {**sizes, "dropout": 0.0, "initialisation": "bert"}


def drawn_image(number: int, size: tuple[int, int] = (40, 30), format: str = "JPEG") -> bytes:
    """An encoded image whose colours depend on `number`."""
    random = np.random.default_rng(number)
    pixels = random.integers(0, 256, (size[1] // 10 + 1, size[0] // 10 + 1, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR).save(content, format)
    return content.getvalue()


def drawn_pair(number: int) -> Pair:
    """A pair whose caption names two words and the number, so that no two captions are equal."""
    caption = f"{WORDS[number % 8]} {WORDS[number // 8 % 8]} {number}"
    return Pair(f"pair-{number:05d}", drawn_image(number), caption, {"parity": "odd" if number % 2 else "even"})


def counted_once(count: Callable[..., Any]) -> Callable[..., Any]:
    """That function of a model's shapes, which is asked once for all models of the same make."""
    from align_train.models.memory import virtual_batch

    known: dict[str, Any] = {}

    def counted(model: "Align", *given: str) -> Any:
        recomputes = model.text_model.encoder.layer[0].gradient_checkpointing
        weights = [(p.shape, p.dtype, p.requires_grad) for p in model.parameters()]
        make = f"{model} {model.config} {model.preprocessing} {virtual_batch(model)} {recomputes} {weights} {given}"
        if make not in known:
            known[make] = count(model, *given)
        return known[make]

    return counted


@cache
def changes() -> tuple[tuple[Any, str, Any], ...]:
    """Of which modules which names become what, so that a run is brief; scripts that take drawn pairs need none."""
    from align_train.engine import budget, device_speed, recalibration

    return (
        (device_speed, "SECONDS", 0.0),
        (device_speed, "measured", cache(device_speed.measured)),
        (budget, "cost_of", counted_once(budget.cost_of)),
        (budget, "memory_of", counted_once(budget.memory_of)),
        (recalibration, "BATCHES", 5),
    )


@pytest.fixture(autouse=True)
def quick_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What every run does once, done as briefly as it can be: measuring the device, estimates, batch norm's statistics.

    Estimates are of shapes alone, so that those of one model hold for the next of its make.
    """
    for place, name, value in changes():
        monkeypatch.setattr(place, name, value)


# Ranks are forked from a process that has imported these, which takes seconds.
multiprocessing.set_forkserver_preload(["pytest", "hydra", "duckdb", "datasets", "align_train.cli.train"])


def on_ranks(ranks: int, work: Callable[..., None], *given: Any) -> None:
    """Call work(rank, *given) in so many processes at once, whose environment is that of ranks on one machine."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = (port, multiprocessing.get_start_method(), work, given)
    torch.multiprocessing.start_processes(_rank, words, nprocs=ranks, start_method="forkserver")


def _rank(number: int, port: int, method: str, work: Callable[..., None], given: tuple[Any, ...]) -> None:
    multiprocessing.set_start_method(method, force=True)  # a rank's workers are its own, and end when it is killed
    os.environ |= {"LOCAL_RANK": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a machine without a network has no other
    for place, name, value in changes():
        setattr(place, name, value)
    try:
        work(number, *given)
    finally:
        leave()


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., Path]:
    """Write `count` drawn pairs as shards into a folder under tmp_path, and return the folder."""

    def make(count: int, pairs_per_shard: int = 16, name: str = "shards", first: int = 0) -> Path:
        folder = tmp_path / name
        write_shards((drawn_pair(first + n) for n in range(count)), folder, "", pairs_per_shard)
        return folder

    return make


@pytest.fixture(scope="session")
def golden() -> Path:
    """The small golden vectors that ship with the tests."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def large_golden() -> Path:
    """The folder of b0_weights.npz and its like, too large to ship (14 MB), named by ALIGN_TRAIN_GOLDEN."""
    folder = os.environ.get("ALIGN_TRAIN_GOLDEN")
    if not folder or not (Path(folder) / "b0_weights.npz").is_file():
        pytest.skip("ALIGN_TRAIN_GOLDEN does not name a folder with b0_weights.npz")
    return Path(folder)


@pytest.fixture
def tiny_run(make_shards: Callable[..., Path], tmp_path: Path) -> Callable[..., list[str]]:
    """Overrides of `align-train train` for a run of the toy model on 64 drawn pairs, without exams or report."""
    train, validation = make_shards(64), make_shards(24, name="validation", first=64)

    def overrides(name: str = "run", *more: str) -> list[str]:
        folder = tmp_path / name
        return [
            "experiment=tiny", "data=shards", f"folder={folder}", f"hydra.run.dir={folder}", "max_steps=6",
            f"data.train.pairs.shards={train}/*.tar", f"data.validation={validation}/*.tar",
            "data.batch_size=16", "data.workers=0", "checkpoint_every=3", "validate_every=3", "export=false",
            "report=false", "trainer.accelerator=cpu", "trainer.log_every_n_steps=1", *more,
        ]  # fmt: skip

    return overrides
