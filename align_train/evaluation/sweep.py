"""WiSE-FT: weights between the start of a fine-tuning and its end, their exams, and which of them to recommend.

Robust fine-tuning of zero-shot models, arXiv 2109.01903.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from align_train.distributed import rank
from align_train.evaluation.taking import is_known_by
from align_train.models import interpolate

ROUNDING = 1e-9  # shares of 1 that are nearer to each other than this are equal
# Scores of which less is better, or that are no shares of 1: a mean of them with recall says nothing.
_NO_SHARES = re.compile(r"\w+_rank|alignment|modality_gap|(uniformity|mean_cosine|effective_rank)_\w+")
_KEY = "forgetting"


@dataclass(frozen=True)
class Point:
    """The scores of one alpha.

    Attributes:
        alpha: 0 is the start of the fine-tuning, 1 its end.
        new: mean of the scores on the new data, a share of 1.
        guard: mean of those on what should not be forgotten; None where nothing is guarded.
        scores: these by metric, and what other exams are known by, which nothing is chosen by.

    Raises:
        ValueError: a score is NaN or no share of 1.
    """

    alpha: float
    new: float
    guard: float | None
    scores: Mapping[str, float]

    def __post_init__(self) -> None:
        for name, value in self.scores.items():
            if not 0 <= value <= 1:  # NaN is not
                raise ValueError(
                    f"{name} is {value} at alpha {self.alpha:g}, no share of 1: nothing can be recommended by it. "
                    f"Name other metrics in {_KEY}.new and {_KEY}.guard, or look at that exam"
                )


@dataclass(frozen=True)
class Forgetting:
    """What a fine-tuned model should be good at, what it should not forget, and how much it may.

    Attributes:
        new: metrics, exam/NAME/VALUE, that say how good it is on the new data; shares of 1 of which more is better.
        guard: metrics, likewise, of what it should not forget.
        most_loss: of the mean of `guard`, against the start, that may be lost; a share of 1: 0.01 is one point.
        alphas: what is tried between the start, 0, and the end, 1; both are among them.

    Raises:
        ValueError: a metric is not named so, or less of it is better; alphas or most_loss are out of bounds.
    """

    new: Sequence[str]
    guard: Sequence[str] = ()
    most_loss: float = 0.01
    alphas: Sequence[float] = tuple(n / 10 for n in range(11))

    def __post_init__(self) -> None:
        _check_metrics(f"{_KEY}.new", self.new)
        _check_metrics(f"{_KEY}.guard", self.guard)
        if not self.new:
            raise ValueError(f"{_KEY}.new=[] names no metric: name one of the new data, such as exam/own/i2t_r1")
        if twice := sorted({name for name in self.names if self.names.count(name) > 1}):
            raise ValueError(f"{_KEY}.new and {_KEY}.guard name {twice[0]} twice: name each metric once")
        if not 0 <= self.most_loss < 1:
            raise ValueError(f"{_KEY}.most_loss={self.most_loss} is no share of 1: 0.01 is one point of a hundred")
        alphas = list(self.alphas) if isinstance(self.alphas, Sequence) else [self.alphas]
        if alphas != sorted(set(alphas)) or alphas[:1] != [0] or alphas[-1] != 1:
            raise ValueError(
                f"{_KEY}.alphas={alphas}: give numbers that go up from 0 to 1, such as [0,0.25,0.5,0.75,1]"
            )

    @property
    def names(self) -> list[str]:
        """All metrics, those of the new data first."""
        return [*self.new, *self.guard]

    def check_names(self, exams: Collection[str]) -> None:
        """Raise ValueError unless the metrics are of these exams; which values they give is known once they are taken.

        Args:
            exams: names.
        """
        for name in self.names:
            if name.split("/")[1] not in exams:
                there = ", ".join(sorted(exams)) or "none"
                raise ValueError(f"{_key_of(self, name)}={name}, but no exam has that name; there are: {there}")

    def point(self, alpha: float, metrics: Mapping[str, float]) -> Point:
        """The scores of one alpha.

        Args:
            alpha: of the weights.
            metrics: of their exams, as `metrics_of` gives them.

        Raises:
            ValueError: a metric is not among them; says which are.
        """
        for name in self.names:
            if name not in metrics:
                there = ", ".join(sorted(each for each in metrics if not _NO_SHARES.fullmatch(each.split("/")[-1])))
                raise ValueError(f"{_key_of(self, name)}={name}, which no exam gives; there are: {there or 'none'}")
        others = [name for name in metrics if is_known_by(name) and name not in self.names]
        scores = {name: float(metrics[name]) for name in [*self.names, *others]}
        guard = fmean(scores[name] for name in self.guard) if self.guard else None
        return Point(alpha, fmean(scores[name] for name in self.new), guard, scores)


@dataclass(frozen=True)
class Recommendation:
    """An alpha, and a sentence that says why."""

    alpha: float
    because: str


def sweep(
    settings: Forgetting,
    model: nn.Module,
    start: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
    take: Callable[[], Mapping[str, float]],
    known: Mapping[float, Mapping[str, float]] | None = None,
) -> list[Point]:
    """Take the exams of each alpha's weights; every rank must call it, and gets all points.

    The model is left with the weights of `end`, also after an error. Batch norm's statistics lie between those of start
    and end as the weights do; a `take` that measures them anew is to be followed by an export that does so too.

    Args:
        settings: which alphas, and which metrics count.
        model: what the weights are loaded into.
        start: its state dict before the fine-tuning.
        end: the one after it, on the same device; may be the model's own, which is copied first.
        take: takes the exams of the model as it is; gives metrics as `metrics_of` does.
        known: metrics by alpha of exams that were taken already: those of 0 and 1.

    Raises:
        ValueError: a metric of `settings` is not among what `take` gives, or is no share of 1.
    """
    known, end = known or {}, {name: tensor.clone() for name, tensor in end.items()}
    points = []
    try:
        for alpha in tqdm(settings.alphas, desc="sweep", unit="alpha", delay=3, disable=rank() != 0):
            if alpha not in known:
                model.load_state_dict(interpolate(start, end, alpha))
            points.append(settings.point(alpha, known[alpha] if alpha in known else take()))
    finally:
        model.load_state_dict(end)
    return points


def recommend(settings: Forgetting, points: Sequence[Point]) -> Recommendation:
    """The alpha that is best on the new data among those that lose at most `most_loss` on the guard set.

    Of equal ones the smallest, which is nearest to the start. WiSE-FT chooses alpha on a validation set; here the data
    of the exams are that set, so the scores of the chosen alpha are optimistic on them: the best of several draws.

    Args:
        settings: those of the sweep.
        points: all of a sweep; that of alpha 0 first.
    """
    guard = points[0].guard
    kept = [point for point in points if guard is None or guard - (point.guard or 0.0) <= settings.most_loss + ROUNDING]
    best = max(point.new for point in kept)
    alpha = next(point.alpha for point in kept if point.new >= best - ROUNDING)
    return Recommendation(alpha, _because(settings, len(points), len(kept), alpha))


def as_result(
    settings: Forgetting, points: Sequence[Point], recommendation: Recommendation, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """result.json's "finetuning".

    Args:
        settings: those of the sweep.
        points: all of it.
        recommendation: of these points.
        facts: `start`, `start_weights_sha256` and `pairs`, counts of the pairs that were trained on; plain values.
    """
    return {
        **facts,
        "new": list(settings.new),
        "guard": list(settings.guard),
        "most_loss": settings.most_loss,
        "points": [{"alpha": p.alpha, "new": p.new, "guard": p.guard, "scores": dict(p.scores)} for p in points],
        "recommended": recommendation.alpha,
        "because": recommendation.because,
    }


def _check_metrics(key: str, names: Sequence[str]) -> None:
    if isinstance(names, str):
        raise ValueError(f"{key}={names} is no list: write {key}=[{names}]")
    for name in names:
        if not re.fullmatch(r"exam/[^/]+/[^/]+", name):
            raise ValueError(f"{key} names {name}: a metric is exam/NAME/VALUE, such as exam/own/i2t_r1")
        if _NO_SHARES.fullmatch(name.split("/")[2]):
            raise ValueError(
                f"{key} names {name}, which is no share of 1 of which more is better: name recalls or accuracies, "
                "such as i2t_r1, r1 or top1"
            )


def _key_of(settings: Forgetting, name: str) -> str:
    return f"{_KEY}.{'new' if name in settings.new else 'guard'}"


def _because(settings: Forgetting, tried: int, kept: int, alpha: float) -> str:
    points = f"{100 * settings.most_loss:.4g}"
    points += " point" if points == "1" else " points"
    if not settings.guard:
        end = "no guard set was named, so nothing says what was forgotten"
        if alpha == 0:
            return f"none of the {tried} alphas is better on the new data than 0, the start itself; {end}"
        return f"of the {tried} alphas, {alpha:g} is best on the new data; {end}"
    if kept == 1:
        return (
            f"every alpha above 0 loses more than {points} on the guard set, so 0, the start itself, is recommended: "
            f"train for fewer steps or at a lower learning rate, or allow more with {_KEY}.most_loss"
        )
    counted = f"of the {tried} alphas, {kept} lose at most {points} on the guard set; "
    if alpha == 0:
        return f"{counted}of these none is better on the new data than 0, the start itself"
    return f"{counted}of these {alpha:g} is best on the new data"
