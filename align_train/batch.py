"""The noun that flows through models and engine: one batch of decoded, tokenized pairs."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from align_train.records import Tally


@dataclass(slots=True)  # not frozen: Lightning's precisions rebuild the batch field by field
class Batch:
    """B pairs, ready for the towers.

    Attributes:
        pixels: uint8 (B, 3, H, W), channels_last in memory; the model scales them on its device.
        input_ids: int64 (B, L), WordPiece ids, padded to the longest caption of the batch.
        attention_mask: int64 (B, L), 1 where there is a token.
        keys: the pairs' names, to say which batch went wrong.
        dropped: pairs that were to be here but could not be used, by reason; others stand in their place.
        bytes: of the encoded images and the texts that were read for it.
        position: where a stream goes on after this batch: the part of the stream, then `corpus.stream.Position`; None
            for shards, where the step says it all.
    """

    pixels: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    keys: tuple[str, ...]
    dropped: Tally = field(default_factory=Tally)
    bytes: int = 0
    position: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch on another device. Lightning moves batches through this."""
        return replace(
            self,
            pixels=self.pixels.to(device, non_blocking=non_blocking),
            input_ids=self.input_ids.to(device, non_blocking=non_blocking),
            attention_mask=self.attention_mask.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, for a faster copy to a GPU."""
        return replace(
            self,
            pixels=self.pixels.pin_memory(),
            input_ids=self.input_ids.pin_memory(),
            attention_mask=self.attention_mask.pin_memory(),
        )
