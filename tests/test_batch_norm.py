"""Batch norm over virtual batches against the reference's numbers, and its three variants against each other."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from align_train.models import GhostBatchNorm2d, recalibrate
from align_train.models.batch_norm import CrossRankBatchNorm2d, FrozenBatchNorm2d, hold_statistics

LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
KINDS = pytest.mark.parametrize("kind", [GhostBatchNorm2d, CrossRankBatchNorm2d, FrozenBatchNorm2d])
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.fixture(scope="module")
def numbers(golden: Path) -> dict[str, Tensor]:
    """golden/bn.npz in PyTorch's order of dimensions."""
    with np.load(golden / "bn.npz") as arrays:
        found = {name: torch.from_numpy(arrays[name]) for name in arrays.files if arrays[name].ndim}
    return {name: x.permute(0, 3, 1, 2).contiguous() if x.ndim == 4 else x for name, x in found.items()}


def close(actual: Tensor, expected: Tensor, atol: float, rtol: float = 0) -> None:
    torch.testing.assert_close(actual, expected.to(actual.dtype), atol=atol, rtol=rtol)


def drawn(*shape: int, seed: int = 0, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    """Images in float64 whose channels differ in mean and scale."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    channel = torch.arange(1, shape[1] + 1)[:, None, None]
    return (x * channel / 2 - channel).contiguous(memory_format=layout)


def like(layer: nn.BatchNorm2d, kind: Callable[..., nn.BatchNorm2d], *args: object) -> nn.BatchNorm2d:
    """Another kind of layer with the weights and statistics of this one."""
    other = kind(layer.num_features, *args, eps=layer.eps, momentum=layer.momentum).to(layer.weight.dtype)
    other.load_state_dict(layer.state_dict())
    return other


def uneven(layer: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """The layer in float64, its weights and statistics not the initial ones, so that a missing one shows."""
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for x in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
            x.copy_(torch.rand(x.shape, generator=random) + 0.5)
    return layer.double()


def run(layer: nn.BatchNorm2d, x: Tensor) -> dict[str, Tensor]:
    """What a training step sees of a layer: output, gradients, statistics."""
    x = x.detach().clone().requires_grad_()
    y = layer.train()(x)
    (y * drawn(*y.shape, seed=3).to(y.dtype)).sum().backward()
    found = {"y": y.detach(), "x": x.grad, "weight": layer.weight.grad, "bias": layer.bias.grad}
    return found | {name: getattr(layer, name).clone() for name in STATISTICS}


def equal(one: dict[str, Tensor], other: dict[str, Tensor], atol: float) -> None:
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_golden(numbers, layout, dtype):
    layer = GhostBatchNorm2d(4).to(dtype)
    with torch.no_grad():
        for name, key in {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean0"}.items():
            getattr(layer, name).copy_(numbers[key])
        layer.running_var.copy_(numbers["moving_var0"])
    x = numbers["x"].to(dtype).contiguous(memory_format=layout).clone().detach().requires_grad_()
    # Reached: 2e-6 for an output, 8e-8 for the statistics, 4e-7 for the gradient of x, 1e-5 for those that are sums.
    close(layer.eval()(x), numbers["y_eval"], atol=6e-6)
    y = layer.train()(x)
    close(y, numbers["y_train"], atol=3e-6)
    close(layer.running_mean, numbers["moving_mean1"], atol=3e-7)
    close(layer.running_var, numbers["moving_var1"], atol=3e-7)
    (y * numbers["upstream"].to(dtype)).sum().backward()
    close(x.grad, numbers["grad_x"], atol=1e-6)
    close(layer.weight.grad, numbers["grad_gamma"], atol=3e-5)
    close(layer.bias.grad, numbers["grad_beta"], atol=3e-5)


@LAYOUTS
@pytest.mark.parametrize("size", [2, 3, 6])
def test_every_group_is_a_batch_of_its_own(layout, size):
    x = drawn(6, 3, 4, 5, layout=layout)
    layer = uneven(GhostBatchNorm2d(3, size, momentum=0.25))
    groups = 6 // size
    start = layer.running_var.clone()
    leaf = x.clone().requires_grad_()
    y = torch.empty_like(x)
    means, variances = [], []
    weight, bias = (p.detach().clone()[:, None, None].requires_grad_() for p in (layer.weight, layer.bias))
    for g in range(groups):
        part = leaf[g::groups]
        mean, variance = part.mean((0, 2, 3)), part.var((0, 2, 3), correction=0)
        means.append(mean.detach())
        variances.append(variance.detach())
        y[g::groups] = (part - mean[:, None, None]) / (variance + 1e-3).sqrt()[:, None, None] * weight + bias
    (y * drawn(*y.shape, seed=3)).sum().backward()
    found = run(layer, x)
    close(found["y"], y, atol=1e-12)
    close(found["x"], leaf.grad, atol=1e-12)
    close(found["weight"], weight.grad.flatten(), atol=1e-12)
    close(found["bias"], bias.grad.flatten(), atol=1e-12)
    close(found["running_var"], 0.75 * start + 0.25 * sum(variances) / groups, atol=1e-12)
    assert found["num_batches_tracked"] == 1


@LAYOUTS
def test_no_group_size_is_one_group(layout):
    x = drawn(6, 3, 4, 5, layout=layout)
    whole = uneven(GhostBatchNorm2d(3, None, momentum=0.25))
    one_group, torchs_own = like(whole, GhostBatchNorm2d, 6), like(whole, nn.BatchNorm2d)
    found, own = run(whole, x), run(torchs_own, x)
    equal(found, run(one_group, x), atol=0)
    # torch keeps the unbiased variance, n / (n - 1) times ours
    before = uneven(GhostBatchNorm2d(3)).running_var
    close((own.pop("running_var") - 0.75 * before) * 119 / 120, found.pop("running_var") - 0.75 * before, atol=1e-12)
    equal(found, own, atol=1e-12)


@LAYOUTS
@KINDS
def test_the_memory_format_is_kept(layout, kind):
    x = drawn(32, 3, 4, 5, layout=layout).requires_grad_()
    layer = uneven(kind(3))
    for mode in (True, False):
        y = layer.train(mode)(x)
        assert y.is_contiguous(memory_format=layout)
        assert torch.autograd.grad(y.square().sum(), x)[0].is_contiguous(memory_format=layout)


def test_a_batch_that_is_no_multiple_is_refused_in_training_only():
    layer, x = GhostBatchNorm2d(3, 4), torch.randn(10, 3, 2, 2)
    with pytest.raises(ValueError, match=r"a batch of 10 images cannot be cut into virtual batches of 4: .*group_size"):
        layer(x)
    assert layer.num_batches_tracked == 0
    assert layer.eval()(x).shape == x.shape
    with pytest.raises(ValueError, match="group_size is 0"):
        GhostBatchNorm2d(3, 0)


@LAYOUTS
def test_cross_rank_in_one_process_is_the_whole_batch(layout):
    x = drawn(6, 3, 4, 5, layout=layout)
    whole = uneven(GhostBatchNorm2d(3, None))
    cross = like(whole, CrossRankBatchNorm2d)
    equal(run(whole, x), run(cross, x), atol=1e-12)
    close(cross.eval()(x), whole.eval()(x), atol=0)


@LAYOUTS
def test_frozen_uses_its_statistics_and_never_moves_them(layout):
    x = drawn(6, 3, 4, 5, layout=layout)
    frozen = uneven(FrozenBatchNorm2d(3))
    before = {name: x.clone() for name, x in frozen.state_dict().items()}
    found = run(frozen, x)
    close(found["y"], like(frozen, nn.BatchNorm2d).eval()(x), atol=0)
    assert found["weight"].abs().min() > 0
    for name in STATISTICS:
        assert torch.equal(found[name], before[name])


@pytest.mark.parametrize("kind", [GhostBatchNorm2d, CrossRankBatchNorm2d])
def test_hold_statistics(kind):
    layer, x = uneven(kind(3)), drawn(16, 3, 4, 5)
    moving = [layer.running_mean, layer.running_var, layer.num_batches_tracked]
    before = [s.clone() for s in moving]
    with hold_statistics():
        with hold_statistics():
            held = layer(x)
        layer(x)
    assert all(torch.equal(s, b) for s, b in zip(moving, before, strict=True))
    with pytest.raises(RuntimeError), hold_statistics():
        raise RuntimeError
    assert torch.equal(layer(x), held)
    assert not any(torch.equal(s, b) for s, b in zip(moving, before, strict=True))


class Stack(nn.Module):
    """Two layers, so that the second one sees what the first one makes; and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = uneven(GhostBatchNorm2d(3, 2, momentum=0.3)), uneven(GhostBatchNorm2d(3, 4))
        self.frozen = uneven(FrozenBatchNorm2d(3))

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.second(self.first(self.frozen(pixels)).relu())


@pytest.mark.parametrize("training", [True, False])
def test_recalibration_is_the_plain_mean_over_batches(training):
    model = Stack().train(training)
    for layer in (model.first, model.second):
        layer.num_batches_tracked.fill_(5)  # as if it had been trained
    before = {name: x.clone() for name, x in model.state_dict().items()}
    batches = [drawn(4, 3, 5, 5, seed=seed) for seed in range(3)]
    single = []
    for pixels in batches:
        alone = Stack()
        for layer in (alone.first, alone.second):
            layer.momentum = 1.0
        alone.encode_image(pixels)
        single.append(alone.state_dict())
    assert recalibrate(model, iter(batches)) == 3
    after = model.state_dict()
    for name in after:
        layer, _, part = name.partition(".")
        if part not in STATISTICS or layer == "frozen":
            assert torch.equal(after[name], before[name]), name
        elif part != "num_batches_tracked":
            close(after[name], sum(s[name] for s in single) / 3, atol=1e-12)
    assert [model.first.momentum, model.second.momentum] == [0.3, 0.01]
    assert all(layer.training is training for layer in model.modules())


def test_recalibration_that_fails_leaves_momentum_and_mode():
    model = Stack().eval()
    with pytest.raises(ValueError, match="a batch of 3 images"):
        recalibrate(model, [drawn(4, 3, 5, 5), drawn(3, 3, 5, 5)])
    assert [model.first.momentum, model.second.momentum] == [0.3, 0.01]
    assert not any(layer.training for layer in model.modules())


@KINDS
def test_state_dict_keys_are_torchs_own(kind):
    ours, theirs = kind(3).state_dict(), nn.BatchNorm2d(3).state_dict()
    assert list(ours) == list(theirs)
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype
        assert torch.equal(ours[name], theirs[name])


@LAYOUTS
@KINDS
def test_autocast_keeps_the_statistics_in_float32(layout, kind):
    x = drawn(16, 3, 4, 5).float()
    plain = uneven(kind(3)).float()
    cast = like(plain, kind)
    expected = run(plain, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(cast, x.bfloat16().contiguous(memory_format=layout))
    assert found["y"].dtype == torch.bfloat16
    assert found["running_mean"].dtype == found["running_var"].dtype == torch.float32
    assert found["weight"].dtype == torch.float32
    # bf16 has 8 bits, so a value of about 3 is off by up to 3 / 512; sums of 320 such by more
    close(found["y"].float(), expected["y"], atol=0.05)
    close(found["running_mean"], expected["running_mean"], atol=3e-5)
    close(found["running_var"], expected["running_var"], atol=3e-5)
    close(found["weight"], expected["weight"], atol=0.5)
    if kind is not FrozenBatchNorm2d:
        assert found["num_batches_tracked"] == 1
