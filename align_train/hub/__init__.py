"""Hugging Face folders in and out."""

from align_train.hub.card import model_card
from align_train.hub.dual_encoder import DualEncoder, load_dual_encoder, weights_digest
from align_train.hub.exporting import export_hf
from align_train.hub.loading import load_hf

__all__ = ["DualEncoder", "export_hf", "load_dual_encoder", "load_hf", "model_card", "weights_digest"]
