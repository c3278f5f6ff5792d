"""Batches to embeddings: ALIGN as transformers' AlignModel with named repairs."""

from align_train.models.align import Align
from align_train.models.batch_norm import GhostBatchNorm2d, recalibrate
from align_train.models.building import build, build_align
from align_train.models.compiling import compile_towers
from align_train.models.initialisation import centre_text

__all__ = ["Align", "GhostBatchNorm2d", "build", "build_align", "centre_text", "compile_towers", "recalibrate"]
