"""Hugging Face folders in and out."""

from align_train.hub.card import model_card
from align_train.hub.dual_encoder import DualEncoder, load_dual_encoder, weights_digest
from align_train.hub.exporting import export_hf
from align_train.hub.loading import align_node, load_hf
from align_train.hub.onnx_export import export_onnx, require_onnx
from align_train.hub.parts import load_parts, parts_node
from align_train.hub.pushing import push

__all__ = [
    "DualEncoder",
    "align_node",
    "export_hf",
    "export_onnx",
    "load_dual_encoder",
    "load_hf",
    "load_parts",
    "model_card",
    "parts_node",
    "push",
    "require_onnx",
    "weights_digest",
]
