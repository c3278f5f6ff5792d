"""What metrics ask of their arguments. Each raises ValueError with the numbers that are wrong."""

from collections.abc import Sequence

import torch
from torch import Tensor

ROWS = 4096  # looked at at a time, so that a million embeddings need no second million of flags


def check_embeddings(name: str, x: Tensor) -> None:
    """(N, D), N and D >= 1, floating point and finite."""
    if x.ndim != 2 or x.numel() == 0 or not x.is_floating_point():
        raise ValueError(f"{name} must be embeddings of shape (N, D), not empty, got {tuple(x.shape)} of {x.dtype}")
    bad = torch.empty(len(x), dtype=torch.bool, device=x.device)
    for some, rows in zip(bad.split(ROWS), x.split(ROWS), strict=True):
        some.copy_(~rows.isfinite().all(1))
    if bad.any():
        raise ValueError(
            f"{int(bad.sum())} of the {len(x)} rows of {name} are not finite, the first is row "
            f"{int(bad.int().argmax())}: the model diverged, or a row was never filled in"
        )


def check_same_space(**embeddings: Tensor) -> None:
    """All are embeddings of one width D on one device."""
    for name, x in embeddings.items():
        check_embeddings(name, x)
    if len({(x.shape[1], x.device) for x in embeddings.values()}) > 1:
        told = ", ".join(f"{name} {tuple(x.shape)} on {x.device}" for name, x in embeddings.items())
        raise ValueError(f"embeddings must have one width D and lie on one device, got {told}")


def check_integers(name: str, x: Tensor, of: str, count: int) -> None:
    """(count,) integers, one for each of what `of` names."""
    if x.ndim != 1 or x.is_floating_point() or x.is_complex():
        raise ValueError(f"{name} must be integers, one for each {of}, got {tuple(x.shape)} of {x.dtype}")
    if len(x) != count:
        raise ValueError(f"{name} has {len(x)} entries, but there are {count} {of}s")


def check_values(name: str, x: Tensor) -> None:
    """(N,), N >= 1, finite."""
    if x.ndim != 1 or not len(x) or not x.isfinite().all():
        raise ValueError(f"{name} must be finite numbers of shape (N,), not empty, got {tuple(x.shape)}")


def check_labels(labels: Tensor, classes: int) -> None:
    """(N,) integers in 0..classes - 1, of at least two classes."""
    if classes < 2:
        raise ValueError(f"a classification needs at least 2 classes, got {classes}")
    check_integers("labels", labels, "image", labels.numel())
    wrong = labels[(labels < 0) | (labels >= classes)].tolist()
    if wrong or not len(labels):
        raise ValueError(f"labels must be in 0..{classes - 1} for {classes} classes, not empty, got {wrong[:5]}")


def check_pairing(image_of_text: Tensor, images: int) -> None:
    """(M,) integers in 0..images - 1, where every image occurs."""
    check_integers("image_of_text", image_of_text, "text", image_of_text.numel())
    wrong = image_of_text[(image_of_text < 0) | (image_of_text >= images)].tolist()
    if wrong:
        raise ValueError(f"image_of_text must be in 0..{images - 1} for {images} images, got {wrong[:5]}")
    lonely = (torch.bincount(image_of_text, minlength=images) == 0).nonzero().flatten().tolist()
    if lonely:
        raise ValueError(
            f"{len(lonely)} of {images} images have no text, the first are {lonely[:5]}: image-to-text retrieval is "
            f"not defined for them, leave them out"
        )


def check_cut_offs(ks: Sequence[int]) -> None:
    """At least one, each at least 1."""
    if not ks or min(ks) < 1:
        raise ValueError(f"ks must be cut-offs of at least 1, got {tuple(ks)}")
