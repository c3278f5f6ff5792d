"""The contrastive objective of ALIGN: logits of every row against every column, cross-entropy both ways.

Source of the formula and of the constants: ALIGN (arXiv 2102.05918, section 4.1) and kakaobrain/coyo-align, whose
numbers `tests/golden/loss.npz` holds. Leaving out duplicates is this project's addition and off by default.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from align_train.losses.chunked import Share, chunked_share_of_loss
from align_train.losses.duplicates import check_ids, duplicates


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    temperature: Tensor,
    label_smoothing: float = 0.1,
    *,
    ids: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Mean over the batch of the image-to-text and the text-to-image cross-entropy, summed.

    With logits s[i, j] = image[i] . text[j] / temperature, both losses of row i want column i:

        loss = 1/B sum_i ( CE(s[i, :], i) + CE(s[:, i], i) )

    The two directions are summed as in the paper; transformers' AlignModel halves that. This is `share_of_loss` of one
    rank that has all rows; arguments, result and errors are described there.
    """
    return share_of_loss(image, text, temperature, label_smoothing=label_smoothing, ids=ids, chunk_size=chunk_size)


def share_of_loss(
    images: Tensor,
    texts: Tensor,
    temperature: Tensor,
    first: int = 0,
    count: int | None = None,
    label_smoothing: float = 0.1,
    ids: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """A rank's share of the global batch's loss: the mean over its own rows, of both directions summed.

    The mean over ranks of equal counts is `contrastive_loss` of the global batch. Rows are slices of the columns, so
    the gradient of `images` and `texts` holds both parts. A differentiable gather sums it over ranks, DDP divides by
    their number, and that is the gradient of the global batch.

    Args:
        images: (B, D), each row L2-normalised: the whole global batch.
        texts: (B, D), each row L2-normalised; texts[i] belongs to images[i].
        temperature: scalar tensor the logits are divided by; learned, starts at 1 (arXiv 2102.05918, section 5).
        first: index of the rank's first row.
        count: number of the rank's rows; None for all B.
        label_smoothing: the target is 1 - label_smoothing + label_smoothing / B at i, label_smoothing / B elsewhere;
            0.1 in the paper.
        ids: (B, K) int64; pairs with an equal id are no negatives of each other, see `row_losses`.
        chunk_size: rows whose logits are held at once, chunk_size x B numbers in place of several B x B. The loss and
            the gradients are the same, and computed together: a second backward through one result is refused. None
            for the plain reference.

    Returns:
        Scalar in float32, or in float64 for float64 embeddings, whatever autocast says.

    Raises:
        ValueError: images and texts are not of one shape (B, D) with B >= 1, the rows are not among them, ids are not
            int64 (B, K), or an option is out of range.
    """
    if images.ndim != 2 or images.shape != texts.shape or len(images) == 0:
        raise ValueError(
            f"the loss needs image and text embeddings of one shape (B, D) with B >= 1, got image "
            f"{tuple(images.shape)} and text {tuple(texts.shape)}: pass one caption's embedding for each image"
        )
    count = len(images) if count is None else count
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}: a rank without rows has no share of the mean")
    _check(count, len(images), temperature, first, label_smoothing, ids)
    dtype = _precision(images, texts)
    images, texts = images.to(dtype), texts.to(dtype)  # once, so that bf16 gradients are rounded as a sum
    if chunk_size is None:
        own = slice(first, first + count)
        image_to_text = row_losses(images[own], texts, temperature, first, label_smoothing, ids)
        text_to_image = row_losses(texts[own], images, temperature, first, label_smoothing, ids)
        return (image_to_text + text_to_image).mean()
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 row, or None for the plain loss, got {chunk_size}")
    share = Share(first, count, label_smoothing, ids, chunk_size)
    with torch.autocast(images.device.type, enabled=False):
        return chunked_share_of_loss(images, texts, temperature.to(dtype).reshape(()), share)


def row_losses(
    rows: Tensor,
    columns: Tensor,
    temperature: Tensor,
    first: int = 0,
    label_smoothing: float = 0.1,
    ids: Tensor | None = None,
) -> Tensor:
    """One direction of the loss, row by row: CE(rows[i] . columns / temperature, first + i).

    Several ranks share one global batch so: `rows` are a rank's own, `columns` those of all ranks, and `first` is where
    the rank's own begin among them. Summed over the ranks and divided by the global batch, this is `contrastive_loss`.

    With ids, a column that has an id of row i (ids[first + i, k] == ids[j, k] for any k) and is not its own is left out
    of the softmax and of the label smoothing, as though it were not there: the n_i columns that stay have the target
    label_smoothing / n_i, and 1 - label_smoothing more at the row's own. So two captions of one image do not repel
    each other, not even by the smoothing.

    Args:
        rows: (b, D), L2-normalised.
        columns: (B, D), L2-normalised, B >= first + b; columns[first + i] belongs to rows[i].
        temperature: scalar tensor the logits are divided by.
        first: index of the column that belongs to rows[0].
        label_smoothing: spread over all B columns, or over the n_i that stay.
        ids: (B, K) int64: K identities of each column, such as of the image and of the caption.

    Returns:
        (b,) losses in float32, or in float64 for float64 embeddings.

    Raises:
        ValueError: the shapes do not fit together, ids are not int64 (B, K), or an option is out of range.
    """
    if rows.ndim != 2 or columns.ndim != 2 or rows.shape[1] != columns.shape[1]:
        raise ValueError(
            f"rows and columns must be (b, D) and (B, D) with one D, got {tuple(rows.shape)} and {tuple(columns.shape)}"
        )
    _check(len(rows), len(columns), temperature, first, label_smoothing, ids)
    dtype = _precision(rows, columns)
    with torch.autocast(rows.device.type, enabled=False):
        logits = rows.to(dtype) @ columns.to(dtype).T / temperature.to(dtype)
        target = torch.arange(first, first + len(rows), device=rows.device)
        if ids is None:
            return cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing)
        out = duplicates(ids, slice(first, first + len(rows)))
        hard = cross_entropy(logits.masked_fill(out, -torch.inf), target, reduction="none")
        mean = logits.masked_fill(out, 0).sum(1) / (~out).sum(1)
        return hard + label_smoothing * (logits.diagonal(first)[: len(rows)] - mean)


def _precision(rows: Tensor, columns: Tensor) -> torch.dtype:
    """Float32 or more: bf16 resolves 1/256, and would round logits of +-64 (a temperature of 1/64) by 1/4 and more."""
    return torch.promote_types(torch.promote_types(rows.dtype, columns.dtype), torch.float32)


def _check(
    rows: int, columns: int, temperature: Tensor, first: int, label_smoothing: float, ids: Tensor | None
) -> None:
    """Raise ValueError unless the arguments fit together; shapes only, so no device is waited for."""
    if not 0 <= first <= columns - rows:
        raise ValueError(
            f"{rows} rows from column {first} on do not fit into {columns} columns: gather the columns of all ranks, "
            f"and let first be the number of rows on the ranks before"
        )
    if temperature.numel() != 1:
        raise ValueError(f"temperature must be one number, got a tensor of shape {tuple(temperature.shape)}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}; the paper has 0.1")
    if ids is not None:
        check_ids(ids, columns)
