"""What tests share: small shards of drawn images, and the folder of large golden vectors."""

import io
import os
from collections.abc import Callable
from pathlib import Path

# Before torch is imported. Toy tensors gain nothing from threads, which spin against each other on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
from PIL import Image

from align_train.corpus.shards import write_shards
from align_train.engine import device_speed, recalibration
from align_train.records import Pair

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


@pytest.fixture(autouse=True)
def quick_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What every run does once, done as briefly as it can be: measuring the device, and batch norm's statistics."""
    monkeypatch.setattr(device_speed, "SECONDS", 0.0)
    monkeypatch.setattr(recalibration, "BATCHES", 5)


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
