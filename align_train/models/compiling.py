"""Towers through torch.compile, in place: the model keeps its class, its state-dict keys and its export."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.models.align.modeling_align import AlignVisionBlock

from align_train.models.align import Align

# Static shapes: 8 widths of text up to 64 tokens, and two numbers of rows in a part, for each of what running
# statistics do. PyTorch's own limit of 8 is shared by all towers.
SHAPES = 64
MULTIPLE = 8


def compile_towers(model: Align, vision: bool, text: bool, backend: str = "inductor") -> None:
    """Have a tower compiled for each shape that it meets in training; the first batch of each shape waits for it.

    In evaluation, whose batches have other sizes, it works as it is.

    Each tower is one graph. What cannot be one, or a tower that meets more than 64 shapes, is an error of PyTorch's
    in that batch (`torch._dynamo.exc`): nothing goes on uncompiled in silence. Captions are padded to multiples of 8
    tokens from now on (`Align.text_multiple`), so that there are few shapes.

    Args:
        model: changed in place.
        vision: compile the image tower.
        text: compile the text tower.
        backend: a name from `torch.compiler.list_backends()`.

    Raises:
        ValueError: this PyTorch is too old, the image tower's activations are recomputed (PyTorch compiles no
            recomputation that leaves running statistics alone), or padded captions would overrun the positions.
    """
    if "isolate_recompiles" not in inspect.signature(torch.compile).parameters:
        raise ValueError(f"compiled towers need PyTorch 2.13 or later, this is {torch.__version__}: leave compile off")
    if vision and any(type(block) is not AlignVisionBlock for block in model.vision_model.encoder.blocks):
        raise ValueError(
            "the image tower cannot be compiled with model.gradient_checkpointing=true: choose one of them"
        )
    positions = model.config.text_config.max_position_embeddings
    if text and positions % MULTIPLE:
        raise ValueError(f"model.text.positions is {positions}; to compile the text tower make it a multiple of 8")
    model.text_multiple = MULTIPLE if text else model.text_multiple
    for tower, wanted in ((model.vision_model, vision), (model.text_model, text)):
        if wanted:
            tower.compile(
                backend=backend, fullgraph=True, dynamic=False, recompile_limit=SHAPES, isolate_recompiles=True
            )
            # what `compile` sets and `__call__` looks at; copies and pickles of a module are without it
            tower._compiled_call_impl = partial(_in_training, tower, tower._compiled_call_impl)


def _in_training(tower: nn.Module, compiled: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return (compiled if tower.training else tower._call_impl)(*args, **kwargs)
