"""The text tower's last layer for what ALIGN reads of it, [CLS] alone: the same values and gradients, less work.

Shapes: B captions, L token columns, D numbers in a state.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import AlignModel
from transformers.models.align.modeling_align import AlignTextAttention, AlignTextSelfAttention


def repair_last_layer(model: AlignModel) -> None:
    """Compute position 0 alone in the last layer of the text tower; keys and values still come from all positions.

    `text_model(...).last_hidden_state` is (B, 1, D) from now on. Dropout there draws numbers for one position.
    """
    attention = model.text_model.encoder.layer[-1].attention
    attention.__class__ = _FirstAttention
    attention.self.__class__ = _FirstSelfAttention


class _FirstAttention(AlignTextAttention):
    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Tensor:
        heard, _ = self.self(hidden_states, attention_mask)
        first: Tensor = self.output(heard, hidden_states[:, :1])
        return first


class _FirstSelfAttention(AlignTextSelfAttention):
    """(B, L, D), and a mask (B, 1, L, L) unless all are tokens, to (B, 1, D)."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        query = self._heads(self.query(hidden_states[:, :1]))
        key, value = self._heads(self.key(hidden_states)), self._heads(self.value(hidden_states))
        mask = None if attention_mask is None else attention_mask[:, :, :1]
        dropout = self.attention_dropout if self.training else 0.0
        heard = F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=self.scaling)
        return heard.transpose(1, 2).flatten(2), None

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.attention_head_size)).transpose(1, 2)
