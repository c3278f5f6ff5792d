"""The zero-shot exam: each image is of the class whose described name is nearest to it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from align_train.data.testsets import LabelledSource
from align_train.distributed import on_all_ranks, on_rank_zero
from align_train.evaluation.accuracy import accuracies
from align_train.evaluation.encoder import Encoder
from align_train.evaluation.exam import TIES, Outcome, Score, check_cut_offs
from align_train.evaluation.matched import Labelled, embed_labelled
from align_train.evaluation.prompts import Prompts, load_prompts
from align_train.metrics import class_embeddings, classification_ranks, confusions, predictions

WORST = 20  # classes that a score tells of
TAKEN_FOR = 3  # classes that each of them was taken for


@dataclass(frozen=True)
class ZeroShot:
    """Accuracy of naming images: a class is the mean of its prompts' embeddings, normalised (ALIGN paper, section 5.4).

    Attributes:
        data: images with classes: `align_train.data.testsets.ClassFolders`, `HubDataset` or `LabelledShards`.
        templates: prompts with a place for the name: clip_80, plain, or a JSON file.
        names: what classes are called: imagenet, or a JSON file; None for their own names.
        ks: cut-offs; those beyond the number of classes are left out.
        skip_unusable: leave out and count images that cannot be read or decoded, instead of refusing to score.
        benchmark: imagenet, where published scores of this very data may stand beside the model's.
    """

    data: LabelledSource
    templates: str = "clip_80"
    names: str | None = None
    ks: Sequence[int] = (1, 5)
    skip_unusable: bool = False
    benchmark: str | None = None

    def check(self) -> None:
        """Open the data, and name its classes."""
        check_cut_offs(self.ks)
        load_prompts(self.templates, self.names).names_of(self.data.open().classes)

    def take(self, encoder: Encoder) -> Outcome:
        """Embed images and prompts, and compare."""
        prompts = on_all_ranks(lambda: load_prompts(self.templates, self.names))
        labelled = embed_labelled(self.data, encoder, self.skip_unusable)
        classes = labelled.test.classes
        texts = on_all_ranks(lambda: prompts.for_classes(classes))
        flat = encoder.texts([text for group in texts for text in group], f"prompts of {labelled.test.name}")
        return Outcome(on_rank_zero(lambda: self._score(labelled, flat.rows, prompts, encoder.device)))

    def _score(self, labelled: Labelled, prompted: Tensor, prompts: Prompts, device: torch.device) -> Score:
        classes, labels = labelled.test.classes, labelled.labels
        image, names = labelled.rows.to(device), prompts.names_of(classes)
        found = class_embeddings(prompted.to(device).unflatten(0, (len(classes), -1)))
        ranks = classification_ranks(image, found, labels.to(device)).cpu() - later_namesakes(names)[labels]
        values = accuracies(ranks, labels, len(classes), self.ks)
        facts = {
            **labelled.facts,
            "templates": self.templates,
            "templates_sha256": prompts.templates_sha256,
            "class_names": self.names or "the set's own",
            "class_names_sha256": prompts.names_sha256(classes),
            "shared_names": prompts.shared_names(classes),
            "ties": f"{TIES}; of classes with one name, the first comes first",
            "worst_classes": worst_classes(image, found, labels.to(device), ranks, names),
            "benchmark": self.benchmark,
        }
        counts = {"images": len(labels), "classes": len(classes), "templates": len(prompts.templates)}
        return Score("zero_shot", values, counts, labelled.dropped, facts)


def later_namesakes(names: Sequence[str]) -> Tensor:
    """int64 (C,): how many classes after each have its name, and so its embedding.

    ImageNet has two such pairs. They tie on every image, whatever the model; counted against it they would cost 0.4
    points of top-1 that published scores do not lose, since there the first of equal classes wins.
    """
    seen: Counter[str] = Counter()
    later = []
    for name in reversed(names):
        later.append(seen[name])
        seen[name] += 1
    return torch.tensor(later[::-1])


def worst_classes(
    image: Tensor, classes: Tensor, labels: Tensor, ranks: Tensor, names: Sequence[str]
) -> list[dict[str, Any]]:
    """The classes that are named worst, and what they are taken for, for result.json.

    Args:
        image: (N, D).
        classes: (C, D).
        labels: (N,).
        ranks: (N,), 0 where an image is named right.
        names: C of them.
    """
    predicted = predictions(image, classes, labels).cpu().where(ranks > 0, labels.cpu())
    found = confusions(predicted, labels.cpu(), len(classes), WORST, TAKEN_FOR)
    return [
        {
            "name": names[each.label],
            "images": each.images,
            "correct": each.correct,
            "taken_for": [[names[wrong], share] for wrong, share in each.taken_for],
        }
        for each in found
    ]
