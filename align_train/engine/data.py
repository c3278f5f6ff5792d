"""Which pairs training reads, and where it goes on after a stop."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from align_train.batch import Batch
from align_train.data import Augmentation, Collate, GlobalBatches, Shard, TrainingPairs, evaluation_batches, find_shards
from align_train.distributed import rank, world_size
from align_train.records import Preprocessing


class PairData(L.LightningDataModule):
    """Tar shards for training and validation.

    Position in the data is the number of steps taken times the global batch, so a checkpoint's step says it all.

    Args:
        train: shards by name, each `{shards: file names or globs, repeat: times an epoch}`.
        batch_size: pairs a step, over all ranks together.
        preprocessing: as the model has it.
        augmentation: random changes of training images.
        validation: shards to choose settings and the best checkpoint by; None for none.
        shuffle_shards: shards whose pairs are mixed.
        workers: processes that decode, a rank; 0 decodes in the training process.
        seed: of order and augmentation.
        keep_decoded: images a worker keeps in memory, decoded and resized.

    Raises:
        FileNotFoundError: a pattern matches no shard.
        ValueError: the shards hold fewer pairs than one batch.
    """

    def __init__(
        self,
        train: Mapping[str, Mapping[str, Any]],
        batch_size: int,
        preprocessing: Preprocessing,
        augmentation: Augmentation,
        validation: str | None = None,
        shuffle_shards: int = 16,
        workers: int = 0,
        seed: int = 0,
        keep_decoded: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size, self.workers = batch_size, workers
        self.preprocessing = preprocessing
        self.pairs = TrainingPairs(_listed(train), preprocessing, augmentation, seed, shuffle_shards, keep_decoded)
        self.validation = find_shards(validation) if validation else []
        if len(self.pairs) < batch_size:
            raise ValueError(
                f"the training shards hold {len(self.pairs)} pairs, less than one batch (data.batch_size="
                f"{batch_size}): make the batch smaller, since a pair twice in a batch is its own negative"
            )

    def train_dataloader(self) -> DataLoader[Batch]:
        """From the step the trainer stands at to its last."""
        assert self.trainer is not None
        return self._loader(self.trainer.global_step, self.trainer.max_steps)

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        """Every validation pair, on every rank."""
        return evaluation_batches(self.validation, self.preprocessing) if self.validation else []

    def recalibration_pixels(self, batches: int, device: torch.device) -> Iterator[Tensor]:
        """This rank's pixels of the first training batches, to measure batch-norm statistics on."""
        return (batch.pixels.to(device) for batch in self._loader(0, batches))

    def _loader(self, start: int, stop: int) -> DataLoader[Batch]:
        sampler = GlobalBatches(self.batch_size, start, stop, rank(), world_size())
        return DataLoader(
            self.pairs,  # type: ignore[arg-type] # the collation makes batches of these
            batch_sampler=sampler,
            num_workers=self.workers,
            collate_fn=Collate(self.preprocessing.max_tokens),
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=4 if self.workers else None,
        )


def _listed(train: Mapping[str, Mapping[str, Any]]) -> Sequence[Shard]:
    shards: list[Shard] = []
    for name, source in train.items():
        if unknown := set(source) - {"shards", "repeat"}:
            raise ValueError(f"data.train.{name} has the unknown key {sorted(unknown)[0]!r}; known are shards, repeat")
        patterns, repeat = source.get("shards"), source.get("repeat", 1)
        if not patterns:
            raise ValueError(f"data.train.{name}.shards is {patterns!r}: give file names or globs of tar shards")
        if not isinstance(repeat, int) or repeat < 1:
            raise ValueError(f"data.train.{name}.repeat is {repeat!r}; it must be a whole number of at least 1")
        shards += find_shards(patterns) * repeat
    if not shards:
        raise ValueError("data.train names no source: give at least one {shards: ..., repeat: 1}")
    return shards
