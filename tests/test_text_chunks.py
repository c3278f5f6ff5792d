"""The text tower on length-sorted chunks: the numbers and gradients of one call, on fewer token columns."""

from typing import Any

import pytest
import torch
from test_models import small
from torch import Tensor

from align_train.models import Align
from align_train.models.length_chunks import in_length_chunks

LENGTHS = [7, 3, 16, 5, 12, 3, 9, 4, 16, 6, 11]


def model(dropout: float = 0.0, **changes: Any) -> Align:
    """A small model in float64 whose text tower tells tokens from each other."""
    built = small(vision={"depth": 0.1}, text={"dropout": dropout}, batch_norm={"statistics": "batch"}, **changes)
    with torch.no_grad():  # BERT's start values are too small for that
        for weight in built.text_model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    return built.double().train()


def captions(lengths: list[int], columns: int | None = None) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    mask = (torch.arange(columns or max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return torch.randint(1, 50, mask.shape, generator=random) * mask, mask


def embeddings_and_gradients(model: Align, ids: Tensor, mask: Tensor) -> list[Tensor]:
    model.zero_grad()
    embeddings = model.encode_text(ids, mask)
    weights = torch.linspace(-1, 1, embeddings.numel(), dtype=torch.float64).view_as(embeddings)
    (embeddings * weights).sum().backward()
    return [embeddings.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def shapes_seen(model: Align, ids: Tensor, mask: Tensor) -> list[tuple[int, int]]:
    seen: list[tuple[int, int]] = []
    hook = model.text_model.embeddings.register_forward_hook(lambda _module, _inputs, y: seen.append(y.shape[:2]))
    model.encode_text(ids, mask)
    hook.remove()
    return seen


@pytest.mark.parametrize(
    ("lengths", "columns"),
    [(LENGTHS, None), (LENGTHS, 19), ([8] * 6, None), ([8] * 6, 13), ([5], None), ([5], 9)],
    ids=[
        "padded to the longest",
        "padded further",
        "equally long",
        "equally long, padded",
        "one row",
        "one row, padded",
    ],
)
@pytest.mark.parametrize(("chunks", "multiple"), [(1, 8), (2, 1), (3, 4), (11, 1), (64, 3)])
def test_chunks_give_the_embeddings_and_gradients_of_one_call(
    lengths: list[int], columns: int | None, chunks: int, multiple: int
) -> None:
    whole, chunked = model(), model()
    chunked.text_chunks, chunked.text_multiple = chunks, multiple
    ids, mask = captions(lengths, columns)
    expected, got = (embeddings_and_gradients(m, ids, mask) for m in (whole, chunked))
    assert len(got) == len(expected) > 20
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_rows_come_back_in_the_order_of_the_captions() -> None:
    ids, mask = captions(LENGTHS)
    ids[:, 0] = torch.arange(len(LENGTHS))
    assert in_length_chunks(lambda i, _mask: i[:, :1], ids, mask, 3).flatten().tolist() == list(range(len(LENGTHS)))


def test_each_chunk_is_as_wide_as_its_longest_caption() -> None:
    tower = model()
    ids, mask = captions(LENGTHS, 19)  # sorted: 3 3 4 5 | 6 7 9 11 | 12 16 16
    tower.text_chunks = 3
    assert shapes_seen(tower, ids, mask) == [(4, 5), (4, 11), (3, 16)]
    tower.text_multiple = 8
    assert shapes_seen(tower, ids, mask) == [(4, 8), (4, 16), (3, 16)]


def test_a_width_is_a_multiple_where_the_batch_is_narrower() -> None:
    tower = model()
    tower.text_multiple = 8
    assert shapes_seen(tower, *captions([3, 9])) == [(2, 16)]


def test_one_chunk_is_one_call_with_the_batch_as_it_comes() -> None:
    ids, mask = captions(LENGTHS, 19)
    assert model().text_chunks == 1
    assert shapes_seen(model(), ids, mask) == [(11, 19)]


def test_a_hole_in_the_mask_does_not_end_a_caption() -> None:
    tower = model()
    ids, mask = captions(LENGTHS)
    mask[:, 2], mask[3, 0], ids[0] = 0, 0, 7
    expected = tower.encode_text(ids, mask)
    tower.text_chunks = 4
    torch.testing.assert_close(tower.encode_text(ids, mask), expected, rtol=1e-10, atol=1e-10)


def test_a_boolean_mask_will_do() -> None:
    tower = model()
    ids, mask = captions(LENGTHS)
    expected = tower.encode_text(ids, mask)
    tower.text_chunks = 4
    torch.testing.assert_close(tower.encode_text(ids, mask.bool()), expected, rtol=1e-10, atol=1e-10)


def test_a_caption_without_a_token_is_still_a_row() -> None:
    ids, mask = torch.zeros(2, 2, 5, dtype=torch.long)
    assert in_length_chunks(lambda i, _mask: i[:, :1], ids, mask, 2).shape == (2, 1)
