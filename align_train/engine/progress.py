"""What one sees of a run while it goes on, and what it sums up at its end."""

import io
import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

import lightning as L
from tqdm import tqdm

from align_train.batch import StepBatch
from align_train.distributed import gather_counts, gather_objects, rank, world_size
from align_train.engine.budget import Budget
from align_train.engine.throughput import Throughput, peak_memory
from align_train.records import Tally

log = logging.getLogger(__name__)


class Progress(L.Callback):
    """A bar with loss, temperature, speed and utilisation; speed and drops as metrics; totals that survive a resume.

    In metrics.csv, rates (images/s, data-wait share, model FLOP utilisation) are of the steps since the row before. The
    first step of a process, with start-up and compilation, is not among them, unless it is the only one. In
    result.json, they are of all steps but these first ones; `training_seconds` is of all steps. Waiting for data is
    what `data.Steps` measures where it fetches. All else from the end of one step to that of the next is the step's,
    but for validation and the saving of checkpoints, which are in none of these numbers. `first_step_seconds`
    is of the process that ended the run, `peak_memory_gb` (1e9 bytes) the most that any rank of it has held: of
    tensors on a GPU, else of the process. Where the output is no terminal (a SLURM log), a line every `every_seconds`
    instead of a bar.

    Args:
        budget: knows what a pair costs and a device can do; None for no utilisation.
        every_seconds: between two lines in a log file.
    """

    def __init__(self, budget: Budget | None = None, every_seconds: float = 30.0) -> None:
        self.dropped = Tally()
        self.bytes, self.memory = 0, 0
        self.throughput = Throughput()
        self._budget, self._every = budget or Budget(), every_seconds
        self._bar: tqdm | None = None
        self._said_at = self._waited = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the bar, at the step that training goes on from."""
        self._bar = tqdm(
            total=trainer.max_steps,
            initial=trainer.global_step,
            desc="train",
            unit="step",
            disable=rank() != 0,
            file=sys.stderr if sys.stderr.isatty() else io.StringIO(),
            dynamic_ncols=sys.stderr.isatty(),
        )
        self._said_at = time.perf_counter()
        self._waited = trainer.train_dataloader.waited
        self.throughput.go_on()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: StepBatch, batch_idx: int
    ) -> None:
        """Take what was waited since the last one. It was for a later batch: Lightning fetches one ahead."""
        before, self._waited = self._waited, trainer.train_dataloader.waited
        self.throughput.batch_is_here(self._waited - before)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: StepBatch, batch_idx: int
    ) -> None:
        """Count, and every few steps measure the speed and log it."""
        # captions of other ranks are taken to be as long as those of this one, pair for pair
        flops = self._budget.cost.pairs(batch.lengths) if self._budget.cost else 0.0
        ranks = world_size()
        self.throughput.step_is_done(len(batch) * ranks, flops * ranks, ranks, self._budget.peak)
        self.bytes += batch.bytes
        self.dropped.update(batch.dropped)
        if trainer.global_step % trainer.log_every_n_steps == 0 or trainer.global_step == trainer.max_steps:
            self._measure(trainer, pl_module)
        if self._bar is not None:
            self._bar.update(trainer.global_step - self._bar.n)
            self._say(time.perf_counter())

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Time spent on validation is neither training nor waiting."""
        self.throughput.go_on()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Nor is the time of a save; what each rank has counted since the last row goes into it.

        Lightning (2.6) calls this on every rank, after it has put the callbacks' states into the checkpoint. The file
        is the first rank's, and a save by time or after a signal is at any step.
        """
        self.throughput.saving()
        self._collect(trainer)
        checkpoint["callbacks"][self.state_key] = self.state_dict()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the bar, and say what was dropped."""
        if self._bar is not None:
            self._bar.close()
        self._collect(trainer)
        if rank() == 0:
            log.info("pairs dropped in training: %s", self.dropped.described())

    def facts(self) -> dict[str, Any]:
        """Totals for result.json, None where unknown; on the first rank, after training."""
        total, first = self.throughput.total, self.throughput.first
        rates = self.throughput.of_run()
        names = ("images_per_second", "images_per_second_per_device", "data_wait_share", "model_flop_utilisation")
        return {
            "pairs_read": total.pairs + self.dropped.total(),
            "pairs_seen": total.pairs,
            "dropped": dict(self.dropped),
            "bytes_read": self.bytes,
            "training_seconds": total.seconds,
            "first_step_seconds": first.seconds if first else None,
            **{name: rates.get(name) for name in names},
            "model_flops": total.flops or None,
            "peak_memory_gb": self.memory / 1e9,
        }

    def state_dict(self) -> dict[str, Any]:
        """Totals, for the checkpoint."""
        kept = {"dropped": dict(self.dropped), "bytes": self.bytes, "memory": self.memory}
        return kept | self.throughput.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting; drops and bytes on the first rank alone, which collects them."""
        self.dropped = Tally(state_dict["dropped"] if rank() == 0 else {})
        self.bytes = state_dict["bytes"] if rank() == 0 else 0
        self.memory = state_dict.get("memory", 0)
        self.throughput.restore(state_dict)

    def _say(self, now: float) -> None:
        """In a log file, the bar as a line of its own every so many seconds."""
        assert self._bar is not None
        if rank() == 0 and not sys.stderr.isatty() and now - self._said_at >= self._every:
            self._said_at = now
            print(self._bar, file=sys.stderr, flush=True)

    def _collect(self, trainer: L.Trainer) -> None:
        """Move what every rank has dropped, and the bytes that it has read, to the first; and find the most memory."""
        total, size = Tally(gather_counts(self.dropped)), sum(gather_objects(self.bytes))
        self.dropped, self.bytes = (total, size) if rank() == 0 else (Tally(), 0)
        self.memory = max(self.memory, *gather_objects(peak_memory(trainer.strategy.root_device)))

    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        rates = self.throughput.of_window()
        self._collect(trainer)
        pairs, lost = self.throughput.total.pairs, self.dropped.total()
        metrics = rates | {"pairs_seen": float(pairs), "pairs_read": float(pairs + lost)}
        metrics |= {"bytes_read": float(self.bytes), "peak_memory_gb": self.memory / 1e9}
        if self.throughput.first is not None:
            metrics["first_step_seconds"] = self.throughput.first.seconds
        metrics |= trainer.datamodule.metrics()
        metrics |= {f"dropped/{reason}": float(count) for reason, count in self.dropped.items()}
        pl_module.log_dict(metrics)
        if self._bar is not None:
            loss, temperature = (trainer.callback_metrics[name].item() for name in ("loss", "temperature"))
            shown = f"loss {loss:.3f}, temperature {temperature:.4f}, {told_rates(rates)}"
            self._bar.set_postfix_str(f"{shown}, {self.memory / 1e9:.3g} GB", refresh=False)


def told_rates(rates: Mapping[str, float]) -> str:
    """`120 images/s (15 a device), waiting 3 %, MFU 41 %`, of what is known."""
    speed, each = rates["images_per_second"], rates["images_per_second_per_device"]
    told = f"{speed:.0f} images/s" + (f" ({each:.0f} a device)" if round(each) != round(speed) else "")
    told += f", waiting {100 * rates['data_wait_share']:.0f} %"
    return told + (f", MFU {100 * rates['model_flop_utilisation']:.0f} %" if "model_flop_utilisation" in rates else "")
