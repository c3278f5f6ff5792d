"""The repaired AlignModel against a stock one: equal where it must be, different where a repair says so."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import small_text
from torch import Tensor, nn
from transformers import AlignConfig, AlignModel
from transformers.models.align.modeling_align import AlignTextAttention, AlignTextSelfAttention

from align_train.losses import contrastive_loss
from align_train.models import Align, GhostBatchNorm2d, build, build_align, centre_text, recalibrate
from align_train.models.align import vision_width
from align_train.models.batch_norm import CrossRankBatchNorm2d, FrozenBatchNorm2d
from align_train.models.initialisation import initialise_vision
from align_train.models.repairs import StochasticDepth, repair_batch_norm

# preset, parameters of the vision tower, of the text tower, of the whole with projection and temperature
PRESETS = [
    ("align_tiny", 28_396, 992_640, 1_022_093),
    ("align_sample", 468_744, 4_328_576, 4_817_961),
    ("align_b1_mini", 6_101_024, 11_170_560, 17_353_825),
    ("align_b3_mini", 10_103_336, 11_170_560, 21_372_585),
    ("align_b5_base", 27_288_112, 109_482_240, 137_164_081),
    ("align_b7_base", 62_143_440, 109_482_240, 172_117_841),
    ("align_l2_large", 467_219_796, 335_141_888, 803_772_085),
]


def recipe(**changes: Any) -> dict[str, Any]:
    """All kinds of blocks in little: EfficientNet-B0's 16, 32 channels wide at the end, and two layers of BERT."""
    nodes: dict[str, Any] = {
        "vision": {"width": 0.1, "depth": 1.0, "stochastic_depth": 0.0, "channels_last": True},
        "text": small_text(layers=2),
        "batch_norm": {"statistics": "virtual", "group_size": 4, "momentum": 0.01},
        "temperature": {"start": 1.0, "lower": 0.01, "upper": 10.0},
        "preprocessing": {"resize": 40, "crop": 33, "antialias": False, "max_tokens": 16},
        "projection_dim": 32,
        "gradient_checkpointing": False,
    }
    for node, values in changes.items():
        nodes[node] = {**nodes[node], **values} if isinstance(values, dict) else values
    return nodes


def small(**changes: Any) -> Align:
    """A model of that recipe, always with the same start values."""
    torch.manual_seed(0)
    return build_align(**recipe(**changes))


def stock_of(model: Align) -> AlignModel:
    """transformers' own model with the same weights and statistics."""
    stock = AlignModel(AlignConfig.from_dict(model.config.to_dict())).to(model.temperature.dtype)
    stock.load_state_dict(model.state_dict())
    assert stock.config.text_config._attn_implementation == "eager"
    return stock


def drawn_pixels(count: int, size: int = 33, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), generator=random, dtype=torch.uint8)


def drawn_text(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Captions of these lengths, padded to the longest."""
    random = torch.Generator().manual_seed(seed)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return torch.randint(1, 50, mask.shape, generator=random) * mask, mask


def loss_of(model: Align, pixels: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
    return contrastive_loss(model.encode_image(pixels), model.encode_text(input_ids, mask), model.temperature)


def calibrated(model: Align) -> Align:
    """The model with the statistics of drawn images: what a trained one has."""
    recalibrate(model, [drawn_pixels(16, seed=9)])
    return model


@pytest.mark.parametrize(("preset", "vision", "text", "whole"), PRESETS)
def test_presets_have_these_sizes_and_the_stock_state_dict(preset, vision, text, whole):
    with torch.device("meta"):
        model = build(preset)
        stock = AlignModel(AlignConfig.from_dict(model.config.to_dict()))

    def size(part: nn.Module) -> int:
        return sum(p.numel() for p in part.parameters())

    assert (size(model.vision_model), size(model.text_model), size(model)) == (vision, text, whole)
    ours, theirs = ([(name, x.shape, x.dtype) for name, x in m.state_dict().items()] for m in (model, stock))
    assert ours == theirs


def test_every_preset_is_in_the_table():
    presets = {path.stem for path in (Path(__file__).parents[1] / "configs" / "model").glob("*.yaml")}
    assert presets == {row[0] for row in PRESETS}


@pytest.mark.parametrize("lengths", [[7, 7, 7, 7], [3, 7, 5, 16], [9], [1]], ids=str)
def test_embeddings_are_the_stock_models(lengths):
    # contiguous, as the stock model is; the two share their kernels then, and rounding does not blur the comparison
    model = calibrated(small(vision={"channels_last": False}, temperature={"start": 0.5})).eval()
    stock = stock_of(model).eval()
    pixels, (input_ids, mask) = drawn_pixels(len(lengths)), drawn_text(lengths)
    with torch.no_grad():
        image, text = model.encode_image(pixels), model.encode_text(input_ids, mask)
        expected = stock(input_ids, pixels / 127.5 - 1, mask)
    torch.testing.assert_close(image, expected.image_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(text, expected.text_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(image @ text.T / model.temperature, expected.logits_per_image, atol=4e-6, rtol=0)


def test_channels_last_is_the_stock_model_too():
    model = calibrated(small(vision={"channels_last": True})).double().eval()
    stock = stock_of(model).eval()
    pixels = drawn_pixels(4)
    assert model.vision_model.embeddings.convolution.weight.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        image = model.encode_image(pixels)
        expected = stock.get_image_features(pixels.double() / 127.5 - 1).pooler_output
    torch.testing.assert_close(image, F.normalize(expected), atol=1e-12, rtol=0)


def test_uint8_pixels_are_scaled_and_floating_ones_are_not():
    model, pixels = calibrated(small()).eval(), drawn_pixels(2)
    with torch.no_grad():
        embedded = model.encode_image(pixels)
        assert torch.equal(model.encode_image(pixels / 127.5 - 1), embedded)
        assert not torch.allclose(model.encode_image(pixels.float()), embedded, atol=1e-2)
    torch.testing.assert_close(embedded.norm(dim=1), torch.ones(2))


# One test for every repair, in the order of repairs.py


def test_batch_norm_repair_is_everywhere():
    model = small()
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert len(norms) == 48  # 16 blocks of 3, less the first one's expansion, and the stem
    assert {(type(n), n.group_size, n.momentum, n.eps) for n in norms} == {(GhostBatchNorm2d, 4, 0.01, 1e-3)}


def test_batch_norm_repair_keeps_the_evaluation_embedding_in_place():
    model = small()
    recalibrate(model, [drawn_pixels(16, size=65, seed=seed) for seed in (7, 8, 9)])
    stock = stock_of(model)
    pixels, other = (drawn_pixels(4, size=65, seed=seed) / 127.5 - 1 for seed in (0, 1))

    def moved(tower: AlignModel) -> float:
        """How far one training forward, with no weight changed, moves the evaluation embedding; relative."""
        with torch.no_grad():
            before = tower.eval().get_image_features(pixels).pooler_output
            tower.train().get_image_features(other)
            after = tower.eval().get_image_features(pixels).pooler_output
        return ((after - before).norm() / before.norm()).item()

    repaired, as_shipped = moved(model), moved(stock)
    assert 0 < repaired < 0.06
    assert as_shipped > 2 * repaired


@pytest.mark.parametrize(
    ("statistics", "kind", "group_size"),
    [
        ("virtual", GhostBatchNorm2d, 4),
        ("batch", GhostBatchNorm2d, None),
        ("cross_rank", CrossRankBatchNorm2d, None),
        ("frozen", FrozenBatchNorm2d, None),
    ],
)
def test_batch_norm_statistics_are_chosen_by_name(statistics, kind, group_size):
    model = small(batch_norm={"statistics": statistics, "momentum": 0.3})
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert {(type(n), n.group_size, n.momentum) for n in norms} == {(kind, group_size, 0.3)}
    with pytest.raises(ValueError, match="statistics is 'ghost'; it must be one of virtual, batch, cross_rank, frozen"):
        repair_batch_norm(model, "ghost")


def test_stochastic_depth_drops_whole_samples():
    layer, x = StochasticDepth(0.25), torch.ones(4000, 2, 3, 3)
    torch.manual_seed(0)
    y = layer(x).flatten(1)
    assert torch.equal(y, y[:, :1].expand_as(y))
    kept = y[:, 0] > 0
    assert torch.equal(y[kept, 0], torch.full_like(y[kept, 0], 1 / 0.75))
    assert kept.float().mean().item() == pytest.approx(0.75, abs=4 * math.sqrt(0.25 * 0.75 / 4000))
    assert layer.eval()(x) is x
    assert StochasticDepth(0.0).train()(x) is x


def test_stochastic_depth_repair_drops_the_branch_and_keeps_the_shortcut():
    model = small(vision={"stochastic_depth": 0.9}).train()
    last = [b.projection for b in model.vision_model.encoder.blocks if b.projection.apply_dropout][-1]
    assert last.dropout.p == pytest.approx(0.9 * 14 / 16)
    channels, inner = last.project_conv.out_channels, last.project_conv.in_channels
    shortcut, x = torch.randn(64, channels, 2, 2), torch.randn(64, inner, 2, 2)
    torch.manual_seed(0)
    with torch.no_grad():
        added = last(shortcut, x) - shortcut
        branch = last.project_bn(last.project_conv(x)) / (1 - last.dropout.p)
    dropped = added.flatten(1).abs().amax(1) == 0
    assert 0 < dropped.sum() < 64
    torch.testing.assert_close(added[~dropped], branch[~dropped], atol=1e-5, rtol=1e-5)


def test_stochastic_depth_has_the_references_rates(golden):
    with np.load(golden / "b0.npz") as arrays:
        names, rates = arrays["drop_names"], arrays["drop_rates"]
    blocks = [f"{stage}{'abcd'[n]}" for stage, count in enumerate((1, 2, 2, 3, 3, 4, 1), 1) for n in range(count)]
    model = small(vision={"stochastic_depth": 0.2})
    layers = [block.projection for block in model.vision_model.encoder.blocks]
    assert all(type(layer.dropout) is StochasticDepth for layer in layers)
    ours = {f"block{b}_drop": la.dropout.p for b, la in zip(blocks, layers, strict=True) if la.apply_dropout}
    assert list(ours) == names.tolist()
    assert list(ours.values()) == pytest.approx(rates.tolist(), rel=1e-12)


def compute_all_positions(model):
    """Undo the repair of the last text layer, which leaves but one."""
    attention = model.text_model.encoder.layer[-1].attention
    attention.__class__, attention.self.__class__ = AlignTextAttention, AlignTextSelfAttention


@pytest.mark.parametrize("lengths", [[7, 7, 7], [3, 7, 5], [16]], ids=["unpadded", "padded", "alone"])
def test_attention_repair_equals_eager(lengths, monkeypatch):
    model = small().eval()
    compute_all_positions(model)
    stock = stock_of(model).eval()
    calls = []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k))
    input_ids, mask = drawn_text(lengths)
    states = [m.text_model(input_ids, mask).last_hidden_state for m in (model, stock)]
    assert len(calls) == 2  # once a layer of ours, never in the stock model
    real = mask.bool()
    torch.testing.assert_close(states[0][real], states[1][real], atol=2e-6, rtol=0)
    upstream = torch.randn(states[0].shape, generator=torch.Generator().manual_seed(1)) * mask[..., None]
    for s in states:
        (s * upstream).sum().backward()
    theirs = dict(stock.text_model.named_parameters())
    for name, p in model.text_model.named_parameters():
        if "pooler" not in name:
            difference = (p.grad - theirs[name].grad).abs().max().item()
            # the key's bias has a gradient of zero, and in it only rounding
            assert difference <= 2e-6 * theirs[name].grad.abs().max() + 1e-7, name


def test_attention_is_not_causal():
    model = small().eval()
    compute_all_positions(model)  # [CLS] alone is never causal
    input_ids, mask = drawn_text([7, 7])  # no padding, so no mask is built: the case in which the trap is
    changed = input_ids.clone()
    changed[:, -1] = input_ids[:, -1] % 49 + 1

    def first_hears_the_last() -> bool:
        with torch.no_grad():
            return not torch.equal(model.encode_text(input_ids, mask), model.encode_text(changed, mask))

    layers = [layer for layer in model.modules() if isinstance(layer, AlignTextSelfAttention)]
    assert [layer.is_causal for layer in layers] == [False, False]
    assert first_hears_the_last()
    for layer in layers:
        layer.is_causal = True
    assert not first_hears_the_last()  # so the check above does see a causal layer


@pytest.mark.parametrize("shape", [(9, 9), (3, 5), (1, 1)])
def test_pooling_repair_equals_average_pooling(shape):
    model = small()
    stock = stock_of(model)
    assert isinstance(stock.vision_model.pooler, nn.AvgPool2d)
    x = torch.randn(2, 32, *shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    ours, theirs = model.vision_model.pooler(x), stock.vision_model.pooler(x)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    upstream = torch.arange(64.0).view(2, 32, 1, 1)
    gradients = [torch.autograd.grad((y * upstream).sum(), x)[0] for y in (ours, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=0)


def test_text_pooler_repair_leaves_no_parameter_without_a_gradient():
    model = small().train()
    loss_of(model, drawn_pixels(8), *drawn_text([3, 7, 5, 8, 2, 4, 6, 9])).backward()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"text_model.pooler.dense.weight", "text_model.pooler.dense.bias"}
    assert {name for name, p in model.named_parameters() if p.grad is None} == frozen
    silent = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.any()]
    assert silent == []


def test_checkpointing_repair_changes_no_number():
    outcomes = []
    for checkpointing in (False, True):
        model = small(
            vision={"stochastic_depth": 0.5}, text={"dropout": 0.1}, gradient_checkpointing=checkpointing
        ).train()
        forwards = []
        for part in (model.vision_model.encoder.blocks[3].depthwise_conv, model.text_model.encoder.layer[1].attention):
            part.register_forward_hook(lambda *_, seen=forwards: seen.append(1))
        torch.manual_seed(5)
        loss = loss_of(model, drawn_pixels(8), *drawn_text([3, 7, 5, 8, 2, 4, 6, 9]))
        loss.backward()
        assert len(forwards) == (4 if checkpointing else 2)  # each part is computed again in the backward pass
        gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.requires_grad}
        outcomes.append({"loss": loss.detach(), **gradients, **model.state_dict()})
    plain, recomputed = outcomes
    assert plain.keys() == recomputed.keys()
    assert [name for name in plain if not torch.equal(plain[name], recomputed[name])] == []
    assert plain["vision_model.embeddings.batchnorm.num_batches_tracked"] == 1


# Building


def test_the_temperature_stays_within_its_bounds():
    model = small(temperature={"start": 0.5, "lower": 0.02, "upper": 4.0})
    optimizer = torch.optim.SGD([model.temperature], lr=1.0)
    for gradient, expected in ((10.0, 0.02), (-10.0, 4.0), (1.0, 3.0)):
        model.temperature.grad = torch.tensor(gradient)
        optimizer.step()
        model.clamp_temperature()
        assert model.temperature.item() == pytest.approx(expected)
    assert isinstance(model.temperature, nn.Parameter)


def test_the_temperature_is_loaded_raw():
    model = small()
    assert model.temperature.item() == 1.0
    state = stock_of(model).state_dict()
    state["temperature"] = torch.tensor(0.0153)
    model.load_state_dict(state)
    assert torch.equal(model.temperature.detach(), state["temperature"])
    state["temperature"] = torch.tensor(42.0)  # out of bounds: a foreign checkpoint is not falsified by loading it
    model.load_state_dict(state)
    assert model.temperature.item() == 42.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projection_dim": 640}, r"tower is 32 wide \(320 x width 0.1\), but model.projection_dim is 640.*=32"),
        ({"vision": {"widht": 1}}, "unknown key model.vision.widht; known are channels_last, depth, stochastic_depth"),
        ({"text": {"layer": 1}}, "unknown key model.text.layer; known are "),
        ({"batch_norm": {"groups": 1}}, "unknown key model.batch_norm.groups; known are group_size, momentum"),
        ({"temperature": {"min": 1}}, "unknown key model.temperature.min; known are lower, start, upper"),
        ({"preprocessing": {"size": 1}}, "unknown key model.preprocessing.size; known are antialias, crop"),
        ({"text": {"width": 30, "heads": 4}}, "width 30 is not a multiple of model.text.heads 4"),
        ({"preprocessing": {"max_tokens": 65}}, "max_tokens is 65, but the text tower has model.text.positions=64"),
        ({"text": {"positions": 16}}, "model.text.positions is 16; transformers' AlignProcessor pads to 64"),
        ({"text": {"initialisation": "large"}}, "initialisation is 'large'; it must be bert or small"),
        ({"temperature": {"start": 20.0}}, "starts at 20.0, outside its bounds 0.01 to 10.0"),
        ({"temperature": {"lower": 0.0}}, "outside its bounds 0.0 to 10.0"),
        ({"preprocessing": {"crop": 50}}, "crop is 50 pixels, but the image is resized to 40"),
        ({"preprocessing": {"max_tokens": 2}}, "max_tokens is 2"),
        ({"batch_norm": {"statistics": "ghost"}}, "statistics is 'ghost'"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_a_wrong_value_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_a_missing_key_is_named():
    nodes = recipe()
    del nodes["text"]["heads"]
    with pytest.raises(ValueError, match=r"model\.text: .*heads"):
        build_align(**nodes)


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"no model preset 'align_b8'; there are align_b1_mini, .*align_tiny"):
        build("align_b8")


@pytest.mark.parametrize(
    ("width", "expected"), [(0.1, 32), (1.0, 320), (1.1, 352), (1.4, 448), (2.0, 640), (4.3, 1376)]
)
def test_width_of_the_vision_tower(width, expected):
    assert vision_width(width) == expected


# Start values


def expected_std(layer: nn.Conv2d) -> float:
    """Keras's sqrt(2 / fan_out); a depthwise kernel (k, k, C, 1) counts one output."""
    outputs = 1 if layer.groups == layer.in_channels and layer.groups > 1 else layer.out_channels
    return math.sqrt(2 / (layer.kernel_size[0] * layer.kernel_size[1] * outputs))


def test_keras_initialisation_has_b7s_standard_deviations():
    class Tower(nn.Module):
        """One layer of each kind, in B7's sizes: the first expansion, the last projection."""

        def __init__(self) -> None:
            super().__init__()
            self.vision_model = nn.ModuleList(
                [
                    nn.Conv2d(3, 64, 3, bias=False),
                    nn.Conv2d(3840, 3840, 3, groups=3840, bias=False),
                    nn.Conv2d(32, 192, 1, bias=False),
                    nn.Conv2d(3840, 640, 1),
                ]
            )

    tower = Tower()
    torch.manual_seed(0)
    initialise_vision(tower)
    for layer, published in zip(tower.vision_model, (0.059, 0.471, 0.102, 0.056), strict=True):
        weight = layer.weight.detach()
        assert expected_std(layer) == pytest.approx(published, abs=5e-4)
        # a sample's standard deviation is off by 1 / sqrt(2 n) of it
        assert weight.std().item() == pytest.approx(expected_std(layer), rel=4 / math.sqrt(2 * weight.numel()))
        cut = 2 * expected_std(layer) / 0.87962566
        assert 0.95 * cut < weight.abs().max() <= cut * (1 + 1e-6)
    assert not tower.vision_model[-1].bias.any()


def test_a_built_tower_has_kerass_start_values():
    model = small(vision={"width": 0.3}, projection_dim=96)
    layers = [layer for layer in model.vision_model.modules() if isinstance(layer, nn.Conv2d)]
    assert len(layers) == 80  # 16 blocks of 5, less the first one's expansion, and the stem
    unit = torch.cat([layer.weight.detach().flatten() / expected_std(layer) for layer in layers])
    assert unit.std().item() == pytest.approx(1, abs=0.01)
    assert unit.abs().max().item() <= 2 / 0.87962566 * (1 + 1e-6)
    assert not any(layer.bias.any() for layer in layers if layer.bias is not None)


def test_golden_start_values_have_the_same_spread(large_golden):
    model = small(vision={"width": 1.0}, projection_dim=320)
    layers = [layer for layer in model.vision_model.modules() if isinstance(layer, nn.Conv2d)]
    with np.load(large_golden / "b0_weights.npz") as arrays:
        names = [n for n in arrays["names"] if n.endswith("kernel:0") and not n.startswith("dense")]
        kernels = [arrays[f"init|{name}"] for name in names]
    assert len(kernels) == len(layers)
    for name, kernel, layer in zip(names, kernels, layers, strict=True):
        tolerance = 5 / math.sqrt(kernel.size)  # two samples
        assert kernel.size == layer.weight.numel(), name
        assert kernel.std() == pytest.approx(layer.weight.std().item(), rel=tolerance), name
        assert np.abs(kernel).max() <= 2 * expected_std(layer) / 0.87962566 * (1 + 1e-6), name


def test_small_text_tells_captions_apart():
    input_ids, mask = drawn_text([7, 5, 6, 8, 4, 9, 3, 10])

    def cosine(model: Align) -> float:
        """Mean cosine between the [CLS] states of different captions."""
        with torch.no_grad():
            states = F.normalize(model.eval().text_model(input_ids, mask).last_hidden_state[:, 0])
        return ((states @ states.T).sum().item() - 8) / 56

    assert cosine(small(text={"initialisation": "small"})) < 0.4
    assert cosine(small(text={"initialisation": "bert"})) > 0.6


@pytest.mark.parametrize("training", [True, False])
def test_centring_takes_away_what_all_captions_share(training):
    model = small(text={"initialisation": "small", "dropout": 0.1}).train(training)
    input_ids, mask = drawn_text([7, 5, 6, 8])
    centre_text(model, [(input_ids, mask)])
    assert model.training is training
    with torch.no_grad():
        projected = model.eval().get_text_features(input_ids, mask).pooler_output
    assert projected.norm(dim=1).min() > 0.1
    torch.testing.assert_close(projected.mean(0), torch.zeros(32), atol=1e-6, rtol=0)
