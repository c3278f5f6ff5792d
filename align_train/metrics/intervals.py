"""Percentile bootstrap intervals (Efron, "Bootstrap methods", Annals of Statistics 7, 1979): how sure a score is.

The same arguments give the same interval on every machine: the draws are NumPy's PCG64 of a fixed seed, on the CPU.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from align_train.metrics.checks import check_integers, check_values

RESAMPLES, LEVEL = 1000, 0.95
DRAWS = 2**18  # held at a time


def mean_interval(
    values: Tensor, groups: Tensor | None = None, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> tuple[float, float]:
    """Interval of the mean of values (N,).

    Args:
        values: (N,) numbers, e.g. hits.
        groups: (N,) integers; values of one group are drawn together, as the captions of an image must be: they are
            not independent. Without it, every value for itself.
        resamples: how many samples are drawn.
        level: the share of the samples' means within.
        seed: of the draws.

    Raises:
        ValueError: shapes do not fit, a value is not finite, no value, a level outside 0 to 1.
    """
    values, group = _grouped(values, groups)
    sums, counts = torch.bincount(group, values), torch.bincount(group).double()

    def means(times: Tensor) -> Tensor:
        return times @ sums / (times @ counts)

    return _interval(means, counts.new_tensor([len(counts)]), resamples, level, seed)


def median_interval(
    ranks: Tensor, groups: Tensor | None = None, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> tuple[float, float]:
    """Interval of `median_rank` of ranks (N,), counted from 1; arguments and errors are those of `mean_interval`."""
    ranks, group = _grouped(ranks, groups)
    ranks, order = ranks.sort()
    group = group[order]

    def medians(times: Tensor) -> Tensor:
        upto = times[:, group].cumsum(1)
        last = upto[:, -1:]
        middle = torch.cat([((last - 1) / 2).floor(), (last / 2).floor()], 1)
        return ranks[torch.searchsorted(upto, middle, right=True)].mean(1).floor() + 1

    return _interval(medians, ranks.new_tensor([int(group.max()) + 1]), resamples, level, seed)


def class_mean_interval(
    values: Tensor, labels: Tensor, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> tuple[float, float]:
    """Interval of `mean_per_class` of values (N,) with labels (N,); drawn within each class, so that none gets empty.

    The other arguments and errors are those of `mean_interval`.
    """
    values, label = _grouped(values, labels)
    label, order = label.sort(stable=True)
    sizes = torch.bincount(label).double()
    share = values[order] / (sizes[label] * len(sizes))
    return _interval(lambda times: times @ share, sizes, resamples, level, seed)


def _grouped(values: Tensor, groups: Tensor | None) -> tuple[Tensor, Tensor]:
    """Values (N,) in float64, and the number of each one's group (N,), 0 to G - 1; on the CPU."""
    check_values("values", values)
    if groups is None:
        return values.double().cpu(), torch.arange(len(values))
    check_integers("groups", groups, "value", len(values))
    return values.double().cpu(), groups.cpu().unique(return_inverse=True)[1]


def _interval(
    statistic: Callable[[Tensor], Tensor], sizes: Tensor, resamples: int, level: float, seed: int
) -> tuple[float, float]:
    """The percentiles of a statistic of N things that leave out equal shares on both sides.

    The things lie in S strata, one after the other, N = sum of sizes (S,); a stratum gives as many draws as it has
    things. `statistic` is given how often each thing is drawn in each of some resamples, (R, N), and gives (R,).
    """
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"level must be between 0 and 1 and resamples at least 1, got {level} and {resamples}")
    random = np.random.default_rng(seed)
    size = sizes.repeat_interleave(sizes.long())
    start = (sizes.cumsum(0) - sizes).long().repeat_interleave(sizes.long())
    one, found = size.new_ones(1, 1), size.new_empty(resamples)
    for part in found.split(max(DRAWS // len(size), 1)):
        shape = len(part), len(size)
        # Below 1 by at least 2^-53, so the product, rounded, stays below the size.
        drawn = torch.from_numpy(random.random(shape)).mul_(size).long().add_(start)
        part.copy_(statistic(size.new_zeros(shape).scatter_add_(1, drawn, one.expand(shape))))
    tail = (1 - level) / 2
    low, high = found.quantile(found.new_tensor([tail, 1 - tail])).tolist()
    return low, high
