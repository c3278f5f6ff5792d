"""Captions to WordPiece ids, with the vocabulary that ships in the package."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
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
    """Ids and mask, int64 (B, L), padded to the longest caption of the batch.

    What the tokenizer itself gives with padding and truncation, in half its time: transformers checks and copies each
    caption's lists on the way.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.enable_truncation(tokenizer.model_max_length)
    rows = [encoding.ids for encoding in backend.encode_batch_fast(list(captions))]
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids = np.full(mask.shape, tokenizer.pad_token_id, np.int64)
    ids[mask] = np.concatenate(rows)
    return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))
