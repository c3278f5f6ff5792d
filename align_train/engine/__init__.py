"""Lightning modules, data module and callbacks; the only floor, but for the command line, that knows Lightning."""

from align_train.engine.agreement import Agreement, NonFinite
from align_train.engine.budget import Budget
from align_train.engine.checkpoints import (
    AtomicCheckpointIO,
    check_fit,
    load_weights,
    newest_checkpoint,
    of_training,
    parted,
    read_checkpoint,
)
from align_train.engine.classification import ClassifierTraining
from align_train.engine.data import PairData
from align_train.engine.examination import Examination
from align_train.engine.execution import Execution
from align_train.engine.heartbeat import Heartbeat
from align_train.engine.host_memory import keep_freed_memory
from align_train.engine.metrics_file import MetricsFile, RowBeforeSave
from align_train.engine.module import AlignTraining
from align_train.engine.objective import Contrastive
from align_train.engine.owed_validation import OwedValidation, begin_even_without_steps
from align_train.engine.progress import Progress
from align_train.engine.recalibration import needs_recalibration, recalibrate_on
from align_train.engine.recovery import Recovery
from align_train.engine.sharding import FullySharded
from align_train.engine.skipping import Skipped, forget_skipped, note_skipped, ranges, read_skipped
from align_train.engine.stopping import StopOnPlateau
from align_train.engine.stream import StreamData
from align_train.engine.watchdog import Watchdog

__all__ = [
    "Agreement",
    "AlignTraining",
    "AtomicCheckpointIO",
    "Budget",
    "ClassifierTraining",
    "Contrastive",
    "Examination",
    "Execution",
    "FullySharded",
    "Heartbeat",
    "MetricsFile",
    "NonFinite",
    "OwedValidation",
    "PairData",
    "Progress",
    "Recovery",
    "RowBeforeSave",
    "Skipped",
    "StopOnPlateau",
    "StreamData",
    "Watchdog",
    "begin_even_without_steps",
    "check_fit",
    "forget_skipped",
    "keep_freed_memory",
    "load_weights",
    "needs_recalibration",
    "newest_checkpoint",
    "note_skipped",
    "of_training",
    "parted",
    "ranges",
    "read_checkpoint",
    "read_skipped",
    "recalibrate_on",
]
