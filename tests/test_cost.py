"""Counted FLOPs against sums done by hand and published numbers; estimated memory against what a step allocates."""

import math
from typing import Any

import pytest
import torch
from test_models import drawn_pixels, drawn_text, small
from torch import nn
from torch.profiler import ProfilerActivity, profile

from align_train.models import Align
from align_train.models.cost import Cost, cost_of, counted_flops, hollow_copy, image_features, text_features
from align_train.models.memory import memory_of


def tiny(**changes: Any) -> Align:
    """One block of each kind."""
    return small(vision={"depth": 0.1}, **changes)


@pytest.fixture(scope="module")
def usual() -> Cost:
    return cost_of(tiny())


def sized(width: float, depth: float, side: int) -> Align:
    """EfficientNet of a size, without memory, beside a narrow BERT."""
    nodes: dict[str, Any] = {
        "vision": {"width": width, "depth": depth, "stochastic_depth": 0.0, "channels_last": True},
        "preprocessing": {"resize": side, "crop": side, "antialias": False, "max_tokens": 16},
        "projection_dim": round(320 * width),
    }
    with torch.device("meta"):
        return small(**nodes)


# GMACs of an image forward, arXiv 1905.11946, table 2. AlignModel rounds odd sizes down where TensorFlow rounds up, so
# B3 and B7 are taken at sizes that stay even, and the published number with the square of the side.
@pytest.mark.parametrize(
    ("width", "depth", "side", "published"),
    [(1.0, 1.0, 224, 0.39), (1.2, 1.4, 320, 1.8 * (320 / 300) ** 2), (2.0, 3.1, 608, 37 * (608 / 600) ** 2)],
)
def test_an_image_costs_what_is_published_of_efficientnet(
    width: float, depth: float, side: int, published: float
) -> None:
    model = hollow_copy(sized(width, depth, side), "meta").eval().requires_grad_(False)
    multiplied = counted_flops(lambda: image_features(model, 1)) / 2
    channels = round(320 * width)
    head = channels * 4 * channels * math.ceil(side / 32) ** 2 + 4 * channels * 1000  # which ALIGN has not
    assert (multiplied + head) / 1e9 == pytest.approx(published, rel=0.05)


def test_training_on_an_image_costs_three_forward_passes_but_for_the_first_layer() -> None:
    model = sized(1.0, 1.0, 224)
    forward = counted_flops(lambda: image_features(hollow_copy(model, "meta").eval().requires_grad_(False), 1))
    first = 2 * 112 * 112 * 32 * 3 * 9  # nobody asks for the gradient to the pixels
    assert cost_of(model).image == 3 * forward - first


def test_a_depthwise_convolution_costs_as_much_for_each_gradient_as_forward() -> None:
    layer, x = nn.Conv2d(6, 6, 3, groups=6, bias=False, device="meta"), torch.empty(2, 6, 8, 8, device="meta")
    assert counted_flops(lambda: layer(x.requires_grad_())) == 3 * 2 * (2 * 6 * 6 * 6) * 9


def test_a_caption_costs_six_for_each_weight_and_token_and_its_attention(usual: Cost) -> None:
    layers, width, columns = 2, 32, 32
    # of the last layer's twelve squares of weights all tokens need two, keys and values, and [CLS] alone the others
    constant = 6 * width * columns + 6 * 10 * width**2
    linear = 6 * (12 * (layers - 1) + 2) * width**2 + 12 * width
    assert usual.caption == pytest.approx((constant, linear, (layers - 1) * 12 * width))


def test_the_polynomial_holds_at_other_lengths(usual: Cost) -> None:
    model = tiny()
    counted = counted_flops(lambda: text_features(hollow_copy(model, "meta").eval(), 3, 23))
    assert usual.pairs(torch.tensor([23, 23, 23])) - 3 * usual.image == pytest.approx(counted)


def test_pairs_cost_the_sum_of_each(usual: Cost) -> None:
    each = [usual.pairs(torch.tensor([length])) for length in (3, 8, 16)]
    assert usual.pairs(torch.tensor([3, 8, 16])) == pytest.approx(sum(each))
    assert each[0] < each[1] < each[2]


@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, {"batch_norm": {"statistics": "cross_rank"}}])
def test_neither_recomputation_nor_batch_norm_is_part_of_the_cost(changes: dict[str, Any], usual: Cost) -> None:
    assert cost_of(tiny(**changes)) == usual


def test_a_frozen_tower_costs_its_forward_pass(usual: Cost) -> None:
    model = tiny()
    model.vision_model.requires_grad_(False)
    cost = cost_of(model)
    assert cost.image < 0.36 * usual.image  # a third, but for the first layer
    assert cost.caption == usual.caption


def test_counting_leaves_the_model_and_the_random_numbers_alone() -> None:
    model = tiny().train()
    before, random = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    cost_of(model), memory_of(model)
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_a_compiled_model_can_be_counted(usual: Cost) -> None:
    model = tiny()
    model.vision_model.compile(backend="eager")
    assert cost_of(model) == usual


def kept_by(model: Align, pairs: int, autocast: bool) -> float:
    """Bytes that a forward pass allocates and does not free again."""
    pixels, (ids, mask) = drawn_pixels(pairs), drawn_text([16] * pairs)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model.encode_image(pixels), model.encode_text(ids, mask)  # what is allocated once
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            embeddings = model.encode_image(pixels), model.encode_text(ids, mask)
    del embeddings
    return float(sum(event.self_cpu_memory_usage for event in profiler.key_averages()))


@pytest.mark.parametrize(
    ("statistics", "precision"), [("virtual", "32-true"), ("cross_rank", "32-true"), ("batch", "bf16-mixed")]
)
def test_the_activations_are_what_a_forward_pass_keeps(statistics: str, precision: str) -> None:
    model = tiny(batch_norm={"statistics": statistics}).train()
    memory = memory_of(model, precision)
    assert memory.fixed + 32 * memory.pair == pytest.approx(kept_by(model, 32, precision != "32-true"), rel=0.25)


def test_less_is_kept_in_bfloat16_and_with_checkpointing() -> None:
    whole = memory_of(small())
    assert memory_of(small(), "bf16-mixed").pair < 0.65 * whole.pair
    assert memory_of(small(gradient_checkpointing=True)).pair < 0.8 * whole.pair


def test_memory_is_that_of_a_micro_batch_and_of_what_is_trained() -> None:
    model = tiny()
    memory, weights = memory_of(model), 4 * sum(p.numel() for p in model.parameters())
    assert memory.weights > weights
    assert memory.of(8, 32, 32) < memory.of(32, 32, 32) - 24 * memory.pair
    assert memory.of(8, 32, 64) - memory.of(8, 32, 32) > memory.trained  # DDP's buckets
    assert memory.of(8, 32, 32, rows=4) < memory.of(8, 32, 32)
    model.requires_grad_(False)
    assert memory_of(model).trained == 0
