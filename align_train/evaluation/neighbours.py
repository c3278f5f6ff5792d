"""The nearest-neighbour exam: each test image finds training images of its class, by the image tower alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from align_train.data.testsets import LabelledSource
from align_train.distributed import on_rank_zero
from align_train.evaluation.accuracy import share_of_hits
from align_train.evaluation.encoder import Encoder
from align_train.evaluation.exam import TIES, Outcome, Score, check_cut_offs
from align_train.evaluation.matched import Labelled, embed_labelled
from align_train.metrics import neighbour_ranks, without_class
from align_train.records import Tally

TOGETHER = 4096  # test images that are compared at a time, between two signs of progress


@dataclass(frozen=True)
class Neighbours:
    """Recall@K: the share of test images of whose K nearest training images one at least is of their class.

    Recall@1 on ImageNet is the number by which kakaobrain/coyo-align follows a training.

    Attributes:
        train: images with classes, among which neighbours are looked for.
        test: images with classes; classes are matched by name.
        ks: cut-offs.
        skip_unusable: leave out and count images that cannot be read or decoded, instead of refusing to score.
        benchmark: imagenet, where published scores of this very data may stand beside the model's.
    """

    train: LabelledSource
    test: LabelledSource
    ks: Sequence[int] = (1, 5, 10, 20)
    skip_unusable: bool = False
    benchmark: str | None = None

    def check(self) -> None:
        """Open the data."""
        check_cut_offs(self.ks)
        self.train.open()
        self.test.open()

    def take(self, encoder: Encoder) -> Outcome:
        """Embed the images of both sets, and compare."""
        train, test = (embed_labelled(data, encoder, self.skip_unusable) for data in (self.train, self.test))
        return Outcome(on_rank_zero(lambda: self._score(train, test, encoder.device)))

    def _score(self, train: Labelled, test: Labelled, device: torch.device) -> Score:
        labels = test.labels_as(train.test.classes)
        query, bank, of_query, of_bank = (x.to(device) for x in (test.rows, train.rows, labels, train.labels))
        ranks = []
        with tqdm(total=len(query), desc="neighbours", unit="image", delay=3) as bar:
            for some, theirs in zip(query.split(TOGETHER), of_query.split(TOGETHER), strict=True):
                ranks.append(neighbour_ranks(some, bank, theirs, of_bank, max(self.ks)).cpu())
                bar.update(len(some))
        chance = _chance(labels, train.labels, self.ks)
        values = {f"r{k}": share_of_hits(torch.cat(ranks) < k, chance[k]) for k in self.ks}
        counts = {
            "images": len(labels),
            "training_images": len(train.labels),
            "classes": len(train.test.classes),
            "images_of_classes_without_training_images": int(without_class(labels, train.labels).sum()),
        }
        facts = {**test.facts, "training": dict(train.facts), "ties": TIES, "benchmark": self.benchmark}
        return Score("neighbours", values, counts, Tally(train.dropped + test.dropped), facts)


def _chance(labels: Tensor, bank: Tensor, ks: Sequence[int]) -> dict[int, float]:
    """The share of hits where the nearest are drawn at random: 1 - (1 - p)^k for a class that is p of all."""
    share = (torch.bincount(bank, minlength=int(labels.max()) + 1).double() / len(bank))[labels]
    return {k: (1 - (1 - share) ** k).mean().item() for k in ks}
