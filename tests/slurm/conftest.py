"""The cluster, one for all tests of this folder, and what is trained on it."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import drawn_pair

from align_train.corpus.shards import write_shards
from slurm.cluster import Cluster, why_not

if not (Path(__file__).parents[2] / ".venv" / "bin" / "activate").exists():  # where the scripts look by themselves
    os.environ.setdefault("ALIGN_TRAIN_ENV", sys.prefix)
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the nodes share one


@pytest.fixture(scope="session")
def running_cluster() -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    with Cluster(nodes=2) as cluster:
        yield cluster


@pytest.fixture
def cluster(running_cluster: Cluster) -> Iterator[Cluster]:
    """Two nodes, idle; the jobs of a test end with it."""
    yield running_cluster
    running_cluster.clear()


@pytest.fixture(scope="session")
def drawn_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 pairs in train/, 24 in validation/."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards((drawn_pair(number) for number in range(64)), folder / "train", "", 16)
    write_shards((drawn_pair(number) for number in range(64, 88)), folder / "validation", "", 16)
    return folder


@pytest.fixture(scope="session")
def words(drawn_shards: Path) -> Callable[..., list[str]]:
    """Overrides of `align-train train` for the toy model on drawn pairs, without exams or report."""

    def overrides(*more: str) -> list[str]:
        return [
            "experiment=tiny", "data=shards", f"data.train.pairs.shards={drawn_shards}/train/*.tar",
            f"data.validation={drawn_shards}/validation/*.tar", "max_steps=6", "data.batch_size=16", "data.workers=0",
            "checkpoint_every=3", "validate_every=3", "export=false", "report=false", "trainer.accelerator=cpu",
            "trainer.log_every_n_steps=1", *more,
        ]  # fmt: skip

    return overrides
