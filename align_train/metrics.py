"""Numbers that say how good, and how healthy, embeddings are. Pure functions, checkable by hand."""

from collections import Counter
from collections.abc import Sequence
from math import comb

import torch
from torch import Tensor
from torch.nn.functional import normalize

# The similarity matrix is visited in blocks of this many rows: 1024 x 25,010 captions of COCO are 100 MB.
BLOCK_ROWS = 1024


def retrieval_recall(
    image: Tensor, text: Tensor, image_of_text: Tensor, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Recall@k of image-to-text and text-to-image retrieval by dot product.

    A query is a hit at k if fewer than k wrong candidates score at least as high as its best right one. So a tie counts
    against the model: embeddings that are all the same have recall 0, not 1. An image with several captions is
    a hit if any of them is.

    Args:
        image: (N, D) embeddings, L2-normalised for cosine similarity.
        text: (M, D) embeddings, likewise.
        image_of_text: (M,) integers; text[j] describes image[image_of_text[j]].
        ks: cut-offs; 1, 5 and 10 are those of the Karpathy-split literature.

    Returns:
        `{"i2t_r1": ..., "i2t_r5": ..., "t2i_r1": ..., ...}`, fractions in [0, 1].

    Raises:
        ValueError: shapes do not fit, a value is not finite, an index is out of range, an image has no text, a k < 1.
    """
    _check_embeddings("image", image)
    _check_embeddings("text", text)
    if image.shape[1] != text.shape[1]:
        raise ValueError(f"image {tuple(image.shape)} and text {tuple(text.shape)} must have one width D")
    image_of_text = image_of_text.to(text.device)
    _check_pairing(image_of_text, len(image), ks)
    if len(image_of_text) != len(text):
        raise ValueError(f"image_of_text names an image for {len(image_of_text)} texts, but there are {len(text)}")
    index = torch.arange(len(image), device=image.device)
    ranks = {
        "i2t": _ranks(image, text, index, image_of_text),
        "t2i": _ranks(text, image, image_of_text, index),
    }
    return {f"{way}_r{k}": (rank < k).double().mean().item() for way, rank in ranks.items() for k in ks}


def chance_recall(image_of_text: Tensor, images: int, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """What `retrieval_recall` gives on average for a random order of the candidates: the number to print beside it.

    text to image: k / N. image to text: the mean over the images of 1 - C(M - c, k) / C(M, k), where c of the M texts
    are the image's own; k / M for c = 1.

    Args:
        image_of_text: (M,) integers as in `retrieval_recall`.
        images: N, the number of images.
        ks: cut-offs.

    Returns:
        Fractions under the keys of `retrieval_recall`.

    Raises:
        ValueError: an index is out of range, an image has no text, a k < 1.
    """
    _check_pairing(image_of_text, images, ks)
    texts = len(image_of_text)
    images_with = Counter(torch.bincount(image_of_text, minlength=images).tolist())

    def image_to_text(k: int) -> float:
        k = min(k, texts)
        missed = sum(count * (comb(texts - captions, k) / comb(texts, k)) for captions, count in images_with.items())
        return 1 - missed / images

    recall = {f"i2t_r{k}": image_to_text(k) for k in ks}
    return recall | {f"t2i_r{k}": min(k, images) / images for k in ks}


def effective_rank(embeddings: Tensor) -> float:
    """How many directions embeddings use: 1 if all lie on one line, up to min(N, D) if they fill the space.

        exp( - sum_i p_i log p_i ),  p_i = s_i / sum_j s_j,  s = singular values of the (N, D) matrix

    Roy and Vetterli, "The effective rank", EUSIPCO 2007. The matrix is taken as it is, the mean not removed, so
    embeddings that share one large component have a low effective rank, as they should.

    Raises:
        ValueError: not (N, D), empty, not finite, or all zero.
    """
    _check_embeddings("embeddings", embeddings)
    with torch.autocast(embeddings.device.type, enabled=False):
        values = torch.linalg.svdvals(_at_least_float32(embeddings))
    if not values.any():
        raise ValueError(f"embeddings {tuple(embeddings.shape)} are all zero, their effective rank is not defined")
    return torch.special.entr(values / values.sum()).sum().exp().item()


def mean_cosine(embeddings: Tensor) -> float:
    """Mean cosine between two different rows: near 0 for spread-out embeddings, near 1 for a collapsed tower.

    With x the normalised rows, ( |sum_i x_i|^2 - sum_i |x_i|^2 ) / (N (N - 1)): O(N D), no N x N matrix. A row of zeros
    has cosine 0 with every other.

    Args:
        embeddings: (N, D), N >= 2, normalised here.

    Raises:
        ValueError: not (N, D), fewer than two rows, or not finite.
    """
    _check_embeddings("embeddings", embeddings)
    rows = len(embeddings)
    if rows < 2:
        raise ValueError(f"a mean cosine between rows needs at least 2 rows, got {tuple(embeddings.shape)}")
    unit = normalize(_at_least_float32(embeddings), dim=1)
    return ((unit.sum(0).square().sum() - unit.square().sum()) / (rows * (rows - 1))).item()


def _ranks(queries: Tensor, candidates: Tensor, query_label: Tensor, candidate_label: Tensor) -> Tensor:
    """(Q,) number of wrong candidates that score at least as high as the best right one; right is an equal label."""
    ranks = []
    queries, candidates = _at_least_float32(queries), _at_least_float32(candidates)
    # In the bf16 of a surrounding autocast, different scores would round to ties.
    with torch.autocast(queries.device.type, enabled=False):
        for block, label in zip(queries.split(BLOCK_ROWS), query_label.split(BLOCK_ROWS), strict=True):
            scores = block @ candidates.T
            right = label[:, None] == candidate_label
            best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
            # "not lower" instead of "higher or equal": a NaN of overflowing scores then counts against the model too.
            ranks.append((~(scores < best) & ~right).sum(1))
    return torch.cat(ranks)


def _at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def _check_embeddings(name: str, x: Tensor) -> None:
    """Raise ValueError unless x is (N, D), N >= 1, and finite."""
    if x.ndim != 2 or x.numel() == 0:
        raise ValueError(f"{name} must be embeddings of shape (N, D), not empty, got {tuple(x.shape)}")
    bad = (~x.isfinite()).any(1)
    if bad.any():
        raise ValueError(
            f"{int(bad.sum())} of the {len(x)} rows of {name} are not finite, the first is row "
            f"{int(bad.int().argmax())}: the model diverged, or a row was never filled in"
        )


def _check_pairing(image_of_text: Tensor, images: int, ks: Sequence[int]) -> None:
    """Raise ValueError unless every text has its image, every image a text, and every k is positive."""
    if image_of_text.ndim != 1 or image_of_text.is_floating_point():
        raise ValueError(
            f"image_of_text must be integers of shape (M,), got {tuple(image_of_text.shape)} of {image_of_text.dtype}"
        )
    wrong = image_of_text[(image_of_text < 0) | (image_of_text >= images)].tolist()
    if wrong:
        raise ValueError(f"image_of_text must be in 0..{images - 1} for {images} images, got {wrong[:5]}")
    lonely = (torch.bincount(image_of_text, minlength=images) == 0).nonzero().flatten().tolist()
    if lonely:
        raise ValueError(
            f"{len(lonely)} of {images} images have no text, the first are {lonely[:5]}: image-to-text recall is not "
            f"defined for them, leave them out"
        )
    if not ks or min(ks) < 1:
        raise ValueError(f"ks must be cut-offs of at least 1, got {tuple(ks)}")
