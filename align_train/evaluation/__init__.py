"""Exams of a model."""

from align_train.evaluation.checking import check_exams
from align_train.evaluation.contact_sheet import contact_sheet
from align_train.evaluation.embedded import EmbeddingFolder
from align_train.evaluation.encoder import Encoder, Encoding
from align_train.evaluation.exam import Exam, Outcome, Score, Value
from align_train.evaluation.head_accuracy import HeadAccuracy
from align_train.evaluation.health import Health
from align_train.evaluation.linear_probe import LinearProbe
from align_train.evaluation.neighbours import Neighbours
from align_train.evaluation.retrieval import Retrieval
from align_train.evaluation.sweep import Forgetting, Point, Recommendation, as_result, recommend, sweep
from align_train.evaluation.taking import Taken, metrics_of, take_exams
from align_train.evaluation.zero_shot import ZeroShot

__all__ = [
    "EmbeddingFolder",
    "Encoder",
    "Encoding",
    "Exam",
    "Forgetting",
    "HeadAccuracy",
    "Health",
    "LinearProbe",
    "Neighbours",
    "Outcome",
    "Point",
    "Recommendation",
    "Retrieval",
    "Score",
    "Taken",
    "Value",
    "ZeroShot",
    "as_result",
    "check_exams",
    "contact_sheet",
    "metrics_of",
    "recommend",
    "sweep",
    "take_exams",
]
