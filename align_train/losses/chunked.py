"""The loss in chunks of rows: the same number and gradients as the plain one, without a B x B matrix.

A chunk has its rows' logits against all columns at hand, so their softmax, and with it the gradient, is known at once.
The forward pass therefore computes the gradients too (three matrix products a direction, as the plain loss needs) and
the backward pass only scales them. Held: chunk_size x B logits, overwritten in place, and one gradient of (B, D) for
images and one for texts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from align_train.losses.duplicates import duplicates


@dataclass(frozen=True)
class Share:
    """Rows first to first + count of the global batch, and how their loss is computed; see `share_of_loss`."""

    first: int
    count: int
    label_smoothing: float
    ids: Tensor | None
    chunk_size: int

    def chunks(self) -> Iterator[slice]:
        """The rows, at most chunk_size at a time."""
        end = self.first + self.count
        for start in range(self.first, end, self.chunk_size):
            yield slice(start, min(start + self.chunk_size, end))


def chunked_share_of_loss(images: Tensor, texts: Tensor, temperature: Tensor, share: Share) -> Tensor:
    """`share_of_loss` for arguments that were checked: (B, D), (B, D) and a scalar of one dtype; autocast is off."""
    if not torch.is_grad_enabled():  # autograd.Function is not told, and would work for gradients nobody takes
        images, texts, temperature = images.detach(), texts.detach(), temperature.detach()
    loss: Tensor = _ShareOfLoss.apply(images, texts, temperature, share)
    return loss


class _ShareOfLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, texts: Tensor, temperature: Tensor, share: Share) -> Tensor:
        inputs = zip((images, texts, temperature), ctx.needs_input_grad[:3], strict=True)
        ctx.gradients = d_images, d_texts, d_temperature = [torch.zeros_like(x) if need else None for x, need in inputs]
        ctx.count = share.count
        image_to_text = _one_direction(images, texts, temperature, share, (d_images, d_texts, d_temperature))
        text_to_image = _one_direction(texts, images, temperature, share, (d_texts, d_images, d_temperature))
        return (image_to_text + text_to_image) / share.count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "the chunked loss hands its gradients on in the first backward and keeps no copy: compute the loss "
                "again for a second one, or use chunk_size=None with retain_graph=True"
            )
        gradients, ctx.gradients = ctx.gradients, None
        scale = upstream / ctx.count
        return *(None if gradient is None else gradient.mul_(scale) for gradient in gradients), None


def _one_direction(
    rows: Tensor, columns: Tensor, temperature: Tensor, share: Share, gradients: tuple[Tensor | None, ...]
) -> Tensor:
    """Sum of the rows' losses; its gradients are added to those of rows, columns and temperature that are not None."""
    d_rows, d_columns, d_temperature = gradients
    buffer = columns.new_empty(min(share.chunk_size, share.count), len(columns))
    total = columns.new_zeros(())
    for own in share.chunks():
        scaled = rows[own] / temperature
        logits, out, kept = buffer[: len(scaled)], None, torch.full_like(scaled[:, :1], len(columns))
        if share.ids is not None:
            out = duplicates(share.ids, own)
            kept -= logits.copy_(out).sum(1, keepdim=True)  # the sum of a bool tensor makes an int64 copy of it
        torch.mm(scaled, columns.T, out=logits)
        total += _losses(logits, own, share.label_smoothing, out, kept).sum()
        if d_columns is not None:
            d_columns.addmm_(logits.T, scaled)
        if d_rows is None and d_temperature is None:
            continue
        d_own = logits @ columns / temperature
        if d_rows is not None:
            d_rows[own] += d_own
        if d_temperature is not None:  # d logit / d temperature = - logit / temperature, summed over a row's columns
            d_temperature -= (scaled * d_own).sum()
    return total


def _losses(logits: Tensor, own: slice, label_smoothing: float, out: Tensor | None, kept: Tensor) -> Tensor:
    """The losses (n,) of a chunk of rows; logits (n, B) are overwritten by the losses' gradient to them.

    With n_i (`kept`) the columns of row i that are not `out`, t its own column's logit and m the mean of those n_i:

        loss = logsumexp - (1 - label_smoothing) t - label_smoothing m
        gradient = softmax - label_smoothing / n_i, and 1 - label_smoothing less at its own column; 0 where `out`
    """
    if out is not None:
        logits.masked_fill_(out, 0)
    mean = logits.sum(1, keepdim=True) / kept
    if out is not None:
        logits.masked_fill_(out, -torch.inf)
    diagonal = logits[:, own].diagonal()
    target, top = diagonal[:, None].clone(), logits.amax(1, keepdim=True)
    weights = logits.sub_(top).exp_().sum(1, keepdim=True)
    # relative to the row's largest logit, so that large numbers do not cancel
    losses = weights.log() - (1 - label_smoothing) * (target - top) - label_smoothing * (mean - top)
    logits.div_(weights).sub_(label_smoothing / kept)
    if out is not None:
        logits.masked_fill_(out, 0)
    diagonal -= 1 - label_smoothing
    return losses.squeeze(1)
