"""Training straight from COYO's metadata, and where it goes on after a stop."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from align_train import signals
from align_train.batch import Batch, StepBatch
from align_train.corpus.stream import CoyoStream, Position
from align_train.data import Augmentation, EvaluationBatches, Steps, StreamedBatches, find_shards
from align_train.data.storage.addresses import shown
from align_train.data.stream import Share
from align_train.distributed import gather_objects, on_all_ranks, rank, world_size
from align_train.engine.same_files import check_same_files
from align_train.engine.split import Split
from align_train.records import Preprocessing


class StreamData(L.LightningDataModule):
    """Pairs from links for training, tar shards for validation.

    What a link gives changes from day to day, so the step does not say where the stream is: every batch brings the
    position after it, and a checkpoint holds those of all ranks' workers.

    Args:
        stream: metadata, rules and fetcher.
        batch_size: pairs a step, over all ranks together.
        preprocessing: as the model has it.
        augmentation: random changes of training images.
        validation: shards to choose settings and the best checkpoint by; None for none.
        workers: processes that fetch and decode, a rank; 0 does it in the training process.
        micro_batch: largest number of pairs that a device takes at once; None takes a rank's share of a batch at once.

    Attributes:
        skipped: always empty: pairs of a stream have no numbers. Here so that a run need not ask what its data is.

    Raises:
        ValueError: the global batch cannot be shared out evenly, or a checkpoint is of another number of processes.
    """

    def __init__(
        self,
        stream: CoyoStream,
        batch_size: int,
        preprocessing: Preprocessing,
        augmentation: Augmentation,
        validation: str | None = None,
        workers: int = 0,
        micro_batch: int | None = None,
    ) -> None:
        super().__init__()
        self.micro_batch = micro_batch
        self.stream, self.batch_size, self.workers = stream, batch_size, workers
        self.preprocessing, self.augmentation = preprocessing, augmentation
        self.validation = find_shards(validation) if validation else []
        self.skipped: list[tuple[int, int]] = []
        self._taken = 0
        self._positions: dict[int, Position] = {}
        self._saved: dict[str, Any] = {}
        self._goes_on = False  # at the next beginning, whatever a checkpoint says

    def setup(self, stage: str) -> None:
        """Before the first step: ValueError where the ranks would read different files."""
        if stage == "fit":
            metadata = on_all_ranks(lambda: [shown(file) for file in self.stream.files])
            check_same_files({"data.stream.metadata": metadata}, "files")
            check_same_files({"data.validation": [str(shard) for shard in self.validation]}, "shards")

    def train_dataloader(self) -> Steps:
        """From where the checkpoint stood, else from the beginning; after `skip`, from where the stream is."""
        if self._saved and not self._goes_on:
            self._restore()
        self._saved, self._goes_on = {}, False
        share = Share(rank(), world_size(), max(self.workers, 1), self._taken, self._positions)
        return Steps(self._loader(share), self.parts)

    def val_dataloader(self) -> EvaluationBatches | list[Any]:
        """Every validation pair, on every rank."""
        return EvaluationBatches(self.validation, self.preprocessing) if self.validation else []

    @property
    def parts(self) -> int:
        """Micro-batches of a step on one rank."""
        return self._split.accumulation

    def recalibration_pixels(self, batches: int, device: torch.device) -> Iterator[Tensor]:
        """This rank's pixels of the first training batches, by micro-batches, to measure batch-norm statistics on."""
        loader = self._loader(Share(rank(), world_size(), max(self.workers, 1)))
        return (batch.pixels.to(device) for batch in islice(loader, batches * self.parts))

    def skip(self, first_step: int, last_step: int) -> dict[str, int]:
        """Let the stream go on from where it is, though the weights go back to a checkpoint: its place is ignored once.

        What links give cannot be asked for again, so all that was taken since that checkpoint does not come again, not
        the steps alone. Step s is the one whose batch is taken while `trainer.global_step` is s; first and last are
        included. To be called on every rank, with the same steps, after the fit has ended. A process that is ended
        before it saves a checkpoint goes on from the old place.

        Returns:
            batches: how many steps these were.
        """
        self._goes_on = True
        return {"batches": last_step - max(first_step, 0) + 1}

    def on_after_batch_transfer(self, batch: StepBatch | Batch, dataloader_index: int) -> StepBatch | Batch:
        """Note where the stream goes on, as a training batch is taken."""
        for taken in batch.parts if isinstance(batch, StepBatch) else []:
            assert taken.position is not None
            part, *after = taken.position
            self._positions[part] = Position(*after)
            self._taken += 1
        return batch

    def facts(self) -> dict[str, Any]:
        """For result.json: whole epochs of this rank's part of the stream that have gone by."""
        return {"effective_epochs": {"stream": min((after.epoch for after in self._positions.values()), default=0)}}

    def metrics(self) -> dict[str, float]:
        """The same as numbers to log."""
        return {"effective_epochs/stream": float(self.facts()["effective_epochs"]["stream"])}

    def state_dict(self) -> dict[str, Any]:
        """Positions of all ranks' parts; every rank must call it."""
        positions = {part: tuple(after) for each in gather_objects(self._positions) for part, after in each.items()}
        return {"ranks": world_size(), "workers": max(self.workers, 1), "taken": self._taken, "positions": positions}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the positions until the number of ranks is known."""
        self._saved = state_dict

    def _restore(self) -> None:
        saved = self._saved
        now = {"ranks": world_size(), "workers": max(self.workers, 1)}
        if any(saved[name] != number for name, number in now.items()):
            raise ValueError(
                f"the checkpoint's stream was shared out to {saved['ranks']} ranks of {saved['workers']} workers, now "
                f"there are {now['ranks']} of {now['workers']}: set data.workers={saved['workers']} and use as many "
                "devices as before; only prepared shards (data=shards) go on with another number"
            )
        own = range(rank() * now["workers"], (rank() + 1) * now["workers"])
        self._taken = saved["taken"]
        self._positions = {part: Position(*after) for part, after in saved["positions"].items() if part in own}

    @property
    def _split(self) -> Split:
        return Split(self.batch_size, world_size(), self.micro_batch)

    def _loader(self, share: Share) -> DataLoader[Batch]:
        self.stream.check()
        return DataLoader(
            StreamedBatches(self.stream, share, self.preprocessing, self.augmentation, self._split.micro),
            batch_size=None,  # the dataset yields batches
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=2 if self.workers else None,
            worker_init_fn=_leave_signals if signals.is_listening() else None,
        )


def _leave_signals(worker: int) -> None:
    """A function, since it must be pickled where processes spawn."""
    signals.work_to_the_end()
