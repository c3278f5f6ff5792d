"""Accuracies of a classification, the same for every exam that names classes."""

from collections.abc import Sequence

from torch import Tensor

from align_train.evaluation.exam import Value
from align_train.metrics import class_mean_interval, mean_interval, mean_per_class


def accuracies(ranks: Tensor, labels: Tensor, classes: int, ks: Sequence[int]) -> dict[str, Value]:
    """Top-k for each k below the number of classes, and the mean of top-1 over the classes that have images.

    Args:
        ranks: (N,), how many wrong classes come before the right one.
        labels: int64 (N,), the right ones.
        classes: how many there are to choose from.
        ks: cut-offs.
    """
    values = {f"top{k}": share_of_hits(ranks < k, k / classes) for k in ks if k < classes}
    right, (there, present) = ranks < 1, labels.unique(return_inverse=True)
    mean = mean_per_class(right, present, len(there))
    return values | {"mean_per_class": Value(mean, *class_mean_interval(right, labels), 1 / classes)}


def share_of_hits(hits: Tensor, chance: float, groups: Tensor | None = None) -> Value:
    """The mean of hits, bool (N,); those of one of `groups`, int64 (N,), are drawn together for its interval."""
    return Value(hits.double().mean().item(), *mean_interval(hits, groups), chance)
