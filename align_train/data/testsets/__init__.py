"""The sets that exams are taken on, each a class of settings with a method `open`."""

from align_train.data.testsets.class_folders import ClassFolders
from align_train.data.testsets.hub_dataset import HubDataset
from align_train.data.testsets.karpathy import Karpathy
from align_train.data.testsets.labelled_shards import LabelledShards
from align_train.data.testsets.sample_part import SamplePart
from align_train.data.testsets.sets import CaptionedImages, CaptionedSource, Images, LabelledImages, LabelledSource
from align_train.data.testsets.shard_pairs import ShardPairs
from align_train.data.testsets.table import Table

__all__ = [
    "CaptionedImages",
    "CaptionedSource",
    "ClassFolders",
    "HubDataset",
    "Images",
    "Karpathy",
    "LabelledImages",
    "LabelledShards",
    "LabelledSource",
    "SamplePart",
    "ShardPairs",
    "Table",
]
