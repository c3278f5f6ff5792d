"""Hugging Face folders in and out."""

from align_train.hub.card import model_card
from align_train.hub.exporting import export_hf
from align_train.hub.loading import load_hf

__all__ = ["export_hf", "load_hf", "model_card"]
