"""The text tower on captions of like length: same outputs and gradients, fewer padding tokens.

Shapes: B captions, L token columns, D numbers in an embedding.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def in_length_chunks(
    encode: Callable[[Tensor, Tensor], Tensor],
    input_ids: Tensor,
    attention_mask: Tensor,
    chunks: int,
    multiple: int = 1,
) -> Tensor:
    """Encode captions sorted by length, in parts that are each as wide as their own longest caption.

    A caption ends at the last 1 of its mask. The parts have ceil(B / chunks) rows, the last one what is left: with
    `multiple`, few shapes in all. On a GPU the host waits once, for the widths of the parts.

    Args:
        encode: ids and mask (rows, width) to (rows, D), each row by itself.
        input_ids: (B, L).
        attention_mask: (B, L), 1 at tokens.
        chunks: into how many parts the batch is cut; fewer where it has fewer rows.
        multiple: widths are rounded up to a multiple of this, with masked zeros where L ends before.

    Returns:
        (B, D), in the order of the captions.
    """
    rows, columns = input_ids.shape
    positions = torch.arange(1, columns + 1, device=attention_mask.device)
    lengths, order = (attention_mask.ne(0) * positions).amax(1).sort()
    part = -(-rows // chunks)
    longest = lengths[[*range(part - 1, rows - 1, part), -1]].tolist()
    padding = (0, -columns % multiple)
    ids, mask = (F.pad(x, padding)[order].split(part) for x in (input_ids, attention_mask))
    widths = [max(-(-length // multiple), 1) * multiple for length in longest]
    encoded = [encode(i[:, :w], m[:, :w]) for i, m, w in zip(ids, mask, widths, strict=True)]
    return torch.cat(encoded).index_select(0, order.argsort())
