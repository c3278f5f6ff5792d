"""A test's images and captions to embeddings: by all ranks together, in order, each once."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from align_train.data.inputs import Inputs
from align_train.data.testsets import Images
from align_train.data.testsets.sets import digest
from align_train.distributed import gather_objects, gather_rows, on_all_ranks, on_rank_zero, rank, world_size
from align_train.evaluation.embedded import NO_HASHES, NOTHING, Embedded, EmbeddingFolder
from align_train.evaluation.reading import UNREADABLE, ReadImages, read_images


@dataclass(frozen=True)
class Encoding:
    """How embeddings are computed. It changes no score beyond rounding, but for the precision.

    Attributes:
        batch_size: images, or texts, that a rank embeds at a time.
        threads: that read and decode images, a rank.
        precision: float32, or bf16: towers under autocast.
        stall_seconds: without an image, until a disk or network is given up.

    Raises:
        ValueError: a number is below 1, or it is another precision.
    """

    batch_size: int = 256
    threads: int = 2
    precision: str = "float32"
    stall_seconds: float = 120.0

    def __post_init__(self) -> None:
        for name in ("batch_size", "threads"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"encoding.{name} is {getattr(self, name)!r}: give a whole number of at least 1")
        if not isinstance(self.stall_seconds, int | float) or not self.stall_seconds > 0:
            raise ValueError(f"encoding.stall_seconds is {self.stall_seconds!r}: give a number of seconds above 0")
        if self.precision not in ("float32", "bf16"):
            raise ValueError(f"encoding.precision is {self.precision!r}: choose float32 or bf16")


@dataclass(frozen=True)
class Encoder:
    """A model under examination, and what makes its inputs. What was embedded once is not embedded again.

    Attributes:
        model: has `encode_image` and `encode_text`, as `Align`; used in evaluation mode, left in the one it was in.
        inputs: as the model takes them.
        device: where it computes; the model is there.
        encoding: how.
        folder: where embeddings are kept for another time; None for nowhere.
    """

    model: torch.nn.Module
    inputs: Inputs
    device: torch.device
    encoding: Encoding = field(default_factory=Encoding)
    folder: EmbeddingFolder | None = None
    _known: dict[str, Embedded] = field(default_factory=dict)

    def images(self, images: Images, name: str) -> Embedded:
        """Embed all images of a set, whose name is for progress and files; every rank must call it.

        Raises:
            OSError: this machine has no room, memory or open files left.
            TimeoutError: a disk does not answer.
        """
        asked = on_rank_zero(lambda: digest(["images", images.identity, *images.keys]))
        return self._once("images", name, images.keys, asked, lambda: self._images(images, name))

    def texts(self, texts: Sequence[str], name: str) -> Embedded:
        """Embed texts; every rank must call it."""
        return self._once("texts", name, texts, digest(["texts", *texts]), lambda: self._texts(texts, name))

    def _once(self, kind: str, name: str, keys: Sequence[str], asked: str, embed: Callable[[], Embedded]) -> Embedded:
        """From memory, from the folder, or embedded now."""
        if asked in self._known:
            return self._known[asked]
        if self.folder is None:
            found = embed()
        else:
            folder, path = self.folder, self.folder.file(kind, name, asked)
            if on_rank_zero(path.is_file):
                found = on_all_ranks(lambda: folder.read(path) if rank() == 0 else NOTHING)
                found = replace(found, lost=on_rank_zero(lambda: found.lost))
            else:
                found = embed()
                if UNREADABLE not in found.lost.values():  # a disk may be better another time
                    on_rank_zero(lambda: folder.write(path, keys, found))
        self._known[asked] = found
        return found

    def _images(self, images: Images, name: str) -> Embedded:
        rounds = list(_rounds(len(images.keys), self.encoding.batch_size))
        patience = self.encoding.stall_seconds
        batches = read_images(images, self.inputs, (r.own for r in rounds), self.encoding.threads, patience)
        rows, hashes, lost = _Rows(len(images.keys)), _Rows(len(images.keys)), dict[int, str]()
        with self._examined() as model, _progress(len(images.keys), name, "image") as bar:
            for part in rounds:
                batch, known = part.read(batches, self.device)
                lost |= batch.lost
                hashes.put(part.places, known)
                rows.put(part.places, part.whole(model.encode_image(batch.pixels.to(self.device)).float()))
                bar.update(part.size)
        lost = {number: why for found in gather_objects(lost) for number, why in found.items()}
        return Embedded(rows.all, hashes.all, lost) if rank() == 0 else replace(NOTHING, lost=lost)

    def _texts(self, texts: Sequence[str], name: str) -> Embedded:
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))  # little padding
        places, rows = torch.tensor(order), _Rows(len(texts))
        with self._examined() as model, _progress(len(texts), name, "text") as bar:
            for part in _rounds(len(texts), self.encoding.batch_size):
                ids, mask = self.inputs.text([texts[order[place]] for place in part.own])
                found = part.whole(model.encode_text(ids.to(self.device), mask.to(self.device)).float())
                rows.put(places[part.places], found)
                bar.update(part.size)
        return Embedded(rows.all, NO_HASHES) if rank() == 0 else NOTHING

    @contextmanager
    def _examined(self) -> Iterator[Any]:
        """The model in evaluation mode, without gradients, in its precision."""
        training, tf32 = self.model.training, torch.backends.cudnn.allow_tf32
        self.model.eval()
        torch.backends.cudnn.allow_tf32 = False  # float32 is to mean float32, on every device
        try:
            low = self.encoding.precision == "bf16"
            with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=low):
                yield self.model
        finally:
            torch.backends.cudnn.allow_tf32 = tf32
            self.model.train(training)


@dataclass(frozen=True)
class _Round:
    """What all ranks embed at the same time: numbers `first` to `first + size`, dealt out in turn.

    Where they do not go up evenly, ranks embed the last one again: all make equal calls, as dealt-out weights need.
    """

    first: int
    size: int

    @property
    def own(self) -> list[int]:
        """This rank's numbers."""
        each, last = math.ceil(self.size / world_size()), self.first + self.size - 1
        return [min(self.first + rank() + place * world_size(), last) for place in range(each)]

    @property
    def places(self) -> slice:
        """All ranks' numbers."""
        return slice(self.first, self.first + self.size)

    def whole(self, local: Tensor) -> Tensor:
        """All ranks' rows in order, each once."""
        return self._in_order(gather_rows(local).unflatten(0, (world_size(), -1)))

    def read(self, batches: Iterator[ReadImages], device: torch.device) -> tuple[ReadImages, Tensor]:
        """This rank's images, and the hashes of all ranks' in order.

        An error on one rank is one on all, as in `on_all_ranks`. So that this is not asked in each round, a last number
        beside the hashes tells of it.
        """
        batch: ReadImages | None = None
        problem: Exception | None = None
        try:
            batch = next(batches)
        except Exception as error:  # noqa: BLE001 # raised again below, when all ranks know of it
            problem = error

        def raise_own() -> None:
            if problem is not None:
                raise problem

        hashes = torch.zeros(len(self.own), dtype=torch.int64) if batch is None else batch.hashes
        told = torch.cat([hashes, torch.tensor([batch is None])]).to(device)
        by_rank = gather_rows(told).unflatten(0, (world_size(), -1))
        if by_rank[:, -1].any():
            on_all_ranks(raise_own)
        assert batch is not None
        return batch, self._in_order(by_rank[:, :-1])

    def _in_order(self, by_rank: Tensor) -> Tensor:
        return by_rank.transpose(0, 1).flatten(0, 1)[: self.size]


class _Rows:
    """N rows on rank 0's CPU, in memory once; nothing on other ranks."""

    def __init__(self, total: int) -> None:
        self.total, self.all = total, torch.empty(0)

    def put(self, places: slice | Tensor, rows: Tensor) -> None:
        """Rows of any device to their places."""
        if rank() != 0:
            return
        if len(self.all) < self.total:
            self.all = rows.new_empty(self.total, *rows.shape[1:], device="cpu")
        self.all[places] = rows.cpu()


def _rounds(total: int, batch_size: int) -> Iterator[_Round]:
    together = batch_size * world_size()
    return (_Round(first, min(together, total - first)) for first in range(0, total, together))


def _progress(total: int, name: str, unit: str) -> tqdm:
    return tqdm(total=total, desc=name, unit=unit, delay=3, disable=rank() != 0)
