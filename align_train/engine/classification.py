"""Fine-tuning the image tower as a classifier, as ALIGN was on fine-grained sets (arXiv 2102.05918, section 5)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from align_train.batch import StepBatch
from align_train.data import AlignInputs
from align_train.data.own_pairs import read_findings
from align_train.data.pairs import hashed
from align_train.engine.encoding import encode_images
from align_train.engine.module import AlignTraining
from align_train.evaluation import Exam, HeadAccuracy
from align_train.evaluation.prompts import load_prompts
from align_train.metrics import class_embeddings
from align_train.models import Align
from align_train.models.class_head import ClassHead

TEXTS = 256  # that are embedded at a time


class ClassifierTraining(AlignTraining):
    """A linear head on the image embeddings: first it alone is trained, then the image tower with it.

    Captions are names of classes, and the text tower is not computed. In the first stage the image tower does what it
    does in evaluation, without gradients. The head starts from the names of the classes, as in WiSE-FT (Wortsman et
    al., arXiv 2109.01903): its accuracy before the first step is that of zero-shot classification, and mixtures with
    the end mean something.

    Args:
        model: both towers; the text tower and the temperature at rest.
        pairs: folder of the checked pairs, which know the classes.
        head_steps: of the first stage.
        templates: sentences about a class that the head starts from, as of `ZeroShot`; None starts it at zero.
        label_smoothing: share of the target that is spread over all classes.
        options: those of `AlignTraining`; there is no use for `objective`.

    Raises:
        ValueError: the pairs have no classes or only one, or images without a class.
    """

    def __init__(
        self,
        model: Align,
        *,
        pairs: str,
        head_steps: int,
        templates: str | None = "plain",
        label_smoothing: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        classes = classes_of(Path(pairs))
        self.head: ClassHead = ClassHead(classes, model.config.projection_dim)
        if templates is not None:
            start_from_names(self.head, model, templates)
        self._head_steps, self._label_smoothing = head_steps, label_smoothing
        known = b"".join(hashed(name.strip().encode()) for name in classes)  # as `Captions` strips what it reads
        self.register_buffer("_hashes", torch.from_numpy(np.frombuffer(known, np.int64).copy()), persistent=False)
        self._hashes: Tensor

    def configure_model(self) -> None:
        """Refuse what gives the head other gradients than the tower, or waits for gradients that the tower has not."""
        strategy = self.trainer.strategy
        if self.device_mesh is not None:
            raise ValueError("a classifier cannot be sharded: choose trainer=default")
        if isinstance(strategy, DDPStrategy) and not strategy._ddp_kwargs.get("find_unused_parameters"):
            raise ValueError(
                "the first stage trains the head alone, for which several devices need "
                "trainer.strategy=ddp_find_unused_parameters_true; or take one with trainer.devices=1"
            )

    def trained(self) -> nn.Module:
        """The model, and the head above it."""
        return _WithHead(self.model, self.head)

    def own_exams(self, exams: Mapping[str, Exam]) -> dict[str, Exam]:
        """Those of a classifier that name none are of this one."""
        return {
            name: replace(exam, head=self.head) if isinstance(exam, HeadAccuracy) and exam.head is None else exam
            for name, exam in exams.items()
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Name the head's classes too."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["classes"] = list(self.head.classes)

    def training_step(self, batch: StepBatch, batch_index: int) -> Tensor:
        """Cross-entropy of this rank's b images."""
        labels, image = self._labels(batch), self._embedded(batch)
        with torch.autocast(image.device.type, enabled=False):  # logits are too large for 16 bits
            logits = self.head(image)
        loss = cross_entropy(logits, labels, label_smoothing=self._label_smoothing)
        self._log_step(loss)
        self.log("accuracy", (logits.argmax(1) == labels).float().mean(), sync_dist=self.trainer.world_size > 1)
        return loss

    def _embedded(self, batch: StepBatch) -> Tensor:
        """(b, D); in the first stage without a gradient."""
        step = self.trainer.global_step
        if step >= self._head_steps:
            return encode_images(self.model, batch, [self._seed, step])
        self.model.eval()
        with torch.no_grad():
            image = encode_images(self.model, batch, [self._seed, step])
        self.model.train()
        return image

    def _labels(self, batch: StepBatch) -> Tensor:
        """int64 (b,): the classes whose names the captions are."""
        same = batch.identities[:, 1, None].to(self.device) == self._hashes  # (b, C)
        if not same.any(1).all():
            lost = [key for key, found in zip(batch.keys, same.any(1).tolist(), strict=True) if not found]
            raise ValueError(
                f"the caption of {lost[0]} is no name of a class: set data.train.pairs.captions={{json.label:1.0}}, "
                "data.train.pairs.clean_captions=false and by_line=false, as recipe=classification does"
            )
        return same.int().argmax(1)


class _WithHead(nn.Module):
    """What an optimizer is made for: a model and a head, which is one stage further up."""

    def __init__(self, model: Align, head: ClassHead) -> None:
        super().__init__()
        self.model, self.head = model, head

    def distances(self) -> dict[str, int]:
        below = {f"model.{name}": far + 1 for name, far in self.model.distances().items()}
        return below | {f"head.{name}": 0 for name, _ in self.head.named_parameters()}


def classes_of(pairs: Path) -> list[str]:
    """The names of the classes in a folder of checked pairs, sorted; ValueError as `ClassifierTraining`."""
    findings = read_findings(pairs)
    if findings is None:
        raise ValueError(f"{pairs} holds no checked pairs: a classifier is trained with `align-train finetune`")
    named = sum(findings.classes.values())
    if len(findings.classes) < 2 or named < findings.images:
        raise ValueError(
            f"{named:,} of {findings.images:,} images have a class, and there are {len(findings.classes)} classes: a "
            "classifier needs a class for each image, and two of them; give class folders, or name the column with "
            "pairs.label_column=NAME"
        )
    return sorted(findings.classes)


@torch.no_grad()
def start_from_names(head: ClassHead, model: Align, templates: str) -> None:
    """Let a head do what zero-shot classification does: W the embedded names of the classes over the temperature.

    Args:
        head: changed.
        model: in any mode; left as it is.
        templates: as of `ZeroShot`.
    """
    prompts = load_prompts(templates, None).for_classes(head.classes)
    texts, training = [text for group in prompts for text in group], model.training
    model.eval()
    rows = [_embedded_texts(model, texts[first : first + TEXTS]) for first in range(0, len(texts), TEXTS)]
    model.train(training)
    found = class_embeddings(torch.cat(rows).unflatten(0, (len(prompts), -1)))
    head.weight.copy_(found / model.temperature)


def _embedded_texts(model: Align, texts: Sequence[str]) -> Tensor:
    ids, mask = AlignInputs(model.preprocessing).text(texts)
    return model.encode_text(ids.to(model.temperature.device), mask.to(model.temperature.device))
