"""A linear classifier on image embeddings, and the two files that hold it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import nn

from align_train.files import atomic_write

WEIGHTS, CLASSES = "classifier.safetensors", "classes.json"


class ClassHead(nn.Linear):
    """Logits of C classes: W x + b of image embeddings x of length 1, (B, D) to (B, C). Starts at zero.

    Embeddings are normalised, other than in the paper's EfficientNet: so the head may start from the classes' names,
    and the exam takes the embeddings that all exams share.

    Args:
        classes: their C names.
        width: D.
    """

    def __init__(self, classes: Sequence[str], width: int) -> None:
        super().__init__(width, len(classes))
        self.classes = tuple(classes)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def write(self, folder: Path) -> None:
        """FOLDER/classifier.safetensors, float32 weight (C, D) and bias (C,), and FOLDER/classes.json, a list."""
        tensors = {name: value.detach().float().cpu().contiguous() for name, value in self.state_dict().items()}
        with atomic_write(folder / WEIGHTS) as file:
            file.write(save(tensors))
        with atomic_write(folder / CLASSES) as file:
            file.write((json.dumps(self.classes, ensure_ascii=False, indent=1) + "\n").encode())

    @classmethod
    def read(cls, folder: Path) -> "ClassHead":
        """The head that was written into a folder.

        Raises:
            FileNotFoundError: there is none.
            ValueError: the weights are of another number of classes.
        """
        for name in (WEIGHTS, CLASSES):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"there is no {name} in {folder}: give RUN/hf of `align-train finetune recipe=classification`"
                )
        classes, tensors = json.loads((folder / CLASSES).read_bytes()), load_file(folder / WEIGHTS)
        if len(tensors["weight"]) != len(classes):
            raise ValueError(
                f"{folder / WEIGHTS} is of {len(tensors['weight'])} classes, {CLASSES} beside it names {len(classes)}: "
                "take both files of one run"
            )
        return cls.of(classes, tensors)

    @classmethod
    def of(cls, classes: Sequence[str], tensors: Mapping[str, torch.Tensor]) -> "ClassHead":
        """A head of these classes with these weights, by the names of its state dict."""
        head = cls(classes, tensors["weight"].shape[1])
        with torch.no_grad():
            head.load_state_dict(tensors)
        return head
