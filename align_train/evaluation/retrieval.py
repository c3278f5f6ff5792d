"""The retrieval exam: each image finds its captions among all, each caption its image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from align_train.data.testsets import CaptionedSource, ShardPairs
from align_train.distributed import on_all_ranks, on_rank_zero, rank
from align_train.evaluation.accuracy import share_of_hits
from align_train.evaluation.contact_sheet import contact_sheet
from align_train.evaluation.encoder import Encoder
from align_train.evaluation.exam import TIES, Outcome, Score, Value, check_cut_offs
from align_train.evaluation.matched import Matched, embed_captioned
from align_train.metrics import (
    chance_median_rank,
    chance_recall,
    median_interval,
    median_rank,
    retrieval_ranks,
)


@dataclass(frozen=True)
class Retrieval:
    """Recall@k and median rank both ways.

    Attributes:
        data: images with captions: `align_train.data.testsets.Karpathy`, `ShardPairs` or `Table`.
        exclude: leave out images by sidecar column, e.g. {"category": ["Flags"]}; of `ShardPairs` alone.
        ks: cut-offs.
        skip_unusable: leave out and count images that cannot be read or decoded, instead of refusing to score.
        benchmark: flickr30k or coco, where published scores of this very data may stand beside the model's.
    """

    data: CaptionedSource
    exclude: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    ks: Sequence[int] = (1, 5, 10)
    skip_unusable: bool = False
    benchmark: str | None = None

    def check(self) -> None:
        """Open the data."""
        check_cut_offs(self.ks)
        self.data.open()
        if self.exclude:
            self._excluded()

    def take(self, encoder: Encoder) -> Outcome:
        """Embed all images and captions, and rank them against each other."""
        excluded = on_all_ranks(self._excluded) if self.exclude else None
        matched = embed_captioned(self.data, encoder, self.skip_unusable, excluded)
        score = on_rank_zero(lambda: self._score(matched, encoder.device))
        return Outcome(score, partial(contact_sheet, matched) if rank() == 0 else None)

    def _excluded(self) -> Tensor:
        """bool (N,) of the images to leave out."""
        if not isinstance(self.data, ShardPairs):
            raise ValueError(
                f"exclude names {', '.join(self.exclude)}, but only tar shards have sidecars: leave it out for "
                f"{type(self.data).__name__}"
            )
        return self.data.excluded(self.exclude)

    def _score(self, matched: Matched, device: torch.device) -> Score:
        if not len(matched.images):
            raise ValueError(f"no image of {matched.test.name} is left: exclude takes all of them")
        image, text, owner = (x.to(device) for x in (matched.image, matched.text, matched.image_of_text))
        ranks = [x.cpu() for x in retrieval_ranks(image, text, owner)]
        units = [torch.arange(len(matched.image)), matched.image_of_text]
        chance = chance_recall(matched.image_of_text, len(matched.image), self.ks)
        chance |= chance_median_rank(matched.image_of_text, len(matched.image))
        values: dict[str, Value] = {}
        for way, found, unit in zip(("i2t", "t2i"), ranks, units, strict=True):
            values |= {f"{way}_r{k}": share_of_hits(found < k, chance[f"{way}_r{k}"], unit) for k in self.ks}
            median = f"{way}_median_rank"
            values[median] = Value(median_rank(found), *median_interval(found, unit), chance[median])
        return Score("retrieval", values, matched.counts, matched.dropped, {**matched.facts, **self._facts()})

    def _facts(self) -> dict[str, Any]:
        exclude = {column: list(values) for column, values in self.exclude.items()}
        return {"ties": TIES, "excluded": exclude, "benchmark": self.benchmark}
