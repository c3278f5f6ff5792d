"""The loss against the reference implementation's numbers, in float32 whatever surrounds it, and in pieces."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from align_train.losses import contrastive_loss, row_losses

GOLDEN = Path(__file__).parent / "golden" / "loss.npz"
TEMPERATURES = ["T1.0", "T0.07"]


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(GOLDEN) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def leaves(golden: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Image, text and temperature as leaves that collect gradients."""
    temperature = torch.tensor(float(name[1:]))
    return tuple(x.clone().requires_grad_() for x in (golden["img"], golden["txt"], temperature))


def unit(x: Tensor) -> Tensor:
    """The reference's normalisation."""
    return x * x.square().sum(1, keepdim=True).clamp_min(1e-12).rsqrt()


def close(actual: Tensor, expected: Tensor, atol: float = 0, rtol: float = 0) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


# Three times what was reached in float32: 9.5e-7 for a loss, 1.5e-8 for a gradient, 1.7e-7 of the temperature's.
LOSS, GRADIENT, TEMPERATURE = {"atol": 3e-6}, {"atol": 5e-8}, {"rtol": 6e-7}


@pytest.mark.parametrize("name", TEMPERATURES)
def test_golden_loss_and_gradients(golden, name):
    image, text, temperature = leaves(golden, name)
    loss = contrastive_loss(unit(image), unit(text), temperature)
    loss.backward()
    close(loss, golden[f"{name}|loss_scalar"], **LOSS)
    close(image.grad, golden[f"{name}|grad_img"], **GRADIENT)
    close(text.grad, golden[f"{name}|grad_txt"], **GRADIENT)
    close(temperature.grad, golden[f"{name}|grad_T"], **TEMPERATURE)


@pytest.mark.parametrize("name", TEMPERATURES)
def test_golden_losses_of_each_direction(golden, name):
    image, text, temperature = leaves(golden, name)
    close(row_losses(unit(image), unit(text), temperature), golden[f"{name}|loss_i2t"], **LOSS)
    close(row_losses(unit(text), unit(image), temperature), golden[f"{name}|loss_t2i"], **LOSS)


@pytest.mark.parametrize("name", TEMPERATURES)
def test_two_replicas_have_the_gradients_of_one(golden, name):
    image, text, _ = leaves(golden, name)
    each = []
    for first in (0, 16):
        own = slice(first, first + 16)
        temperature = torch.tensor(float(name[1:]), requires_grad=True)
        all_image, all_text = unit(image), unit(text)
        image_to_text = row_losses(all_image[own], all_text, temperature, first)
        text_to_image = row_losses(all_text[own], all_image, temperature, first)
        ((image_to_text + text_to_image).sum() / 32).backward()
        each.append(temperature.grad)
    close(image.grad, golden[f"{name}|two_replica_grad_img"], **GRADIENT)
    close(image.grad, golden[f"{name}|grad_img"], **GRADIENT)
    close(torch.stack(each), golden[f"{name}|two_replica_grad_T_each"], **TEMPERATURE)
    close(sum(each), golden[f"{name}|grad_T"], **TEMPERATURE)


def test_by_hand():
    # Two orthogonal pairs: every row's logits are (1, 0) / T, so CE = log(1 + e^(-1/T)) plus the smoothed part.
    eye, temperature = torch.eye(2), torch.tensor(0.5)
    hard = np.log1p(np.exp(-2))
    assert contrastive_loss(eye, eye, temperature, label_smoothing=0).item() == pytest.approx(2 * hard)
    smoothed = 0.95 * hard + 0.05 * (hard + 2)
    assert contrastive_loss(eye, eye, temperature).item() == pytest.approx(2 * smoothed)


def test_autocast_leaves_it_in_float32(golden):
    image, text, temperature = leaves(golden, "T0.07")
    plain = contrastive_loss(unit(image), unit(text), temperature)
    plain.backward()
    again = leaves(golden, "T0.07")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = contrastive_loss(unit(again[0]), unit(again[1]), again[2])
    cast.backward()
    assert cast.dtype == torch.float32
    assert torch.equal(cast, plain)
    assert torch.equal(again[0].grad, image.grad)
    assert torch.equal(again[2].grad, temperature.grad)


def test_low_precision_embeddings_are_raised_and_float64_is_kept(golden):
    image, text, temperature = unit(golden["img"]), unit(golden["txt"]), torch.tensor(0.07)
    low = contrastive_loss(image.bfloat16(), text.bfloat16(), temperature)
    assert torch.equal(low, contrastive_loss(image.bfloat16().float(), text.bfloat16().float(), temperature))
    assert low.dtype == torch.float32
    high = contrastive_loss(image.double(), text.double(), temperature.double())
    assert high.dtype == torch.float64
    assert high.item() == pytest.approx(golden["T0.07|loss_scalar"].item(), abs=3e-6)


@pytest.mark.parametrize(
    ("image", "text"),
    [((3, 4), (2, 4)), ((3, 4), (3, 5)), ((4,), (4,)), ((0, 4), (0, 4)), ((2, 2, 2), (2, 2, 2))],
)
def test_wrong_shapes_are_named(image, text):
    with pytest.raises(ValueError, match="got image") as error:
        contrastive_loss(torch.zeros(image), torch.zeros(text), torch.tensor(1.0))
    assert str(image) in str(error.value)
    assert str(text) in str(error.value)


def test_wrong_options_are_named():
    eye, one = torch.eye(2), torch.tensor(1.0)
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\), got 1"):
        contrastive_loss(eye, eye, one, label_smoothing=1)
    with pytest.raises(ValueError, match=r"temperature must be one number, got a tensor of shape \(2,\)"):
        contrastive_loss(eye, eye, torch.ones(2))
    with pytest.raises(ValueError, match="2 rows from column 1 on do not fit into 2 columns"):
        row_losses(eye, eye, one, first=1)
    with pytest.raises(ValueError, match="with one D"):
        row_losses(eye, torch.zeros(2, 3), one)
