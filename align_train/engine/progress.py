"""What one sees of a run while it goes on, and what it sums up at its end."""

import io
import logging
import sys
import time
from typing import Any

import lightning as L
from tqdm import tqdm

from align_train.batch import Batch
from align_train.distributed import gather_counts, gather_objects, rank, world_size
from align_train.records import Tally

log = logging.getLogger(__name__)


class Progress(L.Callback):
    """A bar with loss, temperature, images/s and time left; speed and drops as metrics; totals that survive a resume.

    Where the output is no terminal (a SLURM log), a line every `every_seconds` instead of a bar.

    Args:
        every_seconds: between two lines in a log file.
    """

    def __init__(self, every_seconds: float = 30.0) -> None:
        self.dropped = Tally()
        self.pairs, self.bytes, self.seconds, self.waited = 0, 0, 0.0, 0.0
        self._every = every_seconds
        self._bar: tqdm | None = None
        self._idle_since = self._measured_at = self._said_at = 0.0
        self._pairs_measured, self._waited_measured = 0, 0.0

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
        self._idle_since = self._measured_at = self._said_at = time.perf_counter()
        self._pairs_measured, self._waited_measured = self.pairs, self.waited

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """The batch is here: what went by since the last one was waiting."""
        self.waited += time.perf_counter() - self._idle_since

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count, and every few steps measure the speed and log it."""
        now = time.perf_counter()
        self.seconds += now - self._idle_since
        self._idle_since = now
        self.pairs += len(batch) * world_size()
        self.bytes += batch.bytes
        self.dropped.update(batch.dropped)
        if trainer.global_step % trainer.log_every_n_steps == 0 or trainer.global_step == trainer.max_steps:
            self._measure(trainer, pl_module, now)
        if self._bar is not None:
            self._bar.update(trainer.global_step - self._bar.n)
            self._say(now)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Time spent on validation is neither training nor waiting."""
        self._idle_since = self._measured_at = time.perf_counter()
        self._pairs_measured, self._waited_measured = self.pairs, self.waited

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the bar, and say what was dropped."""
        if self._bar is not None:
            self._bar.close()
        self._collect()
        if rank() == 0:
            log.info("pairs dropped in training: %s", self.dropped.described())

    def facts(self) -> dict[str, Any]:
        """Totals for result.json; on the first rank, after training."""
        return {
            "pairs_read": self.pairs + self.dropped.total(),
            "pairs_seen": self.pairs,
            "dropped": dict(self.dropped),
            "bytes_read": self.bytes,
            "training_seconds": self.seconds,
            "images_per_second": self.pairs / self.seconds if self.seconds else None,
            "data_wait_share": self.waited / self.seconds if self.seconds else None,
        }

    def state_dict(self) -> dict[str, Any]:
        """Totals, for the checkpoint."""
        return {
            "dropped": dict(self.dropped),
            "pairs": self.pairs,
            "bytes": self.bytes,
            "seconds": self.seconds,
            "waited": self.waited,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting; drops and bytes on the first rank alone, which collects them."""
        self.dropped = Tally(state_dict["dropped"] if rank() == 0 else {})
        self.bytes = state_dict["bytes"] if rank() == 0 else 0
        self.pairs, self.seconds, self.waited = (state_dict[name] for name in ("pairs", "seconds", "waited"))

    def _say(self, now: float) -> None:
        """In a log file, the bar as a line of its own every so many seconds."""
        assert self._bar is not None
        if rank() == 0 and not sys.stderr.isatty() and now - self._said_at >= self._every:
            self._said_at = now
            print(self._bar, file=sys.stderr, flush=True)

    def _collect(self) -> None:
        """Move what every rank has dropped, and the bytes that it has read, to the first."""
        total, size = Tally(gather_counts(self.dropped)), sum(gather_objects(self.bytes))
        self.dropped, self.bytes = (total, size) if rank() == 0 else (Tally(), 0)

    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule, now: float) -> None:
        elapsed, self._measured_at = now - self._measured_at, now
        speed = (self.pairs - self._pairs_measured) / elapsed
        waiting = (self.waited - self._waited_measured) / elapsed
        self._pairs_measured, self._waited_measured = self.pairs, self.waited
        self._collect()
        metrics = {"images_per_second": speed, "data_wait_share": waiting, "pairs_seen": float(self.pairs)}
        metrics |= {"pairs_read": float(self.pairs + self.dropped.total()), "bytes_read": float(self.bytes)}
        metrics |= trainer.datamodule.metrics()
        metrics |= {f"dropped/{reason}": float(count) for reason, count in self.dropped.items()}
        pl_module.log_dict(metrics)
        if self._bar is not None:
            loss, temperature = (trainer.callback_metrics[name].item() for name in ("loss", "temperature"))
            shown = f"loss {loss:.3f}, temperature {temperature:.4f}, {speed:.0f} images/s"
            self._bar.set_postfix_str(shown, refresh=False)
