"""The linear-probe exam: how well a logistic regression on the image tower's embeddings tells classes apart."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from align_train.data.testsets import LabelledSource
from align_train.distributed import on_rank_zero
from align_train.evaluation.accuracy import accuracies
from align_train.evaluation.embedded import NAMED
from align_train.evaluation.encoder import Encoder
from align_train.evaluation.exam import TIES, Outcome, Score, check_cut_offs
from align_train.evaluation.matched import Labelled, embed_labelled
from align_train.metrics import (
    choose_probe,
    probe_ranks,
    without_class,
)
from align_train.metrics.linear_probe import MOST_FITS
from align_train.records import Tally


@dataclass(frozen=True)
class LinearProbe:
    """Accuracy of multinomial logistic regression on frozen embeddings, its L2 penalty chosen on a validation split.

    Attributes:
        train: images with classes to fit on.
        test: images with classes to score on; classes are matched by name.
        validation: images with classes to choose the penalty by; None takes a share of `train`.
        validation_share: of each class of `train`, where `validation` is None; drawn from `seed`.
        ks: cut-offs; those not below the number of classes are left out.
        skip_unusable: leave out and count images that cannot be read or decoded, instead of refusing to score.
        seed: of the share that is drawn.
        benchmark: imagenet, where published scores of this very data may stand beside the model's.
    """

    train: LabelledSource
    test: LabelledSource
    validation: LabelledSource | None = None
    validation_share: float = 0.1
    ks: Sequence[int] = (1, 5)
    skip_unusable: bool = False
    seed: int = 0
    benchmark: str | None = None

    def check(self) -> None:
        """Open the data."""
        check_cut_offs(self.ks)
        for data in (self.train, self.test, self.validation):
            if data is not None:
                data.open()

    def take(self, encoder: Encoder) -> Outcome:
        """Embed the images of all sets, fit, and score."""
        train, test = (embed_labelled(data, encoder, self.skip_unusable) for data in (self.train, self.test))
        validation = None if self.validation is None else embed_labelled(self.validation, encoder, self.skip_unusable)
        return Outcome(on_rank_zero(lambda: self._score(train, test, validation, encoder.device)))

    def _score(self, train: Labelled, test: Labelled, validation: Labelled | None, device: torch.device) -> Score:
        classes = train.test.classes
        features, labels = train.rows.to(device), train.labels.to(device)
        if validation is None:
            held_out = self._held_out(train.labels).to(device)
            fit, choose = (features[~held_out], labels[~held_out]), (features[held_out], labels[held_out])
        else:
            fit = features, labels
            choose = validation.rows.to(device), _labels(validation, train).to(device)
        asked = _labels(test, train)
        with tqdm(desc="linear probe", unit="fit", total=MOST_FITS, delay=3) as bar:
            probe = choose_probe(fit, choose, progress=lambda *tried: bar.update())
        ranks = probe_ranks(probe, test.rows.to(device), asked.to(device)).cpu()
        values = accuracies(ranks, asked, len(classes), self.ks)
        sets = [train, test, *([validation] if validation else [])]
        facts = {
            **test.facts,
            "training": dict(train.facts),
            "validation": dict(validation.facts) if validation else f"{self.validation_share:g} of the training images",
            "l2": probe.l2,
            "sweep": [list(tried) for tried in probe.sweep],
            "ties": TIES,
            "benchmark": self.benchmark,
        }
        counts = {"images": len(asked), "training_images": len(labels), "classes": len(classes)}
        return Score("linear_probe", values, counts, sum((each.dropped for each in sets), Tally()), facts)

    def _held_out(self, labels: Tensor) -> Tensor:
        """bool (N,): a share of each class with two images or more, one at least."""
        if not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share is {self.validation_share}: give a share between 0 and 1")
        random, mask = torch.Generator().manual_seed(self.seed), torch.zeros(len(labels), dtype=torch.bool)
        for label in labels.unique():
            rows = (labels == label).nonzero().flatten()
            take = min(max(1, round(len(rows) * self.validation_share)), len(rows) - 1)
            mask[rows[torch.randperm(len(rows), generator=random)[:take]]] = True
        if not mask.any():
            raise ValueError(
                "no class of the training set has two images or more, so nothing can be held out to choose the penalty "
                "by: give a validation set"
            )
        return mask


def _labels(asked: Labelled, train: Labelled) -> Tensor:
    """int64 (N,), as `labels_as`; ValueError where training has no image of a class: nothing was fitted for it."""
    classes = train.test.classes
    labels = asked.labels_as(classes)
    if lost := [classes[label] for label in labels[without_class(labels, train.labels)].unique().tolist()]:
        raise ValueError(
            f"{asked.test.name} has images of {len(lost)} classes of which {train.test.name} has none: "
            f"{', '.join(lost[:NAMED])}. Add images of them to train on, or take them out"
        )
    return labels
