"""The linear probe against scikit-learn's logistic regression."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from align_train.metrics import choose_probe, fit_probe, linear_probe, probe_ranks


def examples(rows: int, seed: int, classes: int = 4, width: int = 6) -> tuple[Tensor, Tensor]:
    """Overlapping classes, labels 10, 20, ..., features (rows, width) in float64."""
    center = torch.randn(classes, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    random = torch.Generator().manual_seed(seed)
    label = torch.arange(rows) % classes
    features = center[label] + 1.2 * torch.randn(rows, width, generator=random, dtype=torch.float64)
    return features, 10 * (label + 1)


@pytest.mark.parametrize("l2", [0.01, 1.0, 100.0])
def test_coefficients_equal_those_of_scikit_learn(l2):
    features, labels = examples(200, seed=1)
    theirs = LogisticRegression(C=1 / l2, tol=1e-8, max_iter=10_000).fit(features.numpy(), labels.numpy())
    ours = fit_probe(features, labels, l2)
    assert ours.labels.tolist() == theirs.classes_.tolist()
    assert np.abs(ours.weight.numpy() - theirs.coef_).max() < 1e-3
    # A constant added to every class's bias changes nothing.
    bias = ours.bias - ours.bias.mean()
    assert np.abs(bias.numpy() - (theirs.intercept_ - theirs.intercept_.mean())).max() < 1e-3
    single = fit_probe(features.float(), labels, l2)
    assert single.weight.dtype == torch.float32
    probability = (features.float() @ single.weight.T + single.bias).softmax(1)
    assert np.abs(probability.numpy() - theirs.predict_proba(features.numpy())).max() < 1e-3


def test_two_classes_equal_a_multinomial_of_two():
    # scikit-learn has one vector for two classes, v; ours are two of |w|^2 each, v = w1 - w0, so half its penalty.
    features, labels = examples(100, seed=2, classes=2)
    theirs = LogisticRegression(C=1 / 0.5, tol=1e-8, max_iter=10_000).fit(features.numpy(), labels.numpy())
    ours = fit_probe(features, labels, 1.0)
    assert np.abs((ours.weight[1] - ours.weight[0]).numpy() - theirs.coef_[0]).max() < 1e-3


def test_accuracy_equals_scikit_learns_and_ranks_go_beyond():
    features, labels = examples(200, seed=1)
    test, right = examples(90, seed=5)
    theirs = LogisticRegression(C=1.0, tol=1e-8, max_iter=10_000).fit(features.numpy(), labels.numpy())
    ranks = probe_ranks(fit_probe(features, labels, 1.0), test, right)
    assert (ranks == 0).double().mean().item() == pytest.approx(theirs.score(test.numpy(), right.numpy()))
    order = (-theirs.predict_proba(test.numpy())).argsort(1)
    assert ranks.tolist() == (theirs.classes_[order] == right.numpy()[:, None]).argmax(1).tolist()


def test_neither_blocks_nor_the_start_nor_autocast_change_the_fit(monkeypatch):
    features, labels = examples(100, seed=1)
    expected = fit_probe(features, labels, 0.3)
    warm = fit_probe(features, labels, 0.3, start=fit_probe(features, labels, 30.0))
    assert (warm.weight - expected.weight).abs().max() < 1e-4
    monkeypatch.setattr(linear_probe, "LOGITS", 4 * 7)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        parted = fit_probe(features, labels, 0.3)
    assert (parted.weight - expected.weight).abs().max() < 1e-6


def test_the_sweep_takes_the_best_penalty_and_refits_on_both_parts():
    train, validation = examples(60, seed=1), examples(80, seed=2)
    seen: list[tuple[float, float]] = []
    probe = choose_probe(train, validation, progress=lambda l2, accuracy: seen.append((l2, accuracy)))
    assert probe.sweep == tuple(sorted(seen))
    assert 7 <= len(seen) <= 15
    assert {1e-6, 1e-4, 1e-2, 1.0, 1e2, 1e4, 1e6} <= {l2 for l2, _ in seen}
    best = max(accuracy for _, accuracy in seen)
    assert probe.l2 == max(l2 for l2, accuracy in seen if accuracy == best)
    # The last halving leaves an eighth of a decade beside the best.
    assert min(abs(np.log10(l2 / probe.l2)) for l2, _ in seen if l2 != probe.l2) == pytest.approx(0.125)
    both = fit_probe(*(torch.cat(parts) for parts in zip(train, validation, strict=True)), probe.l2)
    assert (probe.weight - both.weight).abs().max() < 1e-3
    alone = choose_probe(train, validation, refit=False)
    assert (alone.weight - fit_probe(*train, alone.l2).weight).abs().max() < 1e-3
    for l2, accuracy in probe.sweep[::5]:
        assert accuracy == (probe_ranks(fit_probe(*train, l2), *validation) == 0).double().mean()


def test_the_probe_rejects_what_it_cannot_answer():
    (features, labels), validation = examples(20, seed=1), examples(8, seed=2)
    with pytest.raises(ValueError, match="all 20 rows are of class 10: a probe needs at least 2 classes"):
        fit_probe(features, labels * 0 + 10, 1.0)
    with pytest.raises(ValueError, match="l2 must be above 0"):
        fit_probe(features, labels, 0.0)
    with pytest.raises(ValueError, match="features must be embeddings"):
        fit_probe(features[:0], labels[:0], 1.0)
    with pytest.raises(ValueError, match="labels has 19 entries, but there are 20"):
        fit_probe(features, labels[:19], 1.0)
    with pytest.raises(ValueError, match=r"2 classes are not among the 4 .* the first are \[11, 21\]"):
        choose_probe((features, labels), (validation[0], validation[1] + (validation[1] < 30)))
    with pytest.raises(ValueError, match="validation must be embeddings"):
        choose_probe((features, labels), (validation[0][:0], validation[1][:0]))
