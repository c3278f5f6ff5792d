"""The loss of a step: which pairs are negatives of which."""

import torch
from torch import Tensor

from align_train.distributed import gather_rows, rank
from align_train.losses import share_of_loss

NEGATIVES = ("gathered", "local")


class Contrastive:
    """This rank's share of the contrastive loss; its mean over ranks, which DDP takes of the gradients, is the loss.

    Args:
        label_smoothing: over all pairs that are compared; 0.1 in the paper.
        negatives: `gathered` compares with the pairs of all ranks, as the paper does; `local` with those of this rank
            alone, which is another loss, of smaller batches.
        skip_duplicates: pairs with an equal image or an equal caption are no negatives of each other.
        chunk_size: rows whose logits are in memory at once; a smaller global batch, and None, takes all at once.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        label_smoothing: float = 0.1,
        negatives: str = "gathered",
        skip_duplicates: bool = False,
        chunk_size: int | None = None,
    ) -> None:
        if negatives not in NEGATIVES:
            raise ValueError(f"loss.negatives is {negatives!r}: choose {' or '.join(NEGATIVES)}")
        if not isinstance(label_smoothing, int | float) or not 0 <= label_smoothing < 1:
            raise ValueError(f"loss.label_smoothing must be in [0, 1), got {label_smoothing}; the paper has 0.1")
        if not isinstance(skip_duplicates, bool):
            raise ValueError(f"loss.skip_duplicates is {skip_duplicates!r}: give true or false")
        if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
            raise ValueError(f"loss.chunk_size is {chunk_size!r}: give 1 row or more, or null for all at once")
        self.label_smoothing, self.negatives = label_smoothing, negatives
        self.skip_duplicates, self.chunk_size = skip_duplicates, chunk_size

    def __call__(self, image: Tensor, text: Tensor, temperature: Tensor, identities: Tensor) -> Tensor:
        """Scalar, of this rank's (b, D) embeddings and (b, 2) identities against the (B, D) of all that are compared.

        Raises:
            ValueError: the ranks bring different numbers of pairs.
        """
        ids, first = identities if self.skip_duplicates else None, 0
        images, texts = image, text
        if self.negatives == "gathered":
            images, texts = gather_rows(torch.cat([image, text], 1)).split(image.shape[1], 1)
            ids, first = gather_rows(ids) if ids is not None else None, rank() * len(image)
        chunk_size = self.chunk_size if self.chunk_size and self.chunk_size < len(images) else None
        return share_of_loss(images, texts, temperature, first, len(image), self.label_smoothing, ids, chunk_size)
