"""The exam of a classifier: how many images a trained linear head names right."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from align_train.data.testsets import LabelledSource
from align_train.distributed import on_all_ranks, on_rank_zero
from align_train.evaluation.accuracy import accuracies
from align_train.evaluation.encoder import Encoder
from align_train.evaluation.exam import TIES, Outcome, Score, check_cut_offs
from align_train.evaluation.matched import Labelled, embed_labelled
from align_train.evaluation.zero_shot import worst_classes
from align_train.metrics import classification_ranks
from align_train.models.class_head import ClassHead


@dataclass(frozen=True)
class HeadAccuracy:
    """Accuracy of W x + b on image embeddings x, each image of the class of the highest logit.

    Attributes:
        data: images with classes, which are matched with the head's by name.
        head: the head, or the folder that it was exported to; None for the one that is being trained.
        ks: cut-offs; those not below the number of classes are left out.
        skip_unusable: leave out and count images that cannot be read or decoded, instead of refusing to score.
    """

    data: LabelledSource
    head: str | ClassHead | None = None
    ks: Sequence[int] = (1, 5)
    skip_unusable: bool = False

    def check(self) -> None:
        """Open the data and the head."""
        check_cut_offs(self.ks)
        self._opened()
        self.data.open()

    def take(self, encoder: Encoder) -> Outcome:
        """Embed the images and classify them."""
        head = on_all_ranks(self._opened)
        labelled = embed_labelled(self.data, encoder, self.skip_unusable)
        return Outcome(on_rank_zero(lambda: self._score(labelled, head, encoder.device)))

    def _opened(self) -> ClassHead:
        if self.head is None:
            raise ValueError(
                "no classifier is being trained here: name the folder of one that was, with head=RUN/hf, or train one "
                "with recipe=classification"
            )
        return ClassHead.read(Path(self.head)) if isinstance(self.head, str) else self.head

    def _score(self, labelled: Labelled, head: ClassHead, device: torch.device) -> Score:
        labels = labelled.labels_as(head.classes)
        ones = torch.ones(len(labels), 1)  # the bias is one more column
        image = torch.cat([labelled.rows, ones], 1).to(device)
        classes = torch.cat([head.weight, head.bias[:, None]], 1).detach().float().to(device)
        ranks = classification_ranks(image, classes, labels.to(device)).cpu()
        facts = {
            **labelled.facts,
            "ties": TIES,
            "worst_classes": worst_classes(image, classes, labels.to(device), ranks, head.classes),
        }
        values = accuracies(ranks, labels, len(head.classes), self.ks)
        counts = {"images": len(labels), "classes": len(head.classes)}
        return Score("classifier", values, counts, labelled.dropped, facts)
