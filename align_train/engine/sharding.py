"""Fully sharded training (FSDP2): each rank keeps its share of weights, gradients and moments.

Loss, gradients, LAMB's norms of whole tensors and clipping are those of DDP (tests/test_sharding.py). With gradient
caching, gradients are exchanged once a micro-batch instead of once a step, and from the second micro-batch of a
backward pass on a rank holds all weights: recomputation gathers every block before the first of them is gone back
through. What is sharded in any case is gradients and moments, three quarters of it all.
"""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from align_train.distributed import dealt_out_as, gathered, is_sharded, shard
from align_train.models import Align


class FullySharded(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, over all ranks, with the checkpoints of every other strategy.

    These are one file with whole tensors, through the trainer's `CheckpointIO`, so that a run may go on under another
    strategy or on another number of ranks. Lightning's own numbers the moments by the model's order of weights, where
    every other strategy numbers them by the optimizer's, and would read one for the other if there are two groups.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Shard over all ranks of all nodes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Checkpoints are read as under any strategy."""
        return True

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """The whole checkpoint, on every rank, by our own reading."""
        checkpoint: dict[str, Any] = self.checkpoint_io.load_checkpoint(checkpoint_path)
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Each rank takes its share of the weights."""
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        shares = {name: dealt_out_as(value, own.get(name)) for name, value in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(shares, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each rank takes its share of the moments."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            numbers = [number for group in state["param_groups"] for number in group["params"]]
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            shares = {
                number: _shares(state["state"][number], weight)
                for number, weight in zip(numbers, weights, strict=True)
                if number in state["state"]
            }
            optimizer.load_state_dict({**state, "state": shares})

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole weights, on rank 0."""
        assert self.lightning_module is not None
        return {name: gathered(value) for name, value in self.lightning_module.state_dict().items()}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole moments, on rank 0."""
        state = optimizer.state_dict()
        whole = {name: {key: gathered(value) for key, value in one.items()} for name, one in state["state"].items()}
        return {**state, "state": whole}


def _shares(state: Mapping[str, Any], weight: Tensor) -> dict[str, Any]:
    """A weight's optimizer state with its moments dealt out as the weight; a count of steps stays whole."""
    return {
        name: dealt_out_as(value, weight) if isinstance(value, Tensor) and value.shape == weight.shape else value
        for name, value in state.items()
    }


def shard_model(model: Align, mesh: Any) -> None:
    """Deal out a model's weights over the ranks of a mesh, block by block of each tower; once only.

    Raises:
        ValueError: a tower is compiled; its one graph has no place for gathering block by block.
    """
    if is_sharded(model):
        return
    if any(tower._compiled_call_impl is not None for tower in (model.vision_model, model.text_model)):
        raise ValueError(
            "a compiled tower cannot be sharded: set step.compile_vision=false and step.compile_text=false, or "
            "trainer=default"
        )
    _keep_weights_contiguous(model)
    parts = [*model.vision_model.encoder.blocks, *model.text_model.encoder.layer]
    shard(model, parts, ("get_image_features", "get_text_features"), mesh)


def _keep_weights_contiguous(model: Align) -> None:
    """Shares can only be cut of contiguous weights; images in channels_last make the tower's work so all the same."""
    tower = model.vision_model
    if all(weight.is_contiguous() for weight in tower.parameters()):
        return
    tower.to(memory_format=torch.contiguous_format)
    tower.register_forward_pre_hook(_to_channels_last, with_kwargs=True)


def _to_channels_last(tower: nn.Module, args: Any, kwargs: Any) -> Any:
    return tree_map(lambda x: x.to(memory_format=torch.channels_last) if isinstance(x, Tensor) else x, (args, kwargs))
