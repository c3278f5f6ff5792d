"""The nouns that flow through models and engine: decoded, tokenized pairs, and what a step takes of them."""

from collections.abc import Callable, Sequence
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
        lengths: int64 (B,), tokens of each caption; stays on the CPU.
        identities: int64 (B, 2), a hash of each encoded image and of each caption: equal where these are.
        dropped: pairs that were to be here but could not be used, by reason; others stand in their place.
        bytes: of the encoded images and the texts that were read for it.
        position: where a stream goes on after this batch: the part of the stream, then `corpus.stream.Position`; None
            for shards, where the step says it all.
    """

    pixels: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    keys: tuple[str, ...]
    lengths: Tensor
    identities: Tensor
    dropped: Tally = field(default_factory=Tally)
    bytes: int = 0
    position: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch on another device. Lightning moves batches through this."""
        return self._changed(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, for a faster copy to a GPU."""
        return self._changed(Tensor.pin_memory)

    def tensors(self) -> tuple[Tensor, ...]:
        """What goes to the device."""
        return self.pixels, self.input_ids, self.attention_mask, self.identities

    def _changed(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        pixels, input_ids, attention_mask, identities = map(change, self.tensors())
        return replace(self, pixels=pixels, input_ids=input_ids, attention_mask=attention_mask, identities=identities)


@dataclass(slots=True)
class StepBatch:
    """What one optimizer step takes on this rank: micro-batches of equal size, most often one.

    Attributes:
        parts: the micro-batches, b pairs together.
    """

    parts: Sequence[Batch]

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of all pairs."""
        return tuple(key for part in self.parts for key in part.keys)

    @property
    def lengths(self) -> Tensor:
        """int64 (b,), tokens of each caption, on the CPU."""
        return torch.cat([part.lengths for part in self.parts])

    @property
    def identities(self) -> Tensor:
        """int64 (b, 2), where the parts are."""
        return torch.cat([part.identities for part in self.parts])

    @property
    def dropped(self) -> Tally:
        """What could not be used, by reason."""
        total = Tally()
        for part in self.parts:
            total.update(part.dropped)
        return total

    @property
    def bytes(self) -> int:
        """Of the encoded images and the texts."""
        return sum(part.bytes for part in self.parts)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "StepBatch":
        """On another device, if it is one part; several stay where they are, and go there one at a time in the step."""
        if len(self.parts) > 1:
            return self
        return replace(self, parts=[part.to(device, non_blocking=non_blocking) for part in self.parts])
