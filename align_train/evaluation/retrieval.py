"""The retrieval exam: each image finds its caption among all, each caption its image."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from align_train.batch import Batch
from align_train.data import EvaluationBatches, find_shards
from align_train.data.storage.shards import Shard
from align_train.metrics import chance_recall, retrieval_recall
from align_train.records import Preprocessing, Tally


class DualEncoder(Protocol):
    """What an exam needs of a model."""

    preprocessing: Preprocessing

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, D), rows of length 1."""

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L) to (B, D), rows of length 1."""


@dataclass(frozen=True)
class Embeddings:
    """N pairs embedded: keys, image (N, D) and text (N, D) on the CPU in float32, and what could not be used."""

    keys: tuple[str, ...]
    image: Tensor
    text: Tensor
    dropped: Tally

    def only(self, wanted: Sequence[bool]) -> "Embeddings":
        """The pairs where `wanted` is true."""
        mask = torch.tensor(wanted, dtype=torch.bool)
        keys = tuple(key for key, keep in zip(self.keys, wanted, strict=True) if keep)
        return Embeddings(keys, self.image[mask], self.text[mask], self.dropped)


@torch.inference_mode()
def embed(
    model: torch.nn.Module, batches: Iterable[Batch | Tally], device: torch.device | str = "cpu", name: str = "embed"
) -> Embeddings:
    """Embed every pair of `batches` in evaluation mode; the model is left in the mode it was in.

    Raises:
        ValueError: not one pair could be used.
    """
    training, dropped = model.training, Tally()
    keys: list[str] = []
    parts: list[tuple[Tensor, Tensor]] = []
    model.eval()
    for batch in tqdm(batches, desc=name, unit="batch", delay=3):
        if not isinstance(batch, Batch):
            dropped.update(batch)
            continue
        dropped.update(batch.dropped)
        keys += batch.keys
        moved = batch.to(device)
        image = model.encode_image(moved.pixels)  # type: ignore[operator]
        text = model.encode_text(moved.input_ids, moved.attention_mask)  # type: ignore[operator]
        parts.append((image.float().cpu(), text.float().cpu()))
    model.train(training)
    if not parts:
        raise ValueError(f"{name}: none of its pairs could be used ({dropped.described()}): check the shards")
    images, texts = zip(*parts, strict=True)
    return Embeddings(tuple(keys), torch.cat(images), torch.cat(texts), dropped)


@dataclass(frozen=True)
class Score:
    """What an exam says: recalls by name (fractions), the same for a random order, pairs, and drops by reason."""

    recall: dict[str, float]
    chance: dict[str, float]
    pairs: int
    dropped: Tally


@dataclass(frozen=True)
class Retrieval:
    """Recall@k both ways on the pairs of some shards, one caption an image; ties count against the model.

    Attributes:
        shards: file names or globs of the test's tar shards.
        exclude: leave out pairs by sidecar column, e.g. {"category": ["Flags"]}.
        ks: cut-offs.
        batch_size: pairs embedded at a time; does not change the score.
    """

    shards: str
    exclude: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    ks: Sequence[int] = (1, 5, 10)
    batch_size: int = 256

    def embed(self, model: DualEncoder, device: torch.device | str = "cpu") -> Embeddings:
        """Embed the exam's pairs."""
        shards = find_shards(self.shards)
        batches = EvaluationBatches(shards, model.preprocessing, self.batch_size)
        left_out = excluded_keys(shards, self.exclude)
        embeddings = embed(model, batches, device, self.shards)  # type: ignore[arg-type]
        return embeddings.only([key not in left_out for key in embeddings.keys]) if left_out else embeddings

    def score(self, embeddings: Embeddings) -> Score:
        """Recalls of `embed`'s result."""
        pairing = torch.arange(len(embeddings.keys))
        return Score(
            retrieval_recall(embeddings.image, embeddings.text, pairing, tuple(self.ks)),
            chance_recall(pairing, len(pairing), tuple(self.ks)),
            len(pairing),
            embeddings.dropped,
        )


def excluded_keys(shards: Sequence[Shard], exclude: Mapping[str, Sequence[Any]]) -> set[str]:
    """Keys of the pairs whose sidecar has one of the named values in the named column.

    Raises:
        ValueError: a shard has no sidecar, or the sidecar no such column, or the values are no list.
    """
    keys: set[str] = set()
    for column, values in exclude.items():
        if isinstance(values, str):
            raise ValueError(f"exclude of {column!r} is the text {values!r}: write a list of values, [{values}]")
        for shard in shards:
            table = shard.metadata(["key", column]) if shard.sidecar else None
            if table is None or not {"key", column} <= set(table.column_names):
                raise ValueError(f"exclude names the column {column!r}, but {shard} has no sidecar with it")
            keys.update(row["key"] for row in table.to_pylist() if row[column] in values)
    return keys


def table(scores: Mapping[str, Score], ks: Sequence[int] = (1, 5)) -> str:
    """A text table: one exam a row, R@k both ways in percent, chance in brackets."""

    def cell(score: Score, column: str) -> str:
        if column not in score.recall:  # the exam has other cut-offs
            return "-"
        return f"{100 * score.recall[column]:.1f} ({100 * score.chance[column]:.2f})"

    columns = [f"{way}_r{k}" for way in ("i2t", "t2i") for k in ks]
    heads = [f"{'image to text' if c[:3] == 'i2t' else 'text to image'} R@{c[5:]}" for c in columns]
    width = max(len(name) for name in [*scores, "exam"])
    lines = ["  ".join([f"{'exam':<{width}}", "pairs", *heads])]
    for name, score in scores.items():
        cells = [cell(score, column).rjust(len(head)) for column, head in zip(columns, heads, strict=True)]
        lines.append("  ".join([f"{name:<{width}}", f"{score.pairs:>5}", *cells]))
    return "\n".join([*lines, "percent; in brackets what a random order gives; ties count against the model"])
