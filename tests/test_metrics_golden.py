"""Retrieval and zero-shot classification give what CLIP_benchmark's own functions gave (golden/README.md)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from align_train.metrics import (
    class_embeddings,
    classification_ranks,
    mean_per_class,
    predictions,
    recall_at,
    retrieval_recall,
)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(Path(__file__).parent / "golden" / "clip_benchmark.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def test_retrieval_equals_clip_benchmarks(golden):
    image, text = normalize(golden["image"]), normalize(golden["text"])
    recall = retrieval_recall(image, text, golden["image_of_text"])
    # Theirs are means in float32.
    assert recall == pytest.approx({name: golden[name].item() for name in recall}, abs=1e-6)
    assert 0.4 < recall["i2t_r1"] < recall["i2t_r10"] < 1


def test_zero_shot_classification_equals_clip_benchmarks(golden):
    classes, labels = class_embeddings(golden["prompts"]), golden["labels"]
    assert (classes - golden["weights"].T).abs().max() < 1e-6
    image = normalize(golden["pictures"])
    top = recall_at(classification_ranks(image, classes, labels), (1, 3, 5))
    assert top == {k: golden[f"top{k}"].item() for k in (1, 3, 5)}
    hits = predictions(image, classes, labels) == labels
    assert mean_per_class(hits, labels, len(classes)) == pytest.approx(golden["mean_per_class"].item(), abs=1e-12)
