"""Linear probe: multinomial logistic regression on frozen features, its penalty chosen on a validation split.

    sum_n -log softmax(W x_n + b)[y_n] + l2 / 2 |W|^2

which is scikit-learn's `LogisticRegression(C=1 / l2)`; the bias b is not penalised. The l2 is searched for as in CLIP
(Radford et al., arXiv 2103.00020, appendix A.3): 1e-6 to 1e6 in 96 logarithmic steps, by parametric binary search.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from align_train.metrics.checks import check_integers, check_same_space
from align_train.metrics.classification import classification_ranks
from align_train.metrics.scores import exact, precision_of

# CLIP's first round, then the interval around the best is halved down to 8 steps a decade; exponents of ten.
FIRST_ROUND = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)
HALVINGS = (1.0, 0.5, 0.25, 0.125)
MOST_FITS = len(FIRST_ROUND) + 2 * len(HALVINGS)
MAX_STEPS = 1000  # of L-BFGS, as in CLIP
LOGITS = 2**23  # held at a time


@dataclass(frozen=True)
class Probe:
    """A fitted probe.

    Attributes:
        weight: W, (C, D).
        bias: b, (C,).
        labels: (C,) the classes' labels in rising order.
        l2: the penalty it was fitted with.
        sweep: what was tried, in rising order: l2 and the validation accuracy.
    """

    weight: Tensor
    bias: Tensor
    labels: Tensor
    l2: float
    sweep: tuple[tuple[float, float], ...] = ()


def choose_probe(
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    refit: bool = True,
    max_steps: int = MAX_STEPS,
    progress: Callable[[float, float], object] | None = None,
) -> Probe:
    """Fit with the l2 of the highest validation accuracy; of equal ones, the largest.

    Every fit starts from that of the nearest l2. All happens on the features' device, in their float32 or float64.

    Args:
        train: features (N, D) and integer labels (N,).
        validation: likewise.
        refit: fit once more on train and validation together, with the chosen l2, as CLIP does.
        max_steps: of L-BFGS at most, in each fit.
        progress: called with every l2 and its validation accuracy, at most MOST_FITS times.

    Raises:
        ValueError: shapes do not fit, a value is not finite, one class only, a class of `validation` is not in `train`.
    """
    check_same_space(train=train[0], validation=validation[0])
    tried: dict[float, tuple[float, Probe]] = {}

    def best() -> float:
        return max(tried, key=lambda exponent: (tried[exponent][0], exponent))

    def attempt(exponent: float) -> None:
        near = min(tried, key=lambda other: abs(other - exponent)) if tried else None
        start = None if near is None else tried[near][1]
        probe = fit_probe(*train, 10**exponent, start, max_steps)
        accuracy = (probe_ranks(probe, *validation) == 0).double().mean().item()
        tried[exponent] = accuracy, probe
        if progress is not None:
            progress(probe.l2, accuracy)

    for exponent in reversed(FIRST_ROUND):  # the strongest penalty is the easiest fit
        attempt(exponent)
    for step in HALVINGS:
        middle = best()
        for exponent in (middle + step, middle - step):
            if FIRST_ROUND[0] <= exponent <= FIRST_ROUND[-1] and exponent not in tried:
                attempt(exponent)
    probe = tried[best()][1]
    if refit:
        features, labels = (torch.cat([a, b.to(a.device)]) for a, b in zip(train, validation, strict=True))
        probe = fit_probe(features, labels, probe.l2, probe, max_steps)
    return replace(probe, sweep=tuple((10**exponent, tried[exponent][0]) for exponent in sorted(tried)))


def fit_probe(
    features: Tensor, labels: Tensor, l2: float, start: Probe | None = None, max_steps: int = MAX_STEPS
) -> Probe:
    """The minimum of the objective above by full-batch L-BFGS, a block of rows at a time.

    Args:
        features: (N, D).
        labels: (N,) integers of at least two classes.
        l2: above 0.
        start: a probe of the same classes to start from; else zeros. The minimum is the same.
        max_steps: where to stop at the latest.

    Raises:
        ValueError: shapes do not fit, a value is not finite, one class only, l2 is not positive.
    """
    check_same_space(features=features)
    check_integers("labels", labels, "row of features", len(features))
    if l2 <= 0:
        raise ValueError(f"l2 must be above 0, got {l2}: without a penalty separable classes have no best probe")
    known, target = labels.to(features.device).unique(return_inverse=True)
    if len(known) < 2:
        raise ValueError(f"all {len(labels)} rows are of class {int(known[0])}: a probe needs at least 2 classes")
    dtype = precision_of(features)
    weight = features.new_zeros(len(known), features.shape[1], dtype=dtype) if start is None else start.weight.clone()
    bias = features.new_zeros(len(known), dtype=dtype) if start is None else start.bias.clone()
    with exact(features.device):
        _minimise(weight, bias, features, target, l2, max_steps)
    return Probe(weight, bias, known, l2)


def probe_ranks(probe: Probe, features: Tensor, labels: Tensor) -> Tensor:
    """(N,) how many wrong classes score at least as high as the right one: `classification_ranks` of W x + b.

    Raises:
        ValueError: shapes do not fit, a value is not finite, a label that the probe was not fitted to.
    """
    check_same_space(features=features, weight=probe.weight)
    check_integers("labels", labels, "row of features", len(features))
    labels = labels.to(probe.labels.device)
    unknown = labels[~torch.isin(labels, probe.labels)].unique().tolist()
    if unknown:
        raise ValueError(
            f"{len(unknown)} classes are not among the {len(probe.labels)} of the probe's training data, the first "
            f"are {unknown[:5]}: leave them out, or train on them"
        )
    ones = features.new_ones(len(features), 1)
    classes = torch.cat([probe.weight, probe.bias[:, None]], 1)
    return classification_ranks(torch.cat([features, ones], 1), classes, torch.searchsorted(probe.labels, labels))


def _minimise(weight: Tensor, bias: Tensor, features: Tensor, target: Tensor, l2: float, max_steps: int) -> None:
    """Move weight (C, D) and bias (C,) to the minimum of the objective, divided by N so that steps are of one scale."""
    rows, shape = max(LOGITS // len(weight), 1), len(features)
    parameters = [nn.Parameter(x, requires_grad=False) for x in (weight, bias)]
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=max_steps,
        max_eval=2 * max_steps,
        history_size=20,
        tolerance_grad=1e-6,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        """The loss, (); its gradient, written by hand, needs no more than a block of logits."""
        loss = l2 / 2 * weight.double().square().sum()
        by_weight, by_bias = l2 * weight, torch.zeros_like(bias)
        for some, right in zip(features.split(rows), target.split(rows), strict=True):
            x = some.to(weight.dtype)
            log = torch.addmm(bias, x, weight.T).log_softmax(1)
            loss -= log.gather(1, right[:, None]).sum(dtype=torch.float64)
            wrong = log.exp_()
            wrong[torch.arange(len(right), device=right.device), right] -= 1
            by_weight += wrong.T @ x
            by_bias += wrong.sum(0)
        for parameter, gradient in zip(parameters, (by_weight, by_bias), strict=True):
            parameter.grad = gradient / shape
        return loss / shape

    optimizer.step(objective)
