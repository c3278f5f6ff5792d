"""The image tower's faster gradients against PyTorch's own, and memory that malloc keeps."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import small_text
from test_models import small
from torch import Tensor, nn
from transformers.models.align.modeling_align import AlignVisionDepthwiseConv2d, AlignVisionSqueezeExciteLayer

from align_train.engine import host_memory
from align_train.models import Align
from align_train.models.fast_vision import (
    input_gradient,
    repair_depthwise_gradient,
    repair_squeeze,
    weight_gradient,
)

LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
KERNELS = pytest.mark.parametrize(
    ("size", "stride", "height", "width"),
    [(3, 1, 7, 6), (3, 2, 9, 12), (5, 1, 9, 8), (5, 1, 1, 2), (5, 2, 11, 10), (5, 2, 5, 6), (7, 1, 8, 9)],
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.contiguous(memory_format=torch.channels_last)


def tower() -> Align:
    """A model whose two parts are transformers' own again."""
    model = small(
        vision={"width": 0.2, "depth": 0.5},
        text=small_text(layers=1),
        batch_norm={"group_size": 2},
        preprocessing={"resize": 80, "crop": 65, "max_tokens": 64},
        projection_dim=64,
    )
    for layer in model.modules():
        for stock in (AlignVisionDepthwiseConv2d, AlignVisionSqueezeExciteLayer):
            if isinstance(layer, stock):
                layer.__class__ = stock
    return model


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@KERNELS
def test_depthwise_gradients_are_pytorchs_in_float64(size, stride, height, width):
    padding = size // 2 if stride == 1 else 0
    x, weight = drawn(2, 3, height, width).requires_grad_(), drawn(3, 1, size, size, seed=1).requires_grad_()
    y = F.conv2d(x, weight, None, stride, padding, groups=3)
    grad = drawn(*y.shape, seed=2)
    y.backward(grad)
    of_x, of_weight = (f(grad, x.detach(), weight.detach(), stride, padding) for f in (input_gradient, weight_gradient))
    torch.testing.assert_close(of_x, x.grad, atol=1e-10, rtol=0)
    torch.testing.assert_close(of_weight, weight.grad, atol=1e-10, rtol=0)


@LAYOUTS
@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_a_depthwise_layer_in_bf16(layout, size, stride):
    plain = AlignVisionDepthwiseConv2d(
        8, kernel_size=size, stride=stride, padding="same" if stride == 1 else "valid", bias=False
    )
    plain.weight.data = drawn(8, 1, size, size, seed=1).bfloat16().float()  # so that autocast rounds nothing
    ours = copy.deepcopy(plain)
    repair_depthwise_gradient(ours)
    x = drawn(4, 8, 13, 12).bfloat16().contiguous(memory_format=layout).requires_grad_()
    wide = x.detach().float().requires_grad_()
    expected = plain(wide)
    upstream = drawn(*expected.shape, seed=2).bfloat16()
    expected.backward(upstream.float())
    with torch.autocast("cpu", torch.bfloat16):
        y, native = ours(x), plain(x)
    y.backward(upstream)
    assert type(y.grad_fn).__name__ == "_DepthwiseBackward"
    assert ours.weight.grad.stride() == ours.weight.stride()  # or DDP warns
    assert torch.equal(y, native)
    # bf16 has 8 bits: half a unit of the largest value
    for found, value in ((x.grad, wide.grad), (ours.weight.grad, plain.weight.grad)):
        assert (found.float() - value).abs().max() < value.abs().max() / 200


def test_a_depthwise_layer_in_float32_is_pytorchs_own():
    plain = AlignVisionDepthwiseConv2d(8, kernel_size=5, padding="same", bias=False)
    ours = copy.deepcopy(plain)
    repair_depthwise_gradient(ours)
    assert type(ours(drawn(2, 8, 6, 6).float()).grad_fn).__name__ == "ConvolutionBackward0"


@LAYOUTS
def test_squeeze_and_excite_is_the_same_in_float64(layout):
    plain = tower().double().vision_model.encoder.blocks[1].squeeze_excite
    assert type(plain) is AlignVisionSqueezeExciteLayer
    ours = copy.deepcopy(plain)
    repair_squeeze(ours)
    results = []
    for layer in (plain, ours):
        x = drawn(3, plain.dim, 5, 7).contiguous(memory_format=layout).clone().requires_grad_()
        y = layer(x)
        found = gradients(layer, (y * drawn(*y.shape, seed=1)).sum())
        assert y.is_contiguous(memory_format=layout)
        results.append({"y": y.detach(), "x": x.grad, **found})
    assert results[1]["x"].is_contiguous(memory_format=layout)
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, atol=1e-12, rtol=0, msg=name)


def test_the_whole_tower_trains_the_same():
    plain = tower()
    ours = copy.deepcopy(plain)
    repair_depthwise_gradient(ours)
    repair_squeeze(ours)
    assert list(ours.state_dict()) == list(plain.state_dict())
    pixels = torch.randint(256, (4, 3, 65, 65), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    upstream = drawn(4, 64, 1, 1).flatten(1).float()
    for autocast, bound in ((False, 1e-4), (True, 0.1)):
        found = []
        for model in (plain, ours):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                image = model.train().encode_image(pixels)
            found.append(gradients(model, (image * upstream).sum()))
        for name, value in found[0].items():
            if value.norm() > 0.1:  # less is rounding, in front of another batch norm
                assert (found[1][name] - value).norm() < bound * value.norm(), (name, autocast)


FAULTS = """
import resource, runpy, sys
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(64 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
assert runpy.run_path(sys.argv[1])["keep_freed_memory"]()
faults()
print(faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is glibc's")
def test_freed_memory_is_kept():
    command = [sys.executable, "-c", FAULTS, host_memory.__file__]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    assert int(done.stdout) < 100  # 16,384 pages of 4 KiB where it is not


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: object())
    assert host_memory.keep_freed_memory() is False
