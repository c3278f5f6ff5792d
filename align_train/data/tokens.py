"""Captions to WordPiece ids, with the vocabulary that ships in the package."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import BertTokenizer

from align_train.shipped import vocabulary


def load_tokenizer(max_tokens: int = 64, path: Path | None = None) -> BertTokenizer:
    """A lower-casing WordPiece tokenizer that cuts captions at `max_tokens`.

    Raises:
        ValueError: the vocabulary did not load. transformers takes a wrong argument for a vocabulary of 5 without
            a word, and every caption becomes [UNK].
    """
    path = path or vocabulary()
    tokenizer = BertTokenizer(vocab=str(path), do_lower_case=True, model_max_length=max_tokens)
    lines = len(path.read_text(encoding="utf-8").splitlines())
    if len(tokenizer) != lines:
        raise ValueError(f"{path} has {lines} tokens, but the tokenizer has {len(tokenizer)}: is it a BERT vocab.txt?")
    return tokenizer


def tokenize(tokenizer: BertTokenizer, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Ids and mask, int64 (B, L), padded to the longest caption of the batch."""
    encoded = tokenizer(list(captions), padding=True, truncation=True, return_tensors="pt")
    return encoded["input_ids"].to(torch.int64), encoded["attention_mask"].to(torch.int64)
