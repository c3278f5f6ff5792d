"""How an encoded image and a caption become what a model takes."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from torch import Tensor
from transformers import BertTokenizer

from align_train.data.images import pixels_of
from align_train.data.tokens import load_tokenizer, tokenize
from align_train.records import Preprocessing


class Inputs(Protocol):
    """Makes the inputs of one model; used by several threads at a time."""

    def image(self, content: bytes, where: str) -> np.ndarray:
        """An encoded image to (3, H, W), of one size and type for all; `where` names it in messages.

        Raises:
            Unusable: it cannot be decoded.
        """

    def text(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Captions to ids and mask, int64 (B, L)."""

    def facts(self) -> dict[str, Any]:
        """What result.json says of it: size, interpolation, antialiasing, longest caption; plain values."""


@dataclass(frozen=True)
class AlignInputs:
    """ALIGN's: resize to a square, central crop, uint8; WordPiece of bert-base-uncased.

    Attributes:
        preprocessing: as the model has it.
    """

    preprocessing: Preprocessing

    def image(self, content: bytes, where: str = "image") -> np.ndarray:
        """uint8 (3, crop, crop); Unusable as `decode`."""
        return pixels_of(content, self.preprocessing, where).transpose(2, 0, 1)

    def text(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Padded to the longest of the captions."""
        return tokenize(self._tokenizer, captions)

    def facts(self) -> dict[str, Any]:
        """Of the preprocessing."""
        return {**asdict(self.preprocessing), "interpolation": "bilinear", "aspect_ratio": "not kept"}

    @cached_property
    def _tokenizer(self) -> BertTokenizer:
        return load_tokenizer(self.preprocessing.max_tokens)
