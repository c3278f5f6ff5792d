"""Lightning modules, data module and callbacks; the only floor, but for the command line, that knows Lightning."""

from align_train.engine.budget import Budget
from align_train.engine.checkpoints import (
    AtomicCheckpointIO,
    check_fit,
    load_weights,
    of_training,
    parted,
    read_checkpoint,
)
from align_train.engine.classification import ClassifierTraining
from align_train.engine.data import PairData
from align_train.engine.examination import Examination
from align_train.engine.execution import Execution
from align_train.engine.host_memory import keep_freed_memory
from align_train.engine.metrics_file import MetricsFile
from align_train.engine.module import AlignTraining
from align_train.engine.objective import Contrastive
from align_train.engine.progress import Progress
from align_train.engine.recalibration import needs_recalibration, recalibrate_on
from align_train.engine.sharding import FullySharded
from align_train.engine.stopping import StopOnNonFinite, StopOnPlateau, StopOnSignal
from align_train.engine.stream import StreamData

__all__ = [
    "AlignTraining",
    "AtomicCheckpointIO",
    "Budget",
    "ClassifierTraining",
    "Contrastive",
    "Examination",
    "Execution",
    "FullySharded",
    "MetricsFile",
    "PairData",
    "Progress",
    "StopOnNonFinite",
    "StopOnPlateau",
    "StopOnSignal",
    "StreamData",
    "check_fit",
    "keep_freed_memory",
    "load_weights",
    "needs_recalibration",
    "of_training",
    "parted",
    "read_checkpoint",
    "recalibrate_on",
]
