"""Two processes that share out the weights train as two that each hold them all, and go on as each other."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import drawn_pair, on_ranks
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

import align_train.cli.train
from align_train.cli import main
from align_train.cli.models import load_model
from align_train.cli.train import check_lengths, train
from align_train.corpus.shards import write_shards
from align_train.distributed import dealt_out_as, gathered, is_sharded
from align_train.engine import FullySharded, read_checkpoint, recalibration
from align_train.engine.sharding import shard_model
from align_train.models import build, compile_towers
from align_train.models.memory import Memory
from align_train.shipped import config_folder

SHARDED = "trainer=sharded"


def composed(*words: str) -> Any:
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return compose("train", list(words))


def rank(number: int, words: list[str], folder: Path) -> None:
    """One of two ranks, in double precision: a run under DDP, and a sharded one in parts, the last under DDP."""
    recalibration.WARM = 0.0  # or it would overwrite the statistics that are compared
    make = align_train.cli.train.build_model
    align_train.cli.train.build_model = lambda config: make(config).double()

    def run(name: str, steps: int, *more: str) -> None:
        train(composed(*words, f"folder={folder / name}", f"max_steps={steps}", *more))

    run("whole", 4)
    run("parted", 2, SHARDED)
    run("parted", 3, SHARDED, f"resume={folder / 'parted'}")
    run("parted", 4, f"resume={folder / 'parted'}")  # from shares to whole weights


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the two runs, which end at step 4; with gradient caching and clipping."""
    folder = tmp_path_factory.mktemp("runs")
    write_shards((drawn_pair(number) for number in range(64)), folder / "shards", "", 16)
    words = [
        "experiment=tiny", "data=shards", f"data.train.pairs.shards={folder}/shards/*.tar", "data.validation=null",
        "data.batch_size=16", "step.micro_batch=4", "optimizer=lamb", "schedule.warmup_steps=1",
        "schedule.total_steps=9", "checkpoint_every=9", "validate_every=9", "export=false", "exams=none",
        "trainer.accelerator=cpu", "trainer.devices=2", "trainer.gradient_clip_val=0.05",
    ]  # fmt: skip
    on_ranks(2, rank, words, folder)
    return folder


def test_sharded_steps_are_those_of_ddp(runs: Path) -> None:
    whole, other = (read_checkpoint(runs / run) for run in ("whole", "parted"))
    torch.testing.assert_close(other["state_dict"], whole["state_dict"], atol=1e-9, rtol=0)
    first, second = (checkpoint["optimizer_states"][0] for checkpoint in (whole, other))
    torch.testing.assert_close(second["state"], first["state"], atol=1e-9, rtol=0)
    assert second["param_groups"] == first["param_groups"]
    start = build("align_tiny").state_dict()
    assert whole["global_step"] == 4
    assert max((whole["state_dict"][f"model.{n}"] - start[n]).abs().max().item() for n in start) > 1e-3


def test_a_sharded_checkpoint_is_loaded_and_exported_by_one_process(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recalibration, "WARM", 0.0)
    model = load_model(runs / "parted").model
    assert not is_sharded(model)
    main(["export", f"checkpoint={runs / 'parted'}", f"folder={runs / 'hf'}"])
    assert (runs / "hf" / "model.safetensors").is_file()


def test_the_trainer_of_the_config_shards() -> None:
    trainer = instantiate(composed(SHARDED, "folder=x").trainer, accelerator="cpu", devices=2, logger=False)
    assert isinstance(trainer.strategy, FullySharded)


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_stage_2"])
def test_other_ways_to_shard_are_refused(strategy: str) -> None:
    with pytest.raises(ValueError, match=f"trainer.strategy is {strategy}.*trainer=sharded"):
        check_lengths(composed("folder=x", f"trainer.strategy={strategy}"))
    node = "{_target_: lightning.pytorch.strategies.ModelParallelStrategy}"
    with pytest.raises(ValueError, match="trainer=sharded"):
        check_lengths(composed("folder=x", f"trainer.strategy={node}"))
    check_lengths(composed("folder=x", SHARDED))
    check_lengths(composed("folder=x", "trainer.strategy=ddp"))


def test_compiled_towers_are_not_sharded() -> None:
    model = build("align_tiny")
    compile_towers(model, vision=False, text=True, backend="eager")
    with pytest.raises(ValueError, match=r"step\.compile_text=false"):
        shard_model(model, None)


def test_shares_need_less_memory() -> None:
    memory = Memory(weights=10.0, trained=8.0, fixed=0.0, pair=0.0, pixels=0.0, width=0)
    whole, shares = (memory.of(1, 1, 0, shards=shards) for shards in (1, 2))
    assert whole - shares == (10 + 8 + 16) - (10 + 34 / 2)


def test_what_is_not_dealt_out_stays() -> None:
    x = torch.ones(2)
    assert gathered(x) is x
    assert dealt_out_as(x, x) is x
