"""Batches to embeddings: ALIGN as transformers' AlignModel with named repairs."""

from align_train.models.align import Align
from align_train.models.batch_norm import GhostBatchNorm2d, recalibrate
from align_train.models.building import build, build_align
from align_train.models.compiling import compile_towers
from align_train.models.initialisation import centre_text
from align_train.models.interpolation import interpolate
from align_train.models.lora import Lora, has_adapters, has_lora, merge_lora
from align_train.models.restoring import restore_align
from align_train.models.stages import stages
from align_train.models.tuning import Tuning

__all__ = [
    "Align",
    "GhostBatchNorm2d",
    "Lora",
    "Tuning",
    "build",
    "build_align",
    "centre_text",
    "compile_towers",
    "has_adapters",
    "has_lora",
    "interpolate",
    "merge_lora",
    "recalibrate",
    "restore_align",
    "stages",
]
