"""The contrastive objective: of one batch or of a rank's share of it, plainly or in chunks of rows."""

from align_train.losses.contrastive import contrastive_loss, row_losses, share_of_loss

__all__ = ["contrastive_loss", "row_losses", "share_of_loss"]
