"""What training needs of a device's memory, estimated on shapes alone, without allocating anything."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from align_train.models.align import Align
from align_train.models.batch_norm import CrossRankBatchNorm2d, GhostBatchNorm2d
from align_train.models.cost import hollow_copy, image_features, text_features

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}  # every other precision computes in the weights'
FLOAT = 4  # bytes of a number of the loss, which is computed in float32


@dataclass(frozen=True)
class Memory:
    """Bytes that a rank holds in training: estimates, of captions that all have the most tokens the model takes.

    Attributes:
        weights: parameters and buffers.
        trained: the parameters of these that are trained.
        fixed: kept from the forward to the backward pass whatever the number of pairs, such as weights cast to bf16.
        pair: kept for each pair; with gradient checkpointing the inputs of all blocks and the inside of the largest.
        pixels: of one image as it comes, uint8.
        width: columns D of an embedding.
    """

    weights: float
    trained: float
    fixed: float
    pair: float
    pixels: float
    width: int

    def of(self, micro: int, local: int, batch: int, rows: int | None = None, shards: int = 1) -> float:
        """Of a rank that takes `local` of `batch` pairs, `micro` of them at once.

        Weights, gradients (twice under DDP, in buckets for the exchange), two moments, a micro-batch's activations,
        its pixels, and the loss: both embeddings of all pairs, and the logits of `rows` rows at once, None for all,
        each with its gradients. With `shards` above 1, weights, gradients and moments are dealt out over so many
        ranks, and a backward pass gathers all weights at worst.
        """
        gradients = self.trained * (2 if batch > local else 1)
        logits = (4 * local if rows is None else min(rows, local)) * batch * FLOAT  # two directions, kept and gradients
        embeddings = 4 * batch * self.width * FLOAT
        state = self.weights + gradients + 2 * self.trained
        if shards > 1:
            state = self.weights + (self.weights + 3 * self.trained) / shards
        return state + self.fixed + micro * (self.pair + self.pixels) + embeddings + logits


def memory_of(model: Align, precision: str = "32-true") -> Memory:
    """Estimate what a model needs in one of Lightning's precisions; its weights are not touched.

    Counted are the tensors that autograd keeps of one virtual batch and of two, without their content, as on a CPU: a
    compiled model may need less. Batches that wait for their turn, and CUDA's own memory, are not part of it.
    """
    size = virtual_batch(model) or 2  # a batch norm needs more than one value
    with FakeTensorMode():
        hollow = _alone(hollow_copy(model, "cpu")).train()
        with torch.autocast("cpu", AUTOCAST.get(precision, torch.bfloat16), enabled=precision in AUTOCAST):
            one, two = (_kept(hollow, size * times) for times in (1, 2))
    return Memory(
        weights=sum(map(_bytes, (*model.parameters(), *model.buffers()))),
        trained=sum(_bytes(weight) for weight in model.parameters() if weight.requires_grad),
        fixed=max(2 * one - two, 0.0),
        pair=(two - one) / size,
        pixels=3.0 * model.preprocessing.crop**2,
        width=model.config.projection_dim,
    )


def virtual_batch(model: Align) -> int | None:
    """Images of a virtual batch, where batch norm has these."""
    sizes = (layer.group_size for layer in model.modules() if isinstance(layer, GhostBatchNorm2d))
    return next((size for size in sizes if size), None)


def _alone(model: Align) -> Align:
    """The same, with batch norms that ask no other rank: there is nothing to tell."""
    for layer in model.modules():
        if isinstance(layer, CrossRankBatchNorm2d):
            layer.__class__ = GhostBatchNorm2d  # type: ignore[assignment]
    return model


def _kept(model: Align, pairs: int) -> float:
    """Bytes kept for the backward pass of pairs, and for its work: the largest tensor once more, as its gradient.

    Where blocks are recomputed, they keep little, and the inside of the largest comes to it while it is gone through.
    """
    with _counted(model) as sizes:
        outputs = _forward(model, pairs)
    total = sum(sizes.values()) + max(sizes.values(), default=0)
    del outputs  # until here, so that no storage takes the place of another
    recomputes = model.text_model.encoder.layer[0].gradient_checkpointing  # the image tower's blocks do so too then
    return total + (_largest_block(model, pairs) if recomputes else 0)


def _largest_block(model: Align, pairs: int) -> float:
    """Bytes of the block that would keep most, were it not recomputed, and of going back through it.

    The latter is its gradients and batch norm's copies, three times the largest tensor: so measured for align_b3_mini.
    """
    blocks = [*model.vision_model.encoder.blocks, *model.text_model.encoder.layer]
    sums: list[float] = []
    with ExitStack() as hooks, _counted(model) as sizes:
        for block in blocks:
            block.training = False  # of the block alone: it is not recomputed, and its parts work as in training
            for register in (block.register_forward_pre_hook, block.register_forward_hook):
                hooks.callback(register(lambda *_: sums.append(sum(sizes.values()))).remove)
        outputs = _forward(model, pairs)
    del outputs
    for block in blocks:
        block.training = True
    inside = max(after - before for before, after in zip(sums[::2], sums[1::2], strict=True))
    return inside + 3 * max(sizes.values())


def _forward(model: Align, pairs: int) -> tuple[Tensor, Tensor]:
    return image_features(model, pairs), text_features(model, pairs, model.preprocessing.max_tokens)


@contextmanager
def _counted(model: Align) -> Iterator[dict[int, int]]:
    """Bytes of each storage that autograd keeps within it; but not of weights, which are there anyway."""
    own = {held.untyped_storage()._cdata for held in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        yield sizes


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
