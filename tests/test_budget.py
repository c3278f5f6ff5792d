"""What a run says and checks before its first step: how its batch is split, how long it is, what it needs."""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_models import small

from align_train.data import Augmentation, OrderSettings, read_sources
from align_train.data.counting import Epoch, count_epochs
from align_train.data.storage.cache import Cache
from align_train.engine import PairData
from align_train.engine.budget import (
    Budget,
    memory_there,
    split_of,
    told_compute,
    told_length,
    told_parameters,
    warn_of_memory,
)
from align_train.engine.device_speed import Peak, measured, peak_of, published
from align_train.engine.split import Split
from align_train.models import Align
from align_train.models.cost import Cost

MakeShards = Callable[..., Path]


@pytest.mark.parametrize(
    ("batch_size", "ranks", "micro_batch", "group_size", "local", "accumulation", "micro"),
    [
        (16_384, 8, 128, 16, 2048, 16, 128),
        (16_384, 8, None, 16, 2048, 1, 2048),
        (16_384, 64, 4096, 16, 256, 1, 256),  # its share is smaller than what it could take
        (96, 1, 48, None, 96, 2, 48),
    ],
)
def test_a_batch_is_ranks_times_micro_batches_times_pairs(
    batch_size: int,
    ranks: int,
    micro_batch: int | None,
    group_size: int | None,
    local: int,
    accumulation: int,
    micro: int,
) -> None:
    split = Split(batch_size, ranks, micro_batch, group_size)
    assert (split.local, split.accumulation, split.micro) == (local, accumulation, micro)
    assert ranks * split.accumulation * split.micro == batch_size


def test_a_split_is_told_in_full() -> None:
    assert str(Split(16_384, 8, 128, 16)) == "16,384 = 8 ranks x 16 micro-batches x 128 pairs"
    assert str(Split(128, 1)) == "128 = 1 rank x 1 micro-batch x 128 pairs"


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ((100, 3), r"data.batch_size is 100 .* 3 ranks .*trainer.devices.*data.batch_size=99 or data.batch_size=102$"),
        ((100, 3, None, 16), r"data.batch_size=96 or data.batch_size=144$"),
        ((2, 3), r"number, data.batch_size=3$"),
        ((0, 1), r"data.batch_size is 0"),
        ((96, 4, None, 16), r"is 24 pairs each.*model.batch_norm.group_size=16.*batch_size=64 or data.batch_size=128"),
        ((96, 1, 40), r"step.micro_batch is 40.*the 96 pairs of a rank.*step.micro_batch=32 or step.micro_batch=48$"),
        ((96, 1, 24, 16), r"micro_batch is 24.*group_size=16: set step.micro_batch=16 or step.micro_batch=32$"),
        ((96, 1, 8, 16), r"micro_batch is 8.*: set step.micro_batch=16$"),
    ],
)
def test_a_batch_that_cannot_be_split_is_refused_with_what_could(split: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Split(*split)


@pytest.mark.parametrize(("batch_size", "group_size"), [(90, None), (96, 4), (100, 4), (101, 4)])
def test_what_a_message_proposes_works(batch_size: int, group_size: int | None) -> None:
    with pytest.raises(ValueError, match=": ") as refused:
        Split(batch_size, 2, 7, group_size)
    remedy = str(refused.value).rpartition(": ")[2]
    proposed = re.findall(r"(step.micro_batch|data.batch_size)=(\d+)", remedy)
    assert proposed
    for key, value in proposed:
        if key == "step.micro_batch":
            Split(batch_size, 2, int(value), group_size)
        else:
            Split(int(value), 2, None, group_size)


def counted(train: dict[str, Any], most: int = 16, **order: Any) -> dict[str, Epoch]:
    return count_epochs(read_sources(train, Cache()), OrderSettings(**order), most)


def test_few_shards_are_counted_each_as_often_as_it_is_read(make_shards: MakeShards) -> None:
    one, two = make_shards(40), make_shards(10, name="more", first=40)
    train = {"one": {"shards": f"{one}/*.tar", "repeat": 2}, "two": {"shards": f"{two}/*.tar"}}
    assert counted(train) == {"one+two": Epoch(90, True)}


def test_sources_with_weights_have_epochs_of_their_own(make_shards: MakeShards) -> None:
    one, two = make_shards(40), make_shards(10, name="more", first=40)
    train = {"one": {"shards": f"{one}/*.tar", "weight": 3}, "two": {"shards": f"{two}/*.tar", "weight": 1}}
    assert counted(train) == {"one": Epoch(53, True), "two": Epoch(40, True)}


def test_of_many_shards_some_stand_for_all(make_shards: MakeShards) -> None:
    shards = make_shards(70, pairs_per_shard=8)  # nine, the last with six
    assert counted({"one": {"shards": f"{shards}/*.tar"}}, most=3) == {"one": Epoch(round(22 / 3 * 9), False)}


def test_a_number_of_samples_an_epoch_is_taken_as_it_is(make_shards: MakeShards) -> None:
    train = {"one": {"shards": f"{make_shards(8)}/*.tar"}}
    assert counted(train, samples_per_epoch=1000) == {"all": Epoch(1000, True)}


def test_remote_shards_are_not_downloaded_to_be_counted(make_shards: MakeShards) -> None:
    train = {
        "near": {"shards": f"{make_shards(8)}/*.tar"},
        "far": {"shards": "http://127.0.0.1:9/{00..99}.tar"},
    }
    assert counted(train) == {}


def test_a_broken_shard_counts_nothing_and_is_told_of_later(
    make_shards: MakeShards, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_shards(32)
    sorted(folder.glob("*.tar"))[0].write_bytes(b"no tar" * 200)
    assert counted({"one": {"shards": f"{folder}/*.tar"}}) == {"one": Epoch(16, True)}
    assert not caplog.records


def trainer_of(data: object, ranks: int = 1, steps: int = 10) -> Any:
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    return SimpleNamespace(
        datamodule=data, strategy=strategy, world_size=ranks, num_devices=ranks, max_steps=steps, precision="32-true"
    )


def pair_data(shards: Path, model: Align, **more: Any) -> PairData:
    train = {"pairs": {"shards": f"{shards}/*.tar"}}
    return PairData(train, preprocessing=model.preprocessing, augmentation=Augmentation(), **more)


def test_a_run_says_what_it_takes(make_shards: MakeShards, capsys: pytest.CaptureFixture[str]) -> None:
    model, budget = small(vision={"depth": 0.1}), Budget()
    data = pair_data(make_shards(64), model, batch_size=32, micro_batch=8)
    budget.setup(trainer_of(data, ranks=2), SimpleNamespace(model=model), "fit")  # type: ignore[arg-type]
    batch, parameters, memory, length, compute = capsys.readouterr().out.splitlines()
    assert batch == "batch 32 = 2 ranks x 2 micro-batches x 8 pairs"
    assert parameters == told_parameters(model)
    assert memory.startswith("memory about 0.00")
    assert length == "length 10 steps, 320 pairs, 5 epochs of 64 pairs (pairs)"
    assert "of 16 tokens" in compute
    assert "measured" in compute
    assert budget.cost is not None
    assert budget.peak is not None


def test_a_batch_that_does_not_fit_the_virtual_batch_is_refused(make_shards: MakeShards) -> None:
    model = small(vision={"depth": 0.1})  # virtual batches of 4
    trainer = trainer_of(pair_data(make_shards(64), model, batch_size=32, micro_batch=2))
    with pytest.raises(ValueError, match=r"step.micro_batch is 2.*group_size=4: set step.micro_batch=4"):
        Budget().setup(trainer, SimpleNamespace(model=model), "fit")  # type: ignore[arg-type]


@pytest.mark.parametrize("statistics", ["batch", "cross_rank"])
def test_a_norm_over_the_whole_batch_takes_no_micro_batches(make_shards: MakeShards, statistics: str) -> None:
    model, shards = small(vision={"depth": 0.1}, batch_norm={"statistics": statistics}), make_shards(64)
    with pytest.raises(ValueError, match=r"step.micro_batch=8 splits 32 pairs.*model.batch_norm.statistics=virtual"):
        split_of(trainer_of(pair_data(shards, model, batch_size=32, micro_batch=8)), model)
    assert split_of(trainer_of(pair_data(shards, model, batch_size=32, micro_batch=32)), model).accumulation == 1
    frozen = small(vision={"depth": 0.1}, batch_norm={"statistics": "frozen"})
    assert split_of(trainer_of(pair_data(shards, frozen, batch_size=32, micro_batch=8)), frozen).accumulation == 4


def test_memory_is_that_of_a_micro_batch(make_shards: MakeShards, capsys: pytest.CaptureFixture[str]) -> None:
    model, shards, told = small(vision={"depth": 0.1}), make_shards(64), []
    for micro_batch in (None, 4):
        data = pair_data(shards, model, batch_size=64, micro_batch=micro_batch)
        Budget().setup(trainer_of(data), SimpleNamespace(model=model), "fit")  # type: ignore[arg-type]
        memory = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("memory"))
        told.append(float(memory.split()[2]))
    assert told[1] < told[0] / 2


def test_parameters_are_told_by_tower() -> None:
    model = small()
    model.vision_model.requires_grad_(False)
    total, vision = (sum(p.numel() for p in part.parameters()) for part in (model, model.vision_model))
    told = told_parameters(model)
    assert f"parameters {total:,} (image tower {vision:,}, text tower" in told
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert f"{total - frozen:,} of them trained" in told


def test_epochs_that_are_not_known_are_not_told() -> None:
    assert told_length(16, 100, {}) == "length 100 steps, 1,600 pairs, epochs unknown"
    assert "about 2 epochs of 800 pairs (x)" in told_length(16, 100, {"x": Epoch(800, False)})


def test_flops_are_told_with_their_peak() -> None:
    told = told_compute(Cost(1e9, (0.0, 1e6, 0.0)), Peak(2e12, "somewhere"), 1000)
    assert told.startswith("compute 2 GFLOPs a pair of 1000 tokens")
    assert told.endswith("2 TFLOP/s (somewhere)")


def test_too_much_memory_is_warned_of_with_the_remedy(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_memory(1e9, 2e9, Split(64, 1, 32))
        assert not caplog.records
        warn_of_memory(30e9, 20e9, Split(64, 1, 32))
    message = caplog.messages[0]
    assert "30 GB" in message
    assert "20 GB" in message
    assert "step.micro_batch to less than 32, or model.gradient_checkpointing=true" in message


def test_processes_share_the_memory_of_a_machine() -> None:
    assert memory_there(torch.device("cpu"), 4) == memory_there(torch.device("cpu"), 1) / 4 > 1e7


@pytest.mark.parametrize(
    ("name", "dtype", "tf32", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, True, 312),
        ("NVIDIA A100-SXM4-80GB", torch.float32, True, 156),
        ("NVIDIA A100-SXM4-80GB", torch.float32, False, 19.5),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, True, 989),
        ("NVIDIA H100 PCIe", torch.bfloat16, True, 756),
        ("NVIDIA H200", torch.float16, True, 989),
        ("NVIDIA B200", torch.bfloat16, True, 2250),
        ("NVIDIA L4", torch.bfloat16, True, 121),
        ("NVIDIA L40S", torch.bfloat16, True, 362),
        ("Tesla V100-SXM2-32GB", torch.float16, True, 125),
        ("Tesla V100-SXM2-32GB", torch.float32, True, 15.7),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, True, 165.2),
    ],
)
def test_published_peaks_are_found_by_the_name_of_the_gpu(
    name: str, dtype: torch.dtype, tf32: bool, teraflops: float
) -> None:
    peak = published(name, dtype, tf32)
    assert peak is not None
    assert peak.flops == pytest.approx(teraflops * 1e12)
    assert peak.source.startswith("published")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("Tesla V100-SXM2-32GB", torch.bfloat16),  # has no such units
        ("NVIDIA A100-SXM4-80GB", torch.float64),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", torch.bfloat16),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16),
        ("NVIDIA GB200", torch.bfloat16),
        ("NVIDIA L40", torch.bfloat16),
        ("NVIDIA H20", torch.bfloat16),
    ],
)
def test_no_peak_is_made_up(name: str, dtype: torch.dtype) -> None:
    assert published(name, dtype) is None


def test_a_cpu_is_measured_in_the_precision_of_the_run() -> None:
    peak = peak_of(torch.device("cpu"), "bf16-mixed")
    assert "measured with bfloat16" in peak.source
    assert 1e8 < peak.flops < 1e15
    single = measured(torch.device("cpu"), torch.float32)
    assert "float32" in single.source
