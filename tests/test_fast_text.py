"""The text tower whose last layer computes [CLS] alone, against the one that computes all positions."""

import copy

import pytest
import torch
from test_text_chunks import model as tower
from torch import Tensor
from transformers.models.align.modeling_align import AlignTextAttention, AlignTextSelfAttention

from align_train.models import Align

PADDING = pytest.mark.parametrize("lengths", [[7, 3, 16, 5, 12], [9] * 5], ids=["padded", "unpadded"])


def unrepaired(model: Align) -> Align:
    """The same model with the last layer that transformers has."""
    whole = copy.deepcopy(model)
    attention = whole.text_model.encoder.layer[-1].attention
    attention.__class__, attention.self.__class__ = AlignTextAttention, AlignTextSelfAttention
    return whole


def captions(lengths: list[int]) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return torch.randint(1, 50, mask.shape, generator=random) * mask, mask


def embeddings_and_gradients(model: Align, lengths: list[int]) -> dict[str, Tensor]:
    embeddings = model.encode_text(*captions(lengths))
    weights = torch.linspace(-1, 1, embeddings.numel(), dtype=torch.float64).view_as(embeddings)
    (embeddings * weights).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"embeddings": embeddings.detach(), **gradients}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert len(expected) > 35
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@PADDING
@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_embeddings_and_every_gradient_are_those_of_all_positions(lengths, chunks, checkpointing):
    model = tower(gradient_checkpointing=checkpointing)
    whole = unrepaired(model)
    model.text_chunks = chunks
    assert_same(embeddings_and_gradients(model, lengths), embeddings_and_gradients(whole, lengths))


def test_evaluation_has_no_dropout():
    model = tower(dropout=0.5).eval()
    expected = unrepaired(model).encode_text(*captions([7, 3, 16]))
    torch.testing.assert_close(model.encode_text(*captions([7, 3, 16])), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("part", ["attention", "hidden"])
def test_the_last_layer_has_dropout_in_training(part):
    model = tower(dropout=0.5)
    for layer in model.text_model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
        elif isinstance(layer, AlignTextSelfAttention):
            layer.attention_dropout = 0.0
    last = model.text_model.encoder.layer[-1].attention
    if part == "attention":
        last.self.attention_dropout = 0.5
    else:
        last.output.dropout.p = 0.5
    first, second = (model.encode_text(*captions([7, 3, 16])) for _ in range(2))
    assert not torch.allclose(first, second)


def test_the_last_layer_computes_one_position_and_the_others_all():
    model = tower()
    rows: list[int] = []
    for layer in model.text_model.encoder.layer:
        for part in (layer.attention.self.query, layer.attention.self.key, layer.attention.output, layer.intermediate):
            part.register_forward_hook(lambda _module, _inputs, y: rows.append(y.shape[1]))
    model.encode_text(*captions([7, 3, 16]))
    assert rows == [16, 16, 16, 16, 1, 16, 1, 1]


def test_state_dict_keys_are_unchanged():
    model = tower()
    assert list(model.state_dict()) == list(unrepaired(model).state_dict())
