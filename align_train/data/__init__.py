"""Shards to batches."""

from align_train.data.images import Augmentation
from align_train.data.pairs import Collate, EvaluationPairs, GlobalBatches, TrainingPairs, evaluation_batches
from align_train.data.shards import Shard, find_shards
from align_train.data.stream import StreamedBatches
from align_train.data.tokens import load_tokenizer

__all__ = [
    "Augmentation",
    "Collate",
    "EvaluationPairs",
    "GlobalBatches",
    "Shard",
    "StreamedBatches",
    "TrainingPairs",
    "evaluation_batches",
    "find_shards",
    "load_tokenizer",
]
