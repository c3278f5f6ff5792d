"""metrics.csv: one row a logged step, without gap or overlap after a resume.

The row of step s holds what was measured with the weights after s updates: the loss of the batch that makes update
s + 1, and the validation that came before it.
"""

import csv
import io
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from align_train.files import atomic_write


class MetricsFile(Logger):
    """Writes metrics to RUN/metrics.csv as they come, a row for each step; a new metric is a new column.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self._columns = self._header()
        self._row: dict[str, Any] = {}  # the last one, to which more may be added
        self._start = 0  # where it begins in the file

    @property
    def name(self) -> str:
        """For Lightning's messages."""
        return "metrics"

    @property
    def version(self) -> int:
        """There is one file a run."""
        return 0

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self.path.parent)

    @rank_zero_only
    def go_on_from(self, step: int) -> None:
        """Drop the rows after `step`, which a resumed run is about to write again, and take up the row of `step`."""
        rows = self._rows()
        self._row = next(({**row, "step": step} for row in rows if int(row["step"]) == step), {})
        self._rewrite([row for row in rows if int(row["step"]) < step])
        self._write_row()

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: resolved.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add values to the row of `step`: at once, since a run that is killed goes on after its last checkpoint."""
        values = {name: value for name, value in metrics.items() if name != "epoch"}
        if not values:
            return
        if self._row.get("step") != step:
            self._row, self._start = {"step": step}, self.path.stat().st_size if self.path.is_file() else 0
        self._row |= values
        if new := [name for name in self._row if name not in self._columns]:
            self._columns += new
            self._rewrite([row for row in self._rows() if int(row["step"]) != step])
        self._write_row()

    def _write_row(self) -> None:
        """Put the last row in the place of what was known of it before."""
        if not self._row:
            return
        line = io.StringIO(newline="")
        csv.DictWriter(line, self._columns).writerow(self._row)
        with self.path.open("r+b") as file:
            file.seek(self._start)
            file.write(line.getvalue().encode())
            file.truncate()

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns)
        writer.writeheader()
        writer.writerows(rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = text.getvalue().encode()
        with atomic_write(self.path) as file:
            file.write(content)
        self._start = len(content)

    def _header(self) -> list[str]:
        if not self.path.is_file():
            return ["step"]
        with self.path.open(newline="") as file:
            return next(csv.reader(file), ["step"])

    def _rows(self) -> list[dict[str, str]]:
        """What the file has; a last line torn by a kill is left out."""
        if not self.path.is_file():
            return []
        with self.path.open(newline="") as file:
            return [row for row in csv.DictReader(file) if None not in row.values()]


class RowBeforeSave(L.Callback):
    """Writes the row of a step before a checkpoint is saved after it, which Lightning does the other way round.

    A run that is killed in between goes on from that checkpoint, and would not write the row again; where exams are
    taken there, that may be for hours. It must come before all callbacks that save, and after those that log.

    Args:
        file: where the row goes; Lightning writes the same into it again.
    """

    def __init__(self, file: MetricsFile) -> None:
        self._file = file

    def on_train_batch_end(self, trainer: L.Trainer, *given: Any) -> None:
        """Write it, if this step has one."""
        connector = trainer._logger_connector
        if connector.should_update_logs:
            row = convert_tensors_to_scalars(connector.metrics["log"])
            self._file.log_metrics(row, step=int(row.pop("step")))
