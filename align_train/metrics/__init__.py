"""Numbers that say how good, and how healthy, embeddings are. Pure functions, checkable by hand."""

from align_train.metrics.classification import (
    Confusion,
    class_embeddings,
    classification_ranks,
    confusions,
    mean_per_class,
    predictions,
)
from align_train.metrics.health import alignment, effective_rank, mean_cosine, modality_gap, uniformity
from align_train.metrics.intervals import class_mean_interval, mean_interval, median_interval
from align_train.metrics.linear_probe import Probe, choose_probe, fit_probe, probe_ranks
from align_train.metrics.neighbours import neighbour_ranks, without_class
from align_train.metrics.retrieval import (
    chance_median_rank,
    chance_recall,
    median_rank,
    recall_at,
    retrieval_ranks,
    retrieval_recall,
)

__all__ = [
    "Confusion",
    "Probe",
    "alignment",
    "chance_median_rank",
    "chance_recall",
    "choose_probe",
    "class_embeddings",
    "class_mean_interval",
    "classification_ranks",
    "confusions",
    "effective_rank",
    "fit_probe",
    "mean_cosine",
    "mean_interval",
    "mean_per_class",
    "median_interval",
    "median_rank",
    "modality_gap",
    "neighbour_ranks",
    "predictions",
    "probe_ranks",
    "recall_at",
    "retrieval_ranks",
    "retrieval_recall",
    "uniformity",
    "without_class",
]
