"""Which pairs training reads, and where it goes on after a stop."""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import lightning as L
import torch
from torch import Tensor

from align_train.data import (
    Augmentation,
    BatchPlans,
    EvaluationBatches,
    Loader,
    Opener,
    Order,
    OrderSettings,
    PairReader,
    Reading,
    Steps,
    find_shards,
    read_sources,
)
from align_train.distributed import gather_objects, rank, world_size
from align_train.engine.same_files import check_same_files
from align_train.engine.split import Split
from align_train.records import Preprocessing


class PairData(L.LightningDataModule):
    """Tar shards for training and validation.

    A checkpoint holds where the order goes on, in terms that depend neither on the number of ranks nor of workers.

    Args:
        train: sources by name, see `align_train.data.read_sources`.
        batch_size: pairs a step, over all ranks together.
        preprocessing: as the model has it.
        augmentation: random changes of training images.
        validation: shards to choose settings and the best checkpoint by; None for none.
        workers: processes or threads that read and decode, a rank; 0 does it when a batch is asked for.
        order: in which order.
        reading: by what means.
        micro_batch: largest number of pairs that a device takes at once; None takes a rank's share of a batch at once.

    Attributes:
        skipped: half-open ranges of numbers of drawn pairs that no step takes, see `BatchPlans`; what earlier processes
            of the run had skipped is to be put here before training (`skipping.ranges`).

    Raises:
        FileNotFoundError: a pattern matches no shard.
        ValueError: a setting is wrong, or the shards hold fewer pairs than one batch.
    """

    def __init__(
        self,
        train: Mapping[str, Mapping[str, Any]],
        batch_size: int,
        preprocessing: Preprocessing,
        augmentation: Augmentation,
        validation: str | None = None,
        workers: int = 0,
        order: OrderSettings | None = None,
        reading: Reading | None = None,
        micro_batch: int | None = None,
    ) -> None:
        super().__init__()
        self.micro_batch = micro_batch
        self.order, self.reading = order or OrderSettings(), reading or Reading()
        self.batch_size, self.workers, self.preprocessing = batch_size, workers, preprocessing
        self.sources = read_sources(train, self.reading.cache)
        self.validation = find_shards(validation, self.reading.cache) if validation else []
        self.reader = PairReader(
            self.sources,
            preprocessing,
            augmentation,
            self.order.seed,
            self.reading.keep_decoded,
            self.reading.scaled_decoding,
        )
        self.opener = Opener(self.sources, self.reading.stall_seconds, self.reading.max_quarantined)
        self.skipped: list[tuple[int, int]] = []
        self._plans: BatchPlans | None = None
        self._saved: dict[str, Any] = {}
        self._epochs_before: dict[str, float] = {}

    def setup(self, stage: str) -> None:
        """Before the first step: ValueError where the ranks would read different shards."""
        if stage == "fit":
            files = {source.name: source.shards for source in self.sources} | {"data.validation": self.validation}
            check_same_files({name: [str(shard) for shard in shards] for name, shards in files.items()}, "shards")

    def train_dataloader(self) -> Steps:
        """From the step the trainer stands at to its last."""
        assert self.trainer is not None
        start, stop = self.trainer.global_step, self.trainer.max_steps
        before, self._saved = self._saved.get("order"), {}
        if start and not before and self._plans is not None:  # training goes on in this process
            before = self._plans.state_at(start)
        if start and not before:
            raise ValueError(
                f"the checkpoint is of step {start} and says nothing of its place in the data, as those of earlier "
                "versions: it can be evaluated and exported, not resumed"
            )
        self._plans = self._planned(start, stop, before if start else None)
        self._epochs_before = dict(before["epochs"]) if start and before else {}
        device = self.trainer.strategy.root_device
        return Steps(Loader(self.reader, self._plans, self.workers, self.reading, device), self._plans.parts)

    def val_dataloader(self) -> EvaluationBatches | list[Any]:
        """Every validation pair, on every rank, with the captions of the first source."""
        if not self.validation:
            return []
        captions, patience = self.sources[0].captions, self.reading.stall_seconds
        return EvaluationBatches(self.validation, self.preprocessing, captions=captions, stall_seconds=patience)

    @property
    def parts(self) -> int:
        """Micro-batches of a step on one rank."""
        return Split(self.batch_size, world_size(), self.micro_batch).accumulation

    def recalibration_pixels(self, batches: int, device: torch.device) -> Iterator[Tensor]:
        """This rank's pixels of the first training batches, by micro-batches, to measure batch-norm statistics on."""
        loader = Loader(self.reader, self._planned(0, batches), self.workers, self.reading)
        return (batch.pixels.to(device) for batch in islice(loader, batches * self.parts))

    def skip(self, first_step: int, last_step: int) -> dict[str, int]:
        """Leave out from now on what the steps took, the last included; training begins again before them.

        Step s is the one whose batch is taken while `trainer.global_step` is s: it makes update s + 1. A trainer that
        fits after this goes on at the place of its checkpoint, or, without one, at the beginning. To be called on every
        rank, with the same steps, after the fit has ended. Steps of which the place is not known any more, those before
        the fit and more than 100 before its last checkpoint or row of metrics, are passed over.

        Returns:
            first_pair and pairs: the range of numbers of drawn pairs, which `skipped` has now too.

        Raises:
            ValueError: the last step has not been taken by a fit since the last call, or is none that is known still.
        """
        if self._plans is None:
            raise ValueError(f"step {last_step} cannot be skipped: no step has been taken from this data")
        first, end = self._plans.numbers(first_step, last_step)
        self.skipped.append((first, end))
        self._plans, self._saved = None, {}  # where this fit stood is not where the next one begins
        return {"first_pair": first, "pairs": end - first}

    def facts(self) -> dict[str, Any]:
        """For result.json: epochs of each sequence of pairs that have gone by, and the shards that are broken."""
        return {"effective_epochs": self._epochs(), "quarantined": dict(self.opener.quarantine.names)}

    def metrics(self) -> dict[str, float]:
        """The same as numbers to log."""
        quarantined = {"quarantined_shards": float(len(self.opener.quarantine.names))}
        return {f"effective_epochs/{name}": epochs for name, epochs in self._epochs().items()} | quarantined

    def state_dict(self) -> dict[str, Any]:
        """Where the order goes on; every rank must call it.

        Raises:
            ValueError: the ranks have read different data.
        """
        if self._plans is None:
            return {}
        assert self.trainer is not None
        state = self._plans.state_at(self.trainer.global_step)
        states = gather_objects(state)
        if any(other != state for other in states):
            apart = [name for name in state if any(other[name] != states[0][name] for other in states)]
            places = [{name: other[name] for name in apart} for other in states]
            told = "; ".join(f"rank {number}: {place}" for number, place in enumerate(places))
            broken = ", ".join(self.opener.quarantine.names) or "nothing"
            raise ValueError(
                f"the ranks are not at the same place of the data ({told}), since one could not read what another "
                f"could; quarantined here: {broken}. Resume from the checkpoint before this one"
            )
        return {"order": state, "quarantined": dict(self.opener.quarantine.names)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the place until training asks for it."""
        self._saved = state_dict
        self.opener.quarantine.names.update(state_dict.get("quarantined", {}))

    def _epochs(self) -> dict[str, float]:
        assert self._plans is not None
        assert self.trainer is not None
        state = self._plans.state_at(self.trainer.global_step)
        if self.order.samples_per_epoch:
            return {"all": state["drawn"] / self.order.samples_per_epoch}
        # a place that is gone on from says nothing of the window that it lies in before a pair is drawn
        return dict(self._epochs_before if self._plans.start == self.trainer.global_step else state["epochs"])

    def _planned(self, start: int, stop: int, state: Mapping[str, Any] | None = None) -> BatchPlans:
        order = Order(self.sources, self.order, self.opener, state)
        return BatchPlans(order, self.batch_size, start, stop, rank(), world_size(), self.parts, self.skipped)
