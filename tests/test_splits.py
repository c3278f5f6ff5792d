"""The same loss, gradients, masks and statistics however a batch is split: over ranks, micro-batches and chunks."""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import on_ranks
from test_models import drawn_pixels, drawn_text, small
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from align_train.batch import Batch, StepBatch
from align_train.distributed import rank, world_size
from align_train.engine import Contrastive
from align_train.engine.encoding import encode
from align_train.losses import contrastive_loss
from align_train.models import Align
from align_train.models.batch_norm import GhostBatchNorm2d, pool_statistics
from align_train.models.repairs import draw_depths, set_depths

PAIRS = 64  # in virtual batches of 4, so that 4 ranks with 4 micro-batches have one each
SIDES = {torch.float64: 33, torch.float32: 65}  # pixels; fewer leave float32 too little for a group's variance
ENTROPY = (7, 3)
CASES = list(product([torch.float64, torch.float32], [1, 2, 4], [None, 5]))
RANKS = [1, 2, 4]


def model(dtype: torch.dtype, dropout: float = 0.0, **changes: Any) -> Align:
    vision = {"depth": 0.5, "stochastic_depth": 0.3}
    norm = {"group_size": 4, **changes.pop("batch_norm", {})}
    made = small(vision=vision, text={"dropout": dropout}, temperature={"start": 1.0}, batch_norm=norm, **changes)
    return made.to(dtype).train()


def dealt(parts: int, dtype: torch.dtype = torch.float64) -> StepBatch:
    """This rank's micro-batches for a model of that type, dealt out as the plans do it."""
    pixels = drawn_pixels(PAIRS, SIDES[dtype])
    input_ids, mask = drawn_text([3 + number % 9 for number in range(PAIRS)])
    identities = torch.arange(PAIRS)[:, None] // torch.tensor([8, 1])  # eight pairs share an image
    stride = world_size() * parts
    keys = tuple(map(str, range(PAIRS)))
    shares = [slice(begin, None, stride) for begin in range(rank(), stride, world_size())]
    return StepBatch(
        [Batch(pixels[own], input_ids[own], mask[own], keys[own], mask[own].sum(1), identities[own]) for own in shares]
    )


class Step(nn.Module):
    """What DDP wraps: a step's share of the loss."""

    def __init__(self, align: Align, **loss: Any) -> None:
        super().__init__()
        self.align, self.objective = align, Contrastive(**loss)

    def forward(self, batch: StepBatch) -> Tensor:
        image, text = encode(self.align, batch, ENTROPY)
        return self.objective(image, text, self.align.temperature, batch.identities)


def facts(align: Align, loss: Tensor) -> dict[str, Tensor]:
    """Loss, every gradient, and every statistic of batch norm."""
    gradients = {f"gradient of {name}": p.grad for name, p in align.named_parameters() if p.requires_grad}
    statistics = {name: value.clone() for name, value in align.state_dict().items() if "running" in name}
    return {"loss": loss.detach(), **gradients, **statistics}


def split_step(align: Align, parts: int, **loss: Any) -> dict[str, Tensor]:
    step: nn.Module = Step(align, **loss)
    if world_size() > 1:
        step = DistributedDataParallel(step)  # which takes the mean of gradients for as long as it lives
    own = step(dealt(parts, align.temperature.dtype))
    own.backward()
    mean = own.detach().clone()
    if world_size() > 1:
        dist.all_reduce(mean)
    return facts(align, mean / world_size())


def whole_step(dtype: torch.dtype, ids: bool = False) -> dict[str, Tensor]:
    """One big batch in one forward pass, with the plain loss, and nothing of what splits."""
    align, batch = model(dtype), dealt(1, dtype).parts[0]
    random = np.random.default_rng(np.random.SeedSequence(ENTROPY, spawn_key=(0,)))
    set_depths(align, draw_depths(align, PAIRS, random))
    image, text = align.encode_image(batch.pixels), align.encode_text(batch.input_ids, batch.attention_mask)
    loss = contrastive_loss(image, text, align.temperature, ids=batch.identities if ids else None)
    loss.backward()
    return facts(align, loss)


def found_here() -> dict[Any, dict[str, Tensor]]:
    """Every case on this number of ranks."""
    found: dict[Any, dict[str, Tensor]] = {
        case: split_step(model(case[0]), case[1], chunk_size=case[2]) for case in CASES
    }
    for chunk_size in (None, 5):
        found["duplicates", chunk_size] = split_step(
            model(torch.float64), 2, chunk_size=chunk_size, skip_duplicates=True
        )
    found["dropout"] = split_step(model(torch.float64, dropout=0.3), 4 // world_size())
    found["recomputed blocks"] = split_step(model(torch.float64, gradient_checkpointing=True), 2)
    found["cross-rank norm"] = split_step(model(torch.float64, batch_norm={"statistics": "cross_rank"}), 1)
    return found


def work(number: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=number, world_size=ranks)
    torch.save(found_here(), folder / f"{number}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[Any, dict[str, Tensor]]]]:
    """By the number of ranks, what each of them found."""
    each = {1: [found_here()]}
    for ranks in RANKS[1:]:
        folder = tmp_path_factory.mktemp("ranks")
        on_ranks(ranks, work, ranks, folder)
        each[ranks] = [torch.load(folder / f"{number}.pt", weights_only=True) for number in range(ranks)]
    return each


@pytest.fixture(scope="module")
def whole() -> dict[torch.dtype, dict[str, Tensor]]:
    return {dtype: whole_step(dtype) for dtype in (torch.float64, torch.float32)}


def compare(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(value.abs().max().item(), 1.0) if value.is_floating_point() else 1.0
        distance = (actual[name].double() - value.double()).abs().max().item() / scale
        assert distance <= tolerance, f"{name} is {distance:.1e} off"


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(("dtype", "parts", "chunk_size"), CASES)
def test_every_split_is_the_whole_batch(found, whole, ranks, dtype, parts, chunk_size):
    assert len(whole[dtype]) > 200
    for each in found[ranks]:
        compare(each[dtype, parts, chunk_size], whole[dtype], 1e-10 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("chunk_size", [None, 5])
def test_duplicates_are_found_across_ranks_and_micro_batches(found, whole, ranks, chunk_size):
    expected = whole_step(torch.float64, ids=True)
    assert abs(expected["loss"] - whole[torch.float64]["loss"]) > 0.1
    for each in found[ranks]:
        compare(each["duplicates", chunk_size], expected, 1e-10)


def test_dropout_depends_on_the_number_of_micro_batches_alone(found, whole):
    expected = found[1][0]["dropout"]
    assert abs(expected["loss"] - whole[torch.float64]["loss"]) > 1e-3
    for ranks in RANKS[1:]:
        compare(found[ranks][0]["dropout"], expected, 1e-10)


@pytest.mark.parametrize("ranks", RANKS)
def test_blocks_may_be_recomputed_within_micro_batches(found, whole, ranks):
    compare(found[ranks][0]["recomputed blocks"], whole[torch.float64], 1e-10)


def test_cross_rank_norm_does_not_depend_on_the_ranks(found):
    for ranks in RANKS[1:]:
        compare(found[ranks][0]["cross-rank norm"], found[1][0]["cross-rank norm"], 1e-10)


def test_a_group_that_no_micro_batch_holds_whole_gives_other_statistics(whole):
    """Virtual batches of 64 images in micro-batches of 16: what the settings refuse, and why."""
    small_groups = model(torch.float64)
    for layer in small_groups.modules():
        if isinstance(layer, GhostBatchNorm2d):
            layer.group_size = None  # as many as there are
    assert abs(split_step(small_groups, 4)["loss"] - whole[torch.float64]["loss"]) > 1e-4


def test_running_statistics_over_three_steps(whole):
    """Each step's sums begin at nothing."""
    found = []
    for parts in (1, 4):
        align, batch = model(torch.float64), dealt(parts)
        for step in range(3):
            encode(align, batch, (7, step))
        found.append({name: value for name, value in align.state_dict().items() if "running" in name})
    align, batch = model(torch.float64), dealt(1).parts[0]
    for step in range(3):
        random = np.random.default_rng(np.random.SeedSequence((7, step), spawn_key=(0,)))
        set_depths(align, draw_depths(align, PAIRS, random))
        align.encode_image(batch.pixels)
    for each in found:
        compare(each, {name: align.state_dict()[name] for name in each}, 1e-10)


def test_every_step_and_every_micro_batch_draws_its_own_dropout():
    align, batch = model(torch.float64, dropout=0.5), dealt(4)
    twice = StepBatch([batch.parts[0], batch.parts[0]])
    first = encode(align, twice, ENTROPY)[1].detach()
    assert not torch.allclose(first[:16], first[16:])
    assert torch.equal(encode(align, twice, ENTROPY)[1].detach(), first)
    assert not torch.allclose(encode(align, twice, (7, 4))[1].detach(), first)


def test_every_step_draws_its_own_depths():
    align = model(torch.float64)
    one, other = (encode(align, dealt(1), (7, step))[0].detach() for step in (3, 4))
    assert not torch.allclose(one, other)


def test_a_micro_batch_is_forgotten_until_it_is_needed():
    """While micro-batches are embedded nothing but the embeddings stays, and going back holds one at a time."""
    alive, most = 0, 0

    class Kept:
        def __init__(self, x: Tensor) -> None:
            nonlocal alive, most
            self.x, self.size = x, x.numel()
            alive += self.size
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= self.size

    sizes = {}
    for parts in (1, 8):
        alive, most, align = 0, 0, model(torch.float32)
        batch = StepBatch(dealt(8, torch.float32).parts[:parts])
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.x):
            image, text = encode(align, batch, ENTROPY)
        sizes[parts] = most
        del image, text
    assert sizes[8] < sizes[1] / 20


def test_each_micro_batch_runs_forward_twice_and_the_tower_once_more():
    align, calls = model(torch.float32), []
    align.vision_model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    image, text = encode(align, dealt(4), ENTROPY)
    assert len(calls) == 4
    (image.sum() + text.sum()).backward()
    assert len(calls) == 8


@pytest.mark.parametrize("parts", [1, 4])
def test_mixed_precision_adds_micro_batches_up_in_float32(parts):
    """Against gradient caching written out: embed, loss, embed again with the embeddings' gradients."""
    align, batch = model(torch.float32), dealt(parts, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        image, text = encode(align, batch, ENTROPY)
        loss = Contrastive()(image, text, align.temperature, batch.identities)
    loss.backward()
    found = facts(align, loss)

    align = model(torch.float32)
    random = np.random.default_rng(np.random.SeedSequence(ENTROPY, spawn_key=(0,)))
    depths, rows = draw_depths(align, PAIRS, random), []

    def embed(number: int) -> tuple[Tensor, Tensor]:
        part = batch.parts[number]
        set_depths(align, depths[:, number::parts])
        with torch.autocast("cpu", torch.bfloat16):
            return align.encode_image(part.pixels), align.encode_text(part.input_ids, part.attention_mask)

    with torch.no_grad(), pool_statistics(align):
        rows = [embed(number) for number in range(parts)]
    leaves = [tuple(x.requires_grad_() for x in pair) for pair in rows]
    loss = Contrastive()(*(torch.cat(x) for x in zip(*leaves, strict=True)), align.temperature, batch.identities)
    loss.backward()
    statistics = {name: value for name, value in facts(align, loss).items() if "running" in name}
    for number in range(parts):
        torch.autograd.backward(embed(number), [leaf.grad for leaf in leaves[number]])
    expected = facts(align, loss) | statistics
    compare(found, expected, 1e-6)
