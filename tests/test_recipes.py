"""The published recipes: complete, with the published numbers, for any number of GPUs; each walks a step in little."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import DictConfig, OmegaConf

from align_train.cli.models import build_model
from align_train.cli.train import train
from align_train.engine import Contrastive, Execution, Recovery
from align_train.engine.split import Split
from align_train.models import Align
from align_train.models.memory import memory_of, virtual_batch
from align_train.optim import Lamb
from align_train.shipped import config_folder

GIGABYTES = 80  # of the GPUs that step.micro_batch is meant for
RANKS = (1, 2, 8, 64, 512)


@dataclass(frozen=True)
class Published:
    """What a recipe is to be: arXiv 2102.05918, section 5, or conf/*.flags of kakaobrain/coyo-align."""

    batch_size: int
    steps: int
    warmup: int
    lr: float
    width: int  # of an embedding
    parameters: int


RECIPES = {
    "align_paper": Published(16_384, 1_200_000, 10_000, 0.001, 1376, 803_772_085),
    "coyo_align_b7": Published(65_536, 300_000, 40_000, 0.002, 640, 172_117_841),
    "cc3m_b3": Published(16_384, 100_000, 10_000, 0.005, 384, 21_372_585),
}
TRAINERS = sorted(path.stem for path in (config_folder() / "trainer").glob("*.yaml"))
every_recipe = pytest.mark.parametrize("name", RECIPES)

LITTLE = (
    "model.vision.width=0.1", "model.vision.depth=0.1", "model.projection_dim=32", "model.text.layers=1",
    "model.text.width=32", "model.text.heads=2", "model.preprocessing.resize=40", "model.preprocessing.crop=33",
    "model.preprocessing.max_tokens=16", "data.batch_size=64", "data.workers=0", "max_steps=1",
    "trainer.accelerator=cpu", "trainer.devices=1", "trainer.log_every_n_steps=1",
)  # fmt: skip


@cache
def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return compose("train", list(overrides))


def recipe(name: str, *overrides: str) -> DictConfig:
    return composed(f"experiment={name}", "data.train.pairs.shards=x", "folder=x", *overrides)


@cache
def on_meta(name: str) -> Align:
    with torch.device("meta"):
        return build_model(recipe(name).model)


@every_recipe
def test_a_recipe_lacks_nothing_but_its_shards(name: str) -> None:
    bare = composed(f"experiment={name}", "folder=x")
    assert OmegaConf.missing_keys(bare) == {"data.train.pairs.shards"}
    assert OmegaConf.missing_keys(recipe(name, "trainer=nodes")) == {"trainer.num_nodes"}
    assert (bare.name, bare.centre_captions, bare.exams, bare.model.text.initialisation) == (name, False, {}, "bert")


@every_recipe
def test_a_recipe_has_the_published_model(name: str) -> None:
    model, published = on_meta(name), RECIPES[name]
    assert sum(weight.numel() for weight in model.parameters()) == published.parameters
    assert model.config.projection_dim == published.width
    assert virtual_batch(model) == 16
    node = recipe(name).model
    assert (node.preprocessing.resize, node.preprocessing.crop, node.preprocessing.max_tokens) == (346, 289, 64)
    assert (node.temperature.start, node.preprocessing.antialias) == (1.0, False)


@every_recipe
def test_a_recipe_has_the_published_optimizer_and_loss(name: str) -> None:
    config, published = recipe(name), RECIPES[name]
    optimizer = instantiate(config.optimizer)(torch.nn.Linear(2, 2))
    assert isinstance(optimizer, Lamb)
    assert {group["lr"] for group in optimizer.param_groups} == {published.lr}
    assert optimizer.defaults["weight_decay"] == 1e-5
    assert optimizer.defaults["betas"] == (0.9, 0.999)
    objective = instantiate(config.loss)
    assert isinstance(objective, Contrastive)
    assert (objective.label_smoothing, objective.negatives, objective.chunk_size) == (0.1, "gathered", 1024)
    assert not objective.skip_duplicates
    changes = {key: value for key, value in config.data.augmentation.items() if key != "_target_" and value}
    assert changes == {"flip": 0.5}


@every_recipe
def test_a_recipe_has_the_published_schedule(name: str) -> None:
    config, published = recipe(name), RECIPES[name]
    factor, quarter = instantiate(config.schedule), (published.steps - published.warmup) // 4
    assert config.max_steps == published.steps
    assert (factor(0), factor(published.warmup), factor(published.steps)) == (0.0, 1.0, 0.0)
    assert factor(published.warmup // 2) == 0.5
    assert factor(published.warmup + quarter) == pytest.approx(0.75)  # linear, no cosine
    assert 0 < factor(published.steps - 1) < 2e-5  # the last step still moves


def test_the_two_long_recipes_see_as_many_pairs() -> None:
    pairs = {name: config.data.batch_size * config.max_steps for name in RECIPES for config in [recipe(name)]}
    assert pairs == {"align_paper": 19_660_800_000, "coyo_align_b7": 19_660_800_000, "cc3m_b3": 1_638_400_000}


@every_recipe
@pytest.mark.parametrize("ranks", RANKS)
def test_a_recipe_splits_over_any_number_of_gpus(name: str, ranks: int) -> None:
    config = recipe(name)
    assert config.data.batch_size == RECIPES[name].batch_size
    split = Split(config.data.batch_size, ranks, config.step.micro_batch, config.model.batch_norm.group_size)
    assert split.ranks * split.accumulation * split.micro == RECIPES[name].batch_size
    assert split.accumulation > 1 or split.local <= config.step.micro_batch


@every_recipe
def test_a_micro_batch_is_the_largest_that_fits_into_80_gb_with_room_to_spare(name: str) -> None:
    config = recipe(name)
    batch, micro = config.data.batch_size, config.step.micro_batch
    need = memory_of(on_meta(name), config.trainer.precision)
    taken, double = (need.of(size, batch // 8, batch, config.loss.chunk_size) / 1e9 for size in (micro, 2 * micro))
    assert taken < 0.9 * GIGABYTES < double


@every_recipe
def test_the_trainer_group_alone_says_where_a_recipe_runs(name: str) -> None:
    nodes = ("trainer=nodes", "trainer.num_nodes=8", "trainer.devices=8", "step.micro_batch=64")
    here, there = recipe(name), recipe(name, *nodes)
    assert (here.trainer.accelerator, here.trainer.devices, here.trainer.precision) == ("gpu", "auto", "bf16-mixed")
    assert (there.trainer.num_nodes, there.trainer.devices, there.trainer.precision) == (8, 8, "bf16-mixed")
    assert there.step.micro_batch == 64  # what a user gives wins over the recipe
    body = yaml.safe_load((config_folder() / "experiment" / f"{name}.yaml").read_text())
    assert "trainer" not in body
    assert {**there, "trainer": None, "step": None} == {**here, "trainer": None, "step": None}


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_instantiates(name: str) -> None:
    small: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "num_nodes": 1}
    trainer = instantiate(composed(f"trainer={name}", "folder=x").trainer, logger=False, **small)
    assert isinstance(trainer, Trainer)
    assert trainer.gradient_clip_val is None
    assert trainer.precision == ("bf16-mixed" if name in ("gpu", "nodes") else "32-true")
    if name == "nodes":
        assert isinstance(trainer.strategy, DDPStrategy)
        assert trainer.strategy._timeout.total_seconds() == 1800
        assert trainer.strategy._ddp_kwargs["gradient_as_bucket_view"]


@every_recipe
def test_a_recipe_walks_a_step_in_little(
    name: str, make_shards: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = (f"data.train.pairs.shards={make_shards(64)}/*.tar", f"folder={tmp_path}")
    # four micro-batches of one virtual batch each; and the first step of a warm-up would change no weight
    config = composed(f"experiment={name}", *given, *LITTLE, "step.micro_batch=16", "schedule.warmup_steps=0")
    torch.manual_seed(config.seed)
    before = build_model(config.model).state_dict()
    train(config)
    assert "batch 64 = 1 rank x 4 micro-batches x 16 pairs" in capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["steps"], result["pairs_seen"], result["batch_size"]) == (1, 64, 64)
    after = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    moved = {key for key, value in before.items() if not torch.equal(value, after[f"model.{key}"])}
    assert {"temperature", "text_projection.weight", "vision_model.embeddings.convolution.weight"} <= moved
    assert (tmp_path / "hf" / "model.safetensors").is_file()  # a recipe trains what can be exported


@every_recipe
def test_execution_of_a_recipe_encodes_sixteen_captions_a_chunk(name: str) -> None:
    execution = instantiate(recipe(name).step)
    assert isinstance(execution, Execution)
    assert execution.micro_batch == 16 * execution.text_chunks
    assert {execution.compile_vision, execution.compile_text} == {False}


@every_recipe
def test_a_job_of_any_number_of_nodes_composes(name: str) -> None:
    """What slurm/train.sbatch adds to a recipe."""
    given = ("resume=auto", "trainer.num_nodes=64", "trainer.devices=8", "step.micro_batch=null")
    for trainer in ((), ("trainer=nodes",)):
        config = recipe(name, *trainer, *given)
        assert (config.trainer.num_nodes, config.trainer.devices, config.resume) == (64, 8, "auto")
        assert isinstance(instantiate(config.recovery), Recovery)
    assert config.data.batch_size % 512 == 0
