"""Every shipped YAML composes, instantiates and is commented; what is unknown or missing is an error."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from hydra.utils import get_method, instantiate
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from align_train.cli.hydra_app import check_complete
from align_train.corpus.coyo import SCHEMA
from align_train.corpus.fetch import FetchSettings, Limits, Permissions
from align_train.corpus.images import ImageSettings
from align_train.corpus.select import Resources
from align_train.corpus.select.plan import Plan
from align_train.corpus.stream import CoyoStream
from align_train.data import Augmentation
from align_train.data.own_pairs import CheckSettings
from align_train.models import Align, Lora, Tuning, build
from align_train.shipped import config_folder

FILES = sorted(config_folder().rglob("*.yaml"))
NAMES = [str(path.relative_to(config_folder())) for path in FILES]


def composed(verb: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return compose(verb, list(overrides))


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (config_folder() / group).glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_every_leaf_has_a_comment(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0].startswith("#")
    inside_defaults = False
    for line in lines:
        if re.match(r"\S", line):
            inside_defaults = line.startswith("defaults:")
        leaf = re.match(r"\s*[\w.]+: \S|\{\}", line)
        if leaf and not inside_defaults:
            assert " # " in line, f"{path.name}: no comment on {line!r}"


@pytest.mark.parametrize("name", options("model"))
def test_every_model_preset_instantiates(name: str) -> None:
    with torch.device("meta"):
        config = composed("train", f"model={name}", "folder=x").model
        assert isinstance(instantiate(config, _convert_="all"), Align)


def test_build_reads_the_same_preset() -> None:
    with torch.device("meta"):
        node = instantiate(composed("train", "model=align_tiny", "folder=x").model, _convert_="all")
        assert node.config.to_dict() == build("align_tiny").config.to_dict()


@pytest.mark.parametrize("name", options("optimizer"))
def test_every_optimizer_instantiates(name: str) -> None:
    optimizer = instantiate(composed("train", f"optimizer={name}", "folder=x").optimizer)(torch.nn.Linear(2, 2))
    assert isinstance(optimizer, torch.optim.Optimizer)


@pytest.mark.parametrize("name", options("tuning"))
def test_every_tuning_instantiates_and_prepares_a_model(name: str) -> None:
    tuning = instantiate(composed("train", f"+tuning={name}", "folder=x").tuning, _convert_="all")
    assert isinstance(tuning, Tuning)
    assert tuning.lora == Lora()  # each default is the same in both places
    with torch.device("meta"):
        model = build("align_tiny")
    assert len(tuning.prepare(model)) == 3
    assert (name == "full") == (tuning == Tuning())


@pytest.mark.parametrize("name", options("schedule"))
def test_every_schedule_instantiates(name: str) -> None:
    schedule = instantiate(composed("train", f"schedule={name}", "folder=x", "max_steps=20000").schedule)
    assert schedule(0) == 0.0
    assert 0.0 < schedule(10000) <= 1.0


@pytest.mark.parametrize("name", options("logger"))
def test_every_logger_instantiates(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    loggers = composed("train", f"logger={name}", f"folder={tmp_path}").logger
    assert all(isinstance(instantiate(node), Logger) for node in loggers.values())


@pytest.mark.parametrize("name", options("exams"))
def test_every_exam_instantiates(name: str) -> None:
    exams = composed("evaluate", f"exams=[{name}]", "folder=x", "checkpoint=x")
    for key in OmegaConf.missing_keys(exams):
        OmegaConf.update(exams, key, "given")
    for node in exams.exams.values():
        exam = instantiate(node, _convert_="all")
        assert callable(exam.take)
        sources = [getattr(exam, field) for field in ("data", "train", "test") if hasattr(exam, field)]
        assert all(callable(source.open) for source in sources)


def test_exams_come_together() -> None:
    exams = composed("train", "exams=[retrieval_sample,health_sample]", "folder=x").exams
    assert list(exams) == ["unseen_rendering", "unseen_rendering_no_flags", "unseen_concept", "health"]
    assert composed("train", "exams=none", "folder=x").exams == {}


@pytest.mark.parametrize("name", options("data"))
def test_every_data_composes(name: str) -> None:
    given = ["data.train.pairs.shards=x"] if name == "shards" else []
    config = composed("train", f"data={name}", "folder=x", *given)
    assert isinstance(instantiate(config.data.augmentation), Augmentation)
    made = instantiate(config.data, _partial_=True, _convert_="all")
    assert made.func.__name__ == ("StreamData" if name == "coyo_stream" else "PairData")


@pytest.mark.parametrize("name", options("source"))
def test_every_source_names_a_function(name: str) -> None:
    source = composed("prepare", f"source={name}").source
    nodes = [source, *([source.pairs] if "pairs" in source else [])]
    assert all(callable(get_method(node._target_)) for node in nodes)


def test_settings_of_fetching_instantiate() -> None:
    source = composed("prepare", "source=coyo", "source.folder=x", "source.metadata=y").source
    made = instantiate(source.fetch, _convert_="all")
    assert replace(made, permissions=Permissions()) == FetchSettings()  # each default is the same in both places
    assert instantiate(source.resources) == Resources(spill=source.resources.spill)


@pytest.mark.parametrize("name", options("rules"))
def test_every_set_of_rules_instantiates(name: str, tmp_path: Path) -> None:
    (tmp_path / "hashes.txt").write_text("0123456789abcdef\n")
    given = [f"rules.evaluation_images.lists=[{tmp_path / 'hashes.txt'}]"] if name == "evaluation_images" else []
    rules = instantiate(composed("prepare", f"rules=[{name}]", *given).rules, _convert_="all")
    assert set(Plan.of(rules).columns) <= {*SCHEMA.names}


def test_the_stream_takes_other_rules_and_lowers_the_limits_of_its_fetcher() -> None:
    words = ["data=coyo_stream", "folder=x", "seed=7", "rules=[align_paper_rows,watermark]"]
    stream = instantiate(composed("train", *words).data.stream, _convert_="all")
    assert stream == replace(CoyoStream("kakaobrain/coyo-700m", stream.rules, stream.fetcher), seed=7)
    assert list(stream.rules) == ["short_side", "aspect", "words", "watermark"]
    assert stream.fetcher.limits.total_seconds < Limits().total_seconds
    assert stream.fetcher.images == ImageSettings(mode="original", reencode=False)
    with pytest.raises(Exception, match="shared_text, texts_per_image count over the whole corpus"):
        instantiate(composed("train", *words[:2], "rules=align_paper").data.stream, _convert_="all")


@pytest.mark.parametrize("name", options("experiment"))
def test_every_experiment_composes(name: str) -> None:
    config = composed("train", f"experiment={name}", "folder=x")
    assert config.max_steps > 0
    with torch.device("meta"):
        assert isinstance(instantiate(config.model, _convert_="all"), Align)


@pytest.mark.parametrize("name", options("recipe"))
def test_every_recipe_of_fine_tuning_composes(name: str) -> None:
    given = [] if name == "sample_concepts" else ["pairs.path=x", "pairs.images=x"]
    config = composed("finetune", f"recipe={name}", "folder=x", "start.model=x", *given)
    check_complete(config)
    assert callable(instantiate(config.pairs, _convert_="all").open)
    assert instantiate(config.check, _convert_="all") == CheckSettings(validation_share=0.1)
    if config.forgetting is not None:
        instantiate(config.forgetting, _convert_="all").check_names(list(config.exams))


def test_trainer_instantiates() -> None:
    assert instantiate(composed("train", "folder=x").trainer, accelerator="cpu", logger=False).max_steps == -1


@pytest.mark.parametrize(
    "override",
    ["max_stepz=3", "model.vision.widht=1", "data.batchsize=2", "optimizer.learning_rate=1", "trainer.gpus=1"],
)
def test_a_typo_is_an_error(override: str) -> None:
    with pytest.raises(ConfigCompositionException, match=override.partition("=")[0].rpartition(".")[2]):
        composed("train", override)


def test_an_unknown_option_lists_the_known() -> None:
    with pytest.raises(Exception, match=r"align_hugo[\s\S]*align_tiny"):
        composed("train", "model=align_hugo")


def test_missing_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"data\.train\.pairs\.shards=\.\.\."):
        check_complete(composed("train", "data=shards", "folder=x"))


@pytest.mark.parametrize("name", options("model"))
def test_model_presets_need_no_hydra(name: str) -> None:
    assert "${" not in (config_folder() / "model" / f"{name}.yaml").read_text()
    assert set(yaml.safe_load((config_folder() / "model" / f"{name}.yaml").read_text())) >= {"vision", "text"}
