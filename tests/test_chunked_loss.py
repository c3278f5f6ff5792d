"""The loss in chunks, in shares of ranks, and without duplicates as negatives, against the plain one and loops."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from align_train.losses import contrastive_loss, row_losses, share_of_loss

GOLDEN = Path(__file__).parent / "golden" / "loss.npz"
ROWS, WIDTH = 12, 5
CHUNKS = [1, 5, ROWS, ROWS + 3]
EXACT, SINGLE = {"atol": 1e-10, "rtol": 0}, {"atol": 1e-5, "rtol": 1e-5}
# image 1 has four captions, of which one is also image 9's; two images share caption 105
IDS = torch.tensor(
    [[1, 1, 2, 3, 1, 4, 5, 6, 9, 7, 8, 1], [100, 101, 102, 103, 104, 105, 105, 106, 104, 107, 108, 109]]
).T


def unit(x: Tensor) -> Tensor:
    return x * x.square().sum(1, keepdim=True).clamp_min(1e-12).rsqrt()


def leaves(temperature: float = 0.07, dtype: torch.dtype = torch.float64, rows: int = ROWS) -> list[Tensor]:
    """Image, text and temperature that collect gradients."""
    random = torch.Generator().manual_seed(0)
    image, text = (unit(torch.randn(rows, WIDTH, generator=random, dtype=torch.float64)) for _ in range(2))
    return [x.to(dtype).requires_grad_() for x in (image, text, torch.tensor(temperature))]


def loss_and_gradients(loss: Callable[..., Tensor], inputs: list[Tensor], **options: Any) -> list[Tensor]:
    value = loss(*inputs, **options)
    value.backward()
    return [value.detach(), *(x.grad for x in inputs)]


def close(actual: list[Tensor], expected: list[Tensor], **tolerance: float) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, **tolerance)


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("temperature", [1.0, 0.07, 0.01])
@pytest.mark.parametrize("label_smoothing", [0, 0.1])
@pytest.mark.parametrize("ids", [None, IDS], ids=["all", "ids"])
def test_chunks_have_the_loss_and_gradients_of_the_plain_one(chunk_size, temperature, label_smoothing, ids):
    options = {"label_smoothing": label_smoothing, "ids": ids}
    plain = loss_and_gradients(contrastive_loss, leaves(temperature), **options)
    assert min(x.abs().max() for x in plain) > 1e-6
    close(loss_and_gradients(contrastive_loss, leaves(temperature), chunk_size=chunk_size, **options), plain, **EXACT)
    single = loss_and_gradients(contrastive_loss, leaves(temperature, torch.float32), chunk_size=chunk_size, **options)
    assert {x.dtype for x in single} == {torch.float32}
    # 32-bit inputs are rounded, which a logit divided by 0.01 shows a hundredfold: the loss of the same inputs
    rounded = [x.detach().double().requires_grad_() for x in leaves(temperature, torch.float32)]
    close([x.double() for x in single], loss_and_gradients(contrastive_loss, rounded, **options), **SINGLE)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("chunk_size", [None, 2, ROWS])
@pytest.mark.parametrize("ids", [None, IDS], ids=["all", "ids"])
def test_shares_of_ranks_have_the_mean_of_the_whole(ranks, chunk_size, ids):
    whole = loss_and_gradients(contrastive_loss, leaves(), ids=ids)
    count = ROWS // ranks
    shares = [
        loss_and_gradients(share_of_loss, leaves(), first=first, count=count, ids=ids, chunk_size=chunk_size)
        for first in range(0, ROWS, count)
    ]
    assert not torch.allclose(shares[0][0], whole[0], atol=1e-3)
    close([torch.stack(parts).mean(0) for parts in zip(*shares, strict=True)], whole, **EXACT)


@pytest.mark.parametrize("name", ["T1.0", "T0.07"])
@pytest.mark.parametrize("chunk_size", [7, 32])
def test_golden_loss_and_gradients_in_chunks(name, chunk_size):
    with np.load(GOLDEN) as arrays:
        golden = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    image, text = golden["img"].requires_grad_(), golden["txt"].requires_grad_()
    temperature = torch.tensor(float(name[1:]), requires_grad=True)
    loss = contrastive_loss(unit(image), unit(text), temperature, chunk_size=chunk_size)
    loss.backward()
    # the tolerances of the plain one in test_losses.py
    close([loss], [golden[f"{name}|loss_scalar"]], atol=3e-6, rtol=0)
    close([image.grad, text.grad], [golden[f"{name}|grad_img"], golden[f"{name}|grad_txt"]], atol=5e-8, rtol=0)
    close([temperature.grad], [golden[f"{name}|grad_T"]], atol=0, rtol=6e-7)


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_autocast_leaves_it_in_float32_and_low_precision_is_raised(chunk_size):
    plain = loss_and_gradients(contrastive_loss, leaves(dtype=torch.float32), ids=IDS, chunk_size=chunk_size)
    inputs = leaves(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = contrastive_loss(*inputs, ids=IDS, chunk_size=chunk_size)
    cast.backward()
    assert all(torch.equal(a, b) for a, b in zip([cast, *(x.grad for x in inputs)], plain, strict=True))
    low = [x.detach().bfloat16().requires_grad_() for x in leaves()]
    raised = [x.detach().float().requires_grad_() for x in low]
    expected = loss_and_gradients(contrastive_loss, raised, ids=IDS, chunk_size=chunk_size)
    actual = loss_and_gradients(contrastive_loss, low, ids=IDS, chunk_size=chunk_size)
    assert [x.dtype for x in actual] == [torch.float32, *[torch.bfloat16] * 3]
    assert torch.equal(actual[0], expected[0])
    assert all(torch.equal(a, e.bfloat16()) for a, e in zip(actual[1:], expected[1:], strict=True))


def test_duplicates_by_hand():
    # Row 0 has logits (2, 0, 0) to captions of images 1, 1, 2, and drops the second: two columns stay.
    eye, two = torch.eye(3), torch.tensor(0.5)
    hard = math.log1p(math.exp(-2))
    smoothed = 0.9 * hard + 0.1 * (hard + 1)
    ids = torch.tensor([[1], [1], [2]])
    losses = row_losses(eye, eye, two, ids=ids)
    all_three = math.log1p(2 * math.exp(-2)) + 0.1 * 4 / 3
    assert losses.tolist() == pytest.approx([smoothed, smoothed, all_three])
    assert row_losses(eye[1:], eye, two, first=1, ids=ids).tolist() == pytest.approx([smoothed, all_three])
    for chunk_size in (None, 1, 3):
        loss = contrastive_loss(eye, eye, two, ids=ids, chunk_size=chunk_size)
        assert loss.item() == pytest.approx(2 * (2 * smoothed + all_three) / 3)


def losses_with_columns_deleted(rows: Tensor, columns: Tensor, temperature: Tensor, ids: Tensor) -> Tensor:
    """A loop over rows, each against the columns that are its own or share no id with it."""
    found = []
    for i, row in enumerate(rows):
        stay = [j for j in range(len(columns)) if j == i or not (ids[i] == ids[j]).any()]
        target = torch.tensor(stay.index(i))
        logits = columns[stay] @ row / temperature
        found.append(torch.nn.functional.cross_entropy(logits, target, label_smoothing=0.1))
    return torch.stack(found)


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_duplicates_are_as_though_their_columns_were_deleted(chunk_size):
    def looped(image: Tensor, text: Tensor, temperature: Tensor) -> Tensor:
        there = losses_with_columns_deleted(image, text, temperature, IDS)
        back = losses_with_columns_deleted(text, image, temperature, IDS)
        return (there + back).mean()

    expected = loss_and_gradients(looped, leaves())
    close(loss_and_gradients(contrastive_loss, leaves(), ids=IDS, chunk_size=chunk_size), expected, **EXACT)
    without = loss_and_gradients(contrastive_loss, leaves(), chunk_size=chunk_size)
    assert not torch.allclose(without[0], expected[0], atol=1e-2)
    one_kind = loss_and_gradients(contrastive_loss, leaves(), ids=IDS[:, :1], chunk_size=chunk_size)
    assert not torch.allclose(one_kind[0], expected[0], atol=1e-2)


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_a_duplicate_far_above_the_rest_does_not_drown_it(chunk_size):
    # Row 0's logits are (-1000, 1000, -1000), and e^-2000 is 0 in float32; the second is left out.
    image = torch.tensor([[1.0, 0], [1, 0], [1, 0]])
    text = torch.tensor([[-1.0, 0], [1, 0], [-1, 0]])
    ids = torch.tensor([[1], [1], [2]])
    inputs = [image.requires_grad_(), text.requires_grad_(), torch.tensor(0.001, requires_grad=True)]
    found = loss_and_gradients(share_of_loss, inputs, count=1, ids=ids, label_smoothing=0.0, chunk_size=chunk_size)
    # text 0 keeps images 0 and 2, and both are at -1000 too
    assert found[0].item() == pytest.approx(2 * math.log(2))
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_ids_that_are_all_different_change_nothing(chunk_size):
    ids = torch.arange(ROWS)[:, None]
    without = loss_and_gradients(contrastive_loss, leaves(), chunk_size=chunk_size)
    close(loss_and_gradients(contrastive_loss, leaves(), ids=ids, chunk_size=chunk_size), without, **EXACT)


class Recorder(TorchDispatchMode):
    """The largest tensor that any operation returned, and how many matrix products there were."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.products = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.products += "mm" in func.name()
        self.largest = max([self.largest, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))])
        return out


@pytest.mark.parametrize("ids", [None, torch.arange(128).view(64, 2) // 4], ids=["all", "ids"])
def test_no_tensor_is_larger_than_a_chunk_of_logits(ids):
    found = {}
    for chunk_size in (None, 8):
        with Recorder() as found[chunk_size]:
            loss_and_gradients(contrastive_loss, leaves(rows=64), ids=ids, chunk_size=chunk_size)
    assert found[None].largest == 64 * 64
    assert found[8].largest == 8 * 64
    assert found[8].products == 8 * found[None].products


def test_no_gradients_are_computed_that_nobody_takes():
    def products(inputs: list[Tensor]) -> int:
        with Recorder() as found:
            share_of_loss(*inputs, chunk_size=ROWS)
        return found.products

    assert products(leaves()) == 6
    with torch.no_grad():
        assert products(leaves()) == 2
    assert products([x.detach() for x in leaves()]) == 2
    locked = leaves()
    locked[0].requires_grad_(False)
    assert products(locked) == 5  # texts are rows once and columns once, and the temperature needs both rows
    close([share_of_loss(*leaves(), chunk_size=5)], [contrastive_loss(*leaves())], **EXACT)


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_each_gradient_alone_is_the_plain_one(needed):
    found = []
    for chunk_size in (None, 5):
        inputs = [x.requires_grad_(need) for x, need in zip(leaves(), needed, strict=True)]
        contrastive_loss(*inputs, chunk_size=chunk_size).backward()
        found.append([x.grad for x in inputs])
        assert tuple(x.grad is not None for x in inputs) == needed
    close([x for x in found[1] if x is not None], [x for x in found[0] if x is not None], **EXACT)


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_an_upstream_factor_scales_the_gradients(chunk_size):
    _, *once = loss_and_gradients(contrastive_loss, leaves(), chunk_size=chunk_size)
    _, *scaled = loss_and_gradients(lambda *x, **o: contrastive_loss(*x, **o) * 1024, leaves(), chunk_size=chunk_size)
    close(scaled, [1024 * x for x in once], **EXACT)


def test_gradients_of_several_chunked_losses_add_up():
    inputs = leaves()
    for _ in range(2):
        contrastive_loss(*inputs, chunk_size=5).backward()
    _, *once = loss_and_gradients(contrastive_loss, leaves())
    close([x.grad for x in inputs], [2 * x for x in once], **EXACT)


def test_one_tensor_as_image_and_text_has_the_gradients_of_both():
    found = []
    for chunk_size in (None, 5):
        image, _, temperature = leaves()
        contrastive_loss(image, image, temperature, chunk_size=chunk_size).backward()
        found.append([image.grad, temperature.grad])
    close(*found, **EXACT)


def test_a_second_backward_is_refused_with_a_remedy():
    loss = contrastive_loss(*leaves(), chunk_size=5)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again for a second one"):
        loss.backward()


def test_temperature_may_have_a_dimension():
    image, text, temperature = leaves()
    column = temperature.detach()[None].requires_grad_()
    expected = loss_and_gradients(contrastive_loss, [image, text, temperature], chunk_size=5)
    image, text, _ = leaves()
    actual = loss_and_gradients(contrastive_loss, [image, text, column], chunk_size=5)
    assert actual[3].shape == (1,)
    close([*actual[:3], actual[3][0]], expected, **EXACT)


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_a_chunk_of_no_rows_is_refused(chunk_size):
    with pytest.raises(ValueError, match=f"chunk_size must be at least 1 row.*got {chunk_size}"):
        contrastive_loss(*leaves(), chunk_size=chunk_size)


@pytest.mark.parametrize(
    "ids",
    [torch.zeros(ROWS, 2), IDS[:, 0], IDS[1:], IDS[:, :0], IDS.int(), IDS.T],
    ids=["float", "1-dimensional", "short", "no kinds", "int32", "transposed"],
)
@pytest.mark.parametrize("chunk_size", [None, 5])
def test_ids_of_a_wrong_shape_or_kind_are_refused(ids, chunk_size):
    with pytest.raises(ValueError, match=r"ids must be int64 of shape \(B, K\).*each of the 12 columns") as error:
        contrastive_loss(*leaves(), ids=ids, chunk_size=chunk_size)
    assert str(tuple(ids.shape)) in str(error.value)


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_rows_that_are_not_there_are_refused(chunk_size):
    with pytest.raises(ValueError, match="8 rows from column 6 on do not fit into 12 columns"):
        share_of_loss(*leaves(), first=6, count=8, chunk_size=chunk_size)
    with pytest.raises(ValueError, match="12 rows from column 6 on do not fit"):
        share_of_loss(*leaves(), first=6, chunk_size=chunk_size)
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        share_of_loss(*leaves(), count=0, chunk_size=chunk_size)
