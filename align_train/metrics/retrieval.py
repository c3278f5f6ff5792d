"""Retrieval of texts by images and of images by texts."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from math import floor, prod

import torch
from torch import Tensor

from align_train.metrics.checks import check_cut_offs, check_integers, check_pairing, check_same_space, check_values
from align_train.metrics.scores import exact, least_scores, not_below, right_scores, wrong_scores


def retrieval_ranks(image: Tensor, text: Tensor, image_of_text: Tensor) -> tuple[Tensor, Tensor]:
    """The ranks of image-to-text and text-to-image retrieval by dot product; 0 is best.

    A rank is the number of wrong candidates that score at least as high as the query's best right one, so ties count
    against the model (`scores.py` says what a tie is): embeddings that are all the same have the worst rank. An
    image's other texts are not wrong. The full matrix is never held, and computed once for both ways.

    Args:
        image: (N, D) embeddings, L2-normalised for cosine similarity.
        text: (M, D) embeddings, likewise.
        image_of_text: (M,) integers; text[j] describes image[image_of_text[j]].

    Returns:
        (N,) and (M,) int64, of the images and of the texts.

    Raises:
        ValueError: shapes do not fit, a value is not finite, an index is out of range, an image has no text.
    """
    check_same_space(image=image, text=text)
    check_integers("image_of_text", image_of_text, "text", len(text))
    image_of_text = image_of_text.to(text.device, torch.int64)
    check_pairing(image_of_text, len(image))
    index = torch.arange(len(image), device=image.device)
    image_rank, text_rank = torch.zeros_like(index), torch.zeros_like(image_of_text)
    with exact(image.device):
        right = right_scores(text, image, image_of_text)
        best = torch.full_like(index, -torch.inf, dtype=right.dtype).scatter_reduce(0, image_of_text, right, "amax")
        image_least, text_least = least_scores(best, image, text), least_scores(right, text, image)
        for rows, columns, scores in wrong_scores(image, text, index, image_of_text):
            image_rank[rows] += not_below(scores, image_least[rows, None], 1)
            text_rank[columns] += not_below(scores, text_least[columns], 0)
    return image_rank, text_rank


def recall_at(ranks: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[int, float]:
    """The share of ranks (N,) below each k: Recall@k, or top-k accuracy.

    Raises:
        ValueError: no rank, or a k < 1.
    """
    check_values("ranks", ranks)
    check_cut_offs(ks)
    return {k: (ranks < k).double().mean().item() for k in ks}


def median_rank(ranks: Tensor) -> float:
    """The median of ranks (N,), counted from 1: floor(median) + 1, where the best rank is 0.

    As in the code of VSE++ (Faghri et al., BMVC 2018; `evaluation.py`), which later papers follow. The median of an
    even number is the mean of the two in the middle.

    Raises:
        ValueError: no rank.
    """
    check_values("ranks", ranks)
    return float(floor(ranks.double().quantile(0.5).item()) + 1)


def retrieval_recall(
    image: Tensor, text: Tensor, image_of_text: Tensor, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Recall@k of `retrieval_ranks`; an image with several texts is a hit if any of them is.

    Args:
        image: (N, D) embeddings.
        text: (M, D) embeddings.
        image_of_text: (M,) integers.
        ks: cut-offs; 1, 5 and 10 are those of the Karpathy-split literature.

    Returns:
        `{"i2t_r1": ..., "i2t_r5": ..., "t2i_r1": ..., ...}`, fractions in [0, 1].

    Raises:
        ValueError: as `retrieval_ranks`, or a k < 1.
    """
    check_cut_offs(ks)
    ways = zip(("i2t", "t2i"), retrieval_ranks(image, text, image_of_text), strict=True)
    return {f"{way}_r{k}": share for way, ranks in ways for k, share in recall_at(ranks, ks).items()}


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
    check_pairing(image_of_text, images)
    check_cut_offs(ks)
    images_with = Counter(torch.bincount(image_of_text, minlength=images).tolist())
    recall = {f"i2t_r{k}": _chance_image_to_text(images_with, k) for k in ks}
    return recall | {f"t2i_r{k}": min(k, images) / images for k in ks}


def chance_median_rank(image_of_text: Tensor, images: int) -> dict[str, float]:
    """The `median_rank` of a random order: the least k whose `chance_recall` is a half.

    Returns:
        `{"i2t_median_rank": ..., "t2i_median_rank": ...}`.

    Raises:
        ValueError: an index is out of range, an image has no text.
    """
    check_pairing(image_of_text, images)
    images_with = Counter(torch.bincount(image_of_text, minlength=images).tolist())
    texts = range(1, len(image_of_text) + 1)
    half = bisect_left(texts, 0.5, key=lambda k: _chance_image_to_text(images_with, k))
    return {"i2t_median_rank": float(texts[half]), "t2i_median_rank": float((images + 1) // 2)}


def _chance_image_to_text(images_with: Counter[int], k: int) -> float:
    """Mean chance that one of an image's c texts is among k of all M, given how many images have c texts."""
    texts, images = sum(c * count for c, count in images_with.items()), images_with.total()
    # C(M - c, k) / C(M, k) with its factors cancelled; the binomials of a million have 300,000 digits.
    missed = (
        count * prod(max(texts - k - i, 0) / (texts - i) for i in range(captions))
        for captions, count in images_with.items()
    )
    return 1 - sum(missed) / images
