"""Exams of a model."""

from align_train.evaluation.contact_sheet import contact_sheet
from align_train.evaluation.retrieval import Embeddings, Retrieval, Score, embed, table

__all__ = ["Embeddings", "Retrieval", "Score", "contact_sheet", "embed", "table"]
