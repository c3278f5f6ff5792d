"""Classification by the nearest class embedding: zero-shot, and linear with a bias as one more column."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from align_train.metrics.checks import check_embeddings, check_integers, check_labels, check_same_space, check_values
from align_train.metrics.scores import exact, least_scores, not_below, precision_of, right_scores, wrong_scores


def class_embeddings(prompts: Tensor) -> Tensor:
    """One embedding a class: the mean of its normalised template embeddings, normalised again.

    As in CLIP (Radford et al., arXiv 2103.00020, section 3.1.4: an ensemble over the embedding space).

    Args:
        prompts: (C, T, D), the embeddings of C classes in T templates.

    Returns:
        (C, D), rows of length 1, in float32 or float64.

    Raises:
        ValueError: not (C, T, D), empty, not finite, or the templates of a class cancel each other out.
    """
    if prompts.ndim != 3:
        raise ValueError(f"prompts must be embeddings of shape (C, T, D), got {tuple(prompts.shape)}")
    check_embeddings("prompts", prompts.flatten(0, 1))
    with exact(prompts.device):
        mean = normalize(prompts.to(precision_of(prompts)), dim=-1).mean(1)
        lost = (mean == 0).all(1).nonzero().flatten().tolist()
        if lost:
            raise ValueError(f"the prompts of {len(lost)} classes have the mean zero, the first are classes {lost[:5]}")
        return normalize(mean, dim=-1)


def classification_ranks(image: Tensor, classes: Tensor, labels: Tensor) -> Tensor:
    """How many wrong classes score at least as high as the right one, by dot product; 0 is best, < k is top-k.

    Ties count against the model, as in `retrieval_ranks`.

    Args:
        image: (N, D) embeddings.
        classes: (C, D), one embedding a class.
        labels: (N,) integers, the right classes' rows.

    Returns:
        (N,) int64.

    Raises:
        ValueError: shapes do not fit, a value is not finite, a label is out of range, fewer than two classes.
    """
    labels, index = _checked(image, classes, labels)
    ranks = torch.zeros_like(labels)
    with exact(image.device):
        least = least_scores(right_scores(image, classes, labels), image, classes)
        for rows, _, scores in wrong_scores(image, classes, labels, index):
            ranks[rows] += not_below(scores, least[rows, None], 1)
    return ranks


def predictions(image: Tensor, classes: Tensor, labels: Tensor) -> Tensor:
    """(N,) int64: the right class where it is at rank 0, else the wrong one of the highest score.

    Arguments and errors are those of `classification_ranks`, which it agrees with: a tie is a wrong prediction.
    """
    labels, index = _checked(image, classes, labels)
    with exact(image.device):
        least = least_scores(right_scores(image, classes, labels), image, classes)
        best, found = torch.full_like(least, -torch.inf), labels.clone()
        for rows, columns, scores in wrong_scores(image, classes, labels, index):
            highest, place = scores.nan_to_num(torch.inf, torch.inf, -torch.inf).max(1)
            found[rows] = torch.where(highest > best[rows], place + columns.start, found[rows])
            best[rows] = torch.maximum(highest, best[rows])
    return torch.where(best < least, labels, found)


def mean_per_class(hits: Tensor, labels: Tensor, classes: int) -> float:
    """The mean over the classes of the share of hits: every class counts alike, however many images it has.

    Args:
        hits: (N,) booleans or numbers.
        labels: (N,) integers in 0..classes - 1.
        classes: how many there are.

    Raises:
        ValueError: shapes do not fit, a label is out of range, a class has no image.
    """
    check_values("hits", hits)
    check_integers("labels", labels, "hit", len(hits))
    images = _images(labels, classes)
    return (torch.bincount(labels, hits.double(), minlength=classes) / images).mean().item()


@dataclass(frozen=True)
class Confusion:
    """What the images of a class were taken for.

    Attributes:
        label: the class.
        images: how many it has.
        correct: the share that was taken for it.
        taken_for: the wrong classes and their shares of the images, the most frequent first.
    """

    label: int
    images: int
    correct: float
    taken_for: tuple[tuple[int, float], ...]


def confusions(predicted: Tensor, labels: Tensor, classes: int, worst: int = 10, most: int = 3) -> list[Confusion]:
    """The `worst` classes, the worst first, each with at most `most` wrong classes; equal ones in order of number.

    Classes without images are none of them, but others may be taken for them.

    Args:
        predicted: (N,) classes from `predictions`.
        labels: (N,) right classes.
        classes: how many there are.
        worst: how many classes are told of.
        most: how many wrong classes are told of each.

    Raises:
        ValueError: shapes do not fit, a class is out of range.
    """
    check_labels(predicted, classes)
    check_integers("labels", labels, "prediction", len(predicted))
    check_labels(labels, classes)
    images = torch.bincount(labels, minlength=classes)
    correct = torch.bincount(labels[predicted == labels], minlength=classes) / images  # nan, without images, comes last
    found = []
    for label in correct.argsort(stable=True)[: min(worst, int((images > 0).sum()))].tolist():
        taken = torch.bincount(predicted[labels == label], minlength=classes)
        taken[label] = 0
        order = taken.argsort(descending=True, stable=True)[:most]
        shares = [(wrong, int(taken[wrong]) / int(images[label])) for wrong in order.tolist() if taken[wrong]]
        found.append(Confusion(label, int(images[label]), correct[label].item(), tuple(shares)))
    return found


def _images(labels: Tensor, classes: int) -> Tensor:
    """(C,) how many images each class has.

    Raises:
        ValueError: a label is out of range, a class has none.
    """
    check_labels(labels, classes)
    images = torch.bincount(labels, minlength=classes)
    empty = (images == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"{len(empty)} of {classes} classes have no image, the first are {empty[:5]}: leave them out of the classes"
        )
    return images


def _checked(image: Tensor, classes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The labels (N,) and the numbers of the classes (C,) on the images' device, once all arguments fit."""
    check_same_space(image=image, classes=classes)
    check_integers("labels", labels, "image", len(image))
    check_labels(labels, len(classes))
    return labels.to(image.device, torch.int64), torch.arange(len(classes), device=image.device)
