"""Shards to batches."""

from align_train.data.batches import BatchPlan, BatchPlans
from align_train.data.evaluation import EvaluationBatches
from align_train.data.images import Augmentation
from align_train.data.inputs import AlignInputs, Inputs
from align_train.data.loading import Loader, Reading, Steps
from align_train.data.opening import Opener
from align_train.data.order import Order
from align_train.data.pairs import Collate, PairReader
from align_train.data.sources import Source, read_sources
from align_train.data.storage.cache import Cache
from align_train.data.storage.shards import Shard, find_shards
from align_train.data.stream import StreamedBatches
from align_train.data.tokens import load_tokenizer
from align_train.data.windows import OrderSettings

__all__ = [
    "AlignInputs",
    "Augmentation",
    "BatchPlan",
    "BatchPlans",
    "Cache",
    "Collate",
    "EvaluationBatches",
    "Inputs",
    "Loader",
    "Opener",
    "Order",
    "OrderSettings",
    "PairReader",
    "Reading",
    "Shard",
    "Source",
    "Steps",
    "StreamedBatches",
    "find_shards",
    "load_tokenizer",
    "read_sources",
]
