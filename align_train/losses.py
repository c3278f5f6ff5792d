"""The contrastive objective of ALIGN: logits of every row against every column, cross-entropy both ways.

Source of the formula and of the constants: ALIGN (arXiv 2102.05918, section 4.2) and kakaobrain/coyo-align, whose
numbers `tests/golden/loss.npz` holds.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def contrastive_loss(image: Tensor, text: Tensor, temperature: Tensor, label_smoothing: float = 0.1) -> Tensor:
    """The plain reference: mean over the batch of the image-to-text and the text-to-image cross-entropy, summed.

    With logits s[i, j] = image[i] . text[j] / temperature, both losses of row i want column i:

        loss = 1/B sum_i ( CE(s[i, :], i) + CE(s[:, i], i) )

    The two directions are summed as in the paper; transformers' AlignModel halves that.

    Args:
        image: (B, D), each row L2-normalised.
        text: (B, D), each row L2-normalised; text[i] belongs to image[i].
        temperature: scalar tensor the logits are divided by; learned, starts at 1 (arXiv 2102.05918, section 5.1).
        label_smoothing: the target is 1 - label_smoothing + label_smoothing / B at i, label_smoothing / B elsewhere;
            0.1 in the paper.

    Returns:
        Scalar in float32, or in float64 for float64 embeddings, whatever autocast says.

    Raises:
        ValueError: image and text are not of one shape (B, D) with B >= 1, or an option is out of range.
    """
    if image.ndim != 2 or image.shape != text.shape or len(image) == 0:
        raise ValueError(
            f"contrastive_loss needs image and text embeddings of one shape (B, D) with B >= 1, got image "
            f"{tuple(image.shape)} and text {tuple(text.shape)}: pass one caption's embedding for each image"
        )
    image_to_text = row_losses(image, text, temperature, label_smoothing=label_smoothing)
    text_to_image = row_losses(text, image, temperature, label_smoothing=label_smoothing)
    return (image_to_text + text_to_image).mean()


def row_losses(
    rows: Tensor, columns: Tensor, temperature: Tensor, first: int = 0, label_smoothing: float = 0.1
) -> Tensor:
    """One direction of the loss, row by row: CE(rows[i] . columns / temperature, first + i).

    Several ranks share one global batch so: `rows` are a rank's own, `columns` those of all ranks, and `first` is where
    the rank's own begin among them. Summed over the ranks and divided by the global batch, this is `contrastive_loss`.

    Args:
        rows: (b, D), L2-normalised.
        columns: (B, D), L2-normalised, B >= first + b; columns[first + i] belongs to rows[i].
        temperature: scalar tensor the logits are divided by.
        first: index of the column that belongs to rows[0].
        label_smoothing: spread over all B columns.

    Returns:
        (b,) losses in float32, or in float64 for float64 embeddings.

    Raises:
        ValueError: the shapes do not fit together, or an option is out of range.
    """
    _check(rows, columns, temperature, first, label_smoothing)
    dtype = torch.promote_types(torch.promote_types(rows.dtype, columns.dtype), torch.float32)
    # bf16 resolves 1/256: at a temperature of 1/64 it would round logits of +-64 by 1/4 and more.
    with torch.autocast(rows.device.type, enabled=False):
        logits = rows.to(dtype) @ columns.to(dtype).T / temperature.to(dtype)
        target = torch.arange(first, first + len(rows), device=rows.device)
        return cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing)


def _check(rows: Tensor, columns: Tensor, temperature: Tensor, first: int, label_smoothing: float) -> None:
    """Raise ValueError unless the arguments of `row_losses` fit together; shapes only, so no device is waited for."""
    if rows.ndim != 2 or columns.ndim != 2 or rows.shape[1] != columns.shape[1]:
        raise ValueError(
            f"rows and columns must be (b, D) and (B, D) with one D, got {tuple(rows.shape)} and {tuple(columns.shape)}"
        )
    if not 0 <= first <= len(columns) - len(rows):
        raise ValueError(
            f"{len(rows)} rows from column {first} on do not fit into {len(columns)} columns: gather the columns of "
            f"all ranks, and let first be the number of rows on the ranks before"
        )
    if temperature.numel() != 1:
        raise ValueError(f"temperature must be one number, got a tensor of shape {tuple(temperature.shape)}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}; the paper has 0.1")
