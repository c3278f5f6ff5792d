"""What embeddings look like, whatever they are good for: numbers to follow, not to compare models by."""

from dataclasses import dataclass

import torch

from align_train.data.testsets import CaptionedSource
from align_train.distributed import on_rank_zero
from align_train.evaluation.encoder import Encoder
from align_train.evaluation.exam import Outcome, Score, Value
from align_train.evaluation.matched import Matched, embed_captioned
from align_train.metrics import alignment, effective_rank, mean_cosine, mean_interval, modality_gap, uniformity


@dataclass(frozen=True)
class Health:
    """Alignment, uniformity, modality gap, mean cosine and effective rank of both towers.

    An image with several captions is in several pairs, but one image where images are held against each other.

    Attributes:
        data: images with captions.
        pairs: most pairs that are looked at, evenly spread over the captions: uniformity and effective rank depend on
            their number, and take time in its square.
        skip_unusable: leave out and count images that cannot be read or decoded, instead of refusing.

    Raises:
        ValueError: fewer than two pairs are wanted.
    """

    data: CaptionedSource
    pairs: int = 5000
    skip_unusable: bool = False

    def __post_init__(self) -> None:
        if self.pairs < 2:
            raise ValueError(f"pairs is {self.pairs}: give at least 2, since most numbers compare pairs")

    def check(self) -> None:
        """Open the data."""
        self.data.open()

    def take(self, encoder: Encoder) -> Outcome:
        """Embed, and measure."""
        matched = embed_captioned(self.data, encoder, self.skip_unusable)
        return Outcome(on_rank_zero(lambda: self._score(matched, encoder.device)))

    def _score(self, matched: Matched, device: torch.device) -> Score:
        total = len(matched.captions)
        chosen = torch.arange(0, total, max(1, -(-total // self.pairs)))
        owner = matched.image_of_text[chosen]
        text, image = matched.text[chosen].to(device), matched.image[owner].to(device)
        apart = (image - text).square().sum(1).cpu()
        values = {"alignment": Value(alignment(image, text), *mean_interval(apart))}
        for name, rows in (("image", matched.image[owner.unique()].to(device)), ("text", text)):
            values[f"uniformity_{name}"] = Value(uniformity(rows))
            values[f"mean_cosine_{name}"] = Value(mean_cosine(rows))
            values[f"effective_rank_{name}"] = Value(effective_rank(rows))
        values["modality_gap"] = Value(modality_gap(image, text))
        counts = {**matched.counts, "pairs": len(chosen), "dimensions": image.shape[1]}
        return Score("health", values, counts, matched.dropped, matched.facts)
