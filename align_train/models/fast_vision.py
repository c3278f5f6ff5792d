"""Two parts of the image tower with the same values and faster gradients: one named repair each, as in repairs.py.

Shapes: B images, C channels, H x W pixels, k x k kernels; memory is channels_last.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AlignModel
from transformers.models.align.modeling_align import AlignVisionDepthwiseConv2d, AlignVisionSqueezeExciteLayer

FAST = 3  # side of the largest kernel whose gradient is fast


def repair_depthwise_gradient(model: AlignModel) -> None:
    """Compute the gradients of the depthwise convolutions by fast kernels, where they are bf16 and on a CPU.

    oneDNN has such for the gradient of the input at stride 1, and for that of 3 x 3 weights. What it falls back to for
    the others, stride 2 and 5 x 5, is 4 to 15 times slower and was half of a training step.
    """
    for layer in model.modules():
        if isinstance(layer, AlignVisionDepthwiseConv2d):
            layer.__class__ = _DepthwiseConv2d


def repair_squeeze(model: AlignModel) -> None:
    """Give squeeze-and-excite's mean a gradient that is added in one pass over memory.

    PyTorch writes it out for every pixel first, in NCHW memory, and adds that to the NHWC gradient of the product.
    """
    for layer in model.modules():
        if isinstance(layer, AlignVisionSqueezeExciteLayer):
            layer.__class__ = _SqueezeExcite


class _SqueezeExcite(AlignVisionSqueezeExciteLayer):
    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # which fuses what is written out here
            return super().forward(x)
        x, mean = _WithMean.apply(x)
        gate = self.act_expand(self.expand(self.act_reduce(self.reduce(mean))))
        return x * gate


class _WithMean(torch.autograd.Function):
    """(B, C, H, W) to itself and its mean (B, C, 1, 1)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.pixels = x.shape[2] * x.shape[3]
        return x.view_as(x), x.mean((2, 3), keepdim=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_mean: Tensor) -> Tensor:
        return grad + grad_mean / ctx.pixels


class _DepthwiseConv2d(AlignVisionDepthwiseConv2d):
    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.dtype != torch.bfloat16 or torch.compiler.is_compiling():
            return super().forward(x)
        padding = self.kernel_size[0] // 2 if self.padding == "same" else 0
        y: Tensor = _Depthwise.apply(x, self.weight, self.stride[0], padding)
        return y


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        low = weight.to(x.dtype)
        ctx.save_for_backward(x, low)
        ctx.stride, ctx.padding, ctx.of_weight = stride, padding, (weight.shape, weight.stride(), weight.dtype)
        return F.conv2d(x, low, None, stride, padding, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x = input_gradient(grad, x, weight, ctx.stride, ctx.padding) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None, None
        grad_weight = weight_gradient(grad, x, weight, ctx.stride, ctx.padding)
        shape, strides, dtype = ctx.of_weight  # DDP expects a gradient that lies in memory as the weight does
        return grad_x, grad_weight.new_empty_strided(shape, strides, dtype=dtype).copy_(grad_weight), None, None


def input_gradient(grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """Gradient of x (B, C, H, W) from that of the output, in the type of x; in float32 where the stride is not 1."""
    if stride == 1:
        return _convolution_backward(grad, x, weight, stride, padding, of_weight=False)
    grad, wide, weight = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (grad, x, weight))
    return _convolution_backward(grad, wide, weight, stride, padding, of_weight=False).to(x.dtype)


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """Gradient of the weight (C, 1, k, k): part by part, each that of a 3 x 3 kernel on a shifted window of x."""
    size = weight.shape[-1]
    if size <= FAST:
        return _convolution_backward(grad, x, weight, stride, padding, of_weight=True)
    whole = -(-size // FAST) * FAST
    far = padding + whole - size
    padded = F.pad(x, (padding, far, padding, far))
    height, width = ((n - 1) * stride + FAST for n in grad.shape[2:])
    found = weight.new_empty(len(weight), 1, whole, whole)
    part = weight.new_empty(len(weight), 1, FAST, FAST)
    for i in range(0, whole, FAST):
        for j in range(0, whole, FAST):
            window = padded[:, :, i : i + height, j : j + width].contiguous(memory_format=torch.channels_last)
            found[:, :, i : i + FAST, j : j + FAST] = _convolution_backward(grad, window, part, stride, 0, True)
    return found[:, :, :size, :size]


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, of_weight: bool
) -> Tensor:
    sides, mask = [[n, n] for n in (stride, padding, 1, 0)], [not of_weight, of_weight, False]
    found = torch.ops.aten.convolution_backward(
        grad, x, weight, None, *sides[:3], False, sides[3], len(weight), mask
    )  # fmt: skip
    return found[of_weight]
