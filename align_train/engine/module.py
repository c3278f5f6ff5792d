"""The training step, in the order of time."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from align_train.batch import Batch, StepBatch
from align_train.distributed import world_size
from align_train.engine.encoding import captions, encode
from align_train.engine.sharding import shard_model
from align_train.evaluation import Exam
from align_train.metrics import effective_rank, mean_cosine, retrieval_recall
from align_train.models import Align, centre_text
from align_train.models.class_head import ClassHead
from align_train.models.repairs import set_depths
from align_train.records import Tally

log = logging.getLogger(__name__)


class AlignTraining(L.LightningModule):
    """Contrastive training of ALIGN with negatives from all ranks.

    Random numbers (dropout, stochastic depth) are a function of seed and step, so that a resumed run draws the same
    ones; nothing of them needs saving.

    Args:
        model: both towers.
        optimizer: makes an optimizer from the model, e.g. a partial of `align_train.optim.lamb`.
        schedule: factor of the learning rate by step.
        objective: this rank's share of the loss, of embeddings, temperature and identities; see `Contrastive`.
        seed: of the random numbers.
        centre_captions: start the text projection's bias at minus the mean of the first batch; see `centre_text`.
        recipe: resolved configuration as YAML text; travels in every checkpoint.

    Attributes:
        statistics: what the batch-norm statistics are, once that is settled at the end; travels likewise.
        head: a classifier that is trained above the image tower; None where there is none.
    """

    def __init__(
        self,
        model: Align,
        optimizer: Callable[[nn.Module], Optimizer],
        schedule: Callable[[int], float],
        objective: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
        seed: int = 0,
        centre_captions: bool = False,
        recipe: str = "",
    ) -> None:
        super().__init__()
        self.model = model
        self.recipe, self.statistics = recipe, ""
        self._make_optimizer, self._schedule = optimizer, schedule
        self._objective, self._seed, self._centre = objective, seed, centre_captions
        self.head: ClassHead | None = None
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._dropped = Tally()

    def configure_model(self) -> None:
        """Deal out the weights where the strategy asks for it, by giving a mesh of devices."""
        if self.device_mesh is not None:
            shard_model(self.model, self.device_mesh["data_parallel"])

    def training_step(self, batch: StepBatch, batch_index: int) -> Tensor:
        """One global batch: this rank's b pairs against all ranks' B."""
        image, text = encode(self.model, batch, [self._seed, self.trainer.global_step])  # (b, D) each
        loss = self._objective(image, text, self.model.temperature, batch.identities.to(image.device))
        self._log_step(loss)
        if (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0:  # when Lightning writes a row
            self._log_health(image.detach(), text.detach())
        return loss

    def trained(self) -> nn.Module:
        """What the optimizer is made for."""
        return self.model

    def own_exams(self, exams: Mapping[str, Exam]) -> dict[str, Exam]:
        """The exams that the settings name, as they are taken of what is trained here."""
        return dict(exams)

    def on_train_start(self) -> None:
        """Let the configured learning rate, decay and so on win over those in a checkpoint."""
        optimizer, wanted = self.trainer.optimizers[0], self._make_optimizer(self.trained()).param_groups
        for group, options in zip(optimizer.param_groups, wanted, strict=True):
            group |= {name: value for name, value in options.items() if name not in ("params", "lr")}
        scheduler = self.lr_schedulers()
        assert isinstance(scheduler, LambdaLR)
        scheduler.base_lrs = [options["lr"] for options in wanted]
        for group, peak in zip(optimizer.param_groups, scheduler.base_lrs, strict=True):
            group["lr"] = peak * self._schedule(scheduler.last_epoch)

    def on_train_batch_start(self, batch: StepBatch, batch_index: int) -> None:
        """Centre the captions before the very first step."""
        # Lightning counts logged steps one or two too far after a resume, which would shift the rows of metrics.csv.
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.trainer.global_step
        if self._centre and self.trainer.global_step == 0 and batch_index == 0:
            centre_text(self.model, captions(batch, self.device))

    def on_train_batch_end(self, outputs: Any, batch: StepBatch, batch_index: int) -> None:
        """What was drawn for this step's images is for no others."""
        set_depths(self.model, None)

    def forget_step(self) -> None:
        """Drop what a step leaves in the model that is not gone on with."""
        set_depths(self.model, None)
        self.zero_grad(set_to_none=True)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then bring the temperature back within its bounds."""
        super().optimizer_step(*args, **kwargs)
        self.model.clamp_temperature()

    def validation_step(self, batch: Batch | Tally, batch_index: int) -> None:
        """Embed; the score is over all batches together."""
        self._dropped.update(batch.dropped if isinstance(batch, Batch) else batch)
        if isinstance(batch, Batch):
            image = self.model.encode_image(batch.pixels)
            self._seen.append((image, self.model.encode_text(batch.input_ids, batch.attention_mask)))

    def on_validation_epoch_end(self) -> None:
        """Recall on the validation pairs; its mean over both ways is what the best checkpoint is chosen by."""
        dropped, seen = self._dropped, self._seen
        self._dropped, self._seen = Tally(), []
        if not seen:
            raise ValueError(
                f"none of the validation pairs could be used ({dropped.described()}): check data.validation"
            )
        if dropped:
            log.warning("validation pairs dropped: %s", dropped.described())
        image, text = (torch.cat(part) for part in zip(*seen, strict=True))
        recall = retrieval_recall(image, text, torch.arange(len(image), device=image.device), ks=(1, 5))
        recall["mean_r5"] = (recall["i2t_r5"] + recall["t2i_r5"]) / 2
        recall |= {f"dropped/{reason}": float(count) for reason, count in dropped.items()}
        self.log("step", float(self.trainer.global_step), sync_dist=world_size() > 1)
        # every rank has seen every validation pair: the values are equal already, their mean is only for Lightning
        self.log_dict({f"validation/{name}": value for name, value in recall.items()}, sync_dist=world_size() > 1)

    def configure_optimizers(self) -> Any:
        """One optimizer, its learning rate set at every step."""
        optimizer = self._make_optimizer(self.trained())
        scheduler = LambdaLR(optimizer, self._schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the recipe beside the weights: a checkpoint says how it was made."""
        checkpoint |= {"recipe": self.recipe, "statistics": self.statistics}

    def _log_step(self, loss: Tensor) -> None:
        self.log("step", float(self.trainer.global_step))
        self.log("loss", loss, sync_dist=world_size() > 1)
        self.log("temperature", self.model.temperature.detach())
        self.log("learning_rate", max(group["lr"] for group in self.trainer.optimizers[0].param_groups))

    def _log_health(self, image: Tensor, text: Tensor) -> None:
        """A tower that maps all to one point shows here, on up to 256 pairs, long before it shows in the loss."""
        for name, embeddings in (("image", image[:256]), ("text", text[:256])):
            if len(embeddings) > 1 and torch.isfinite(embeddings).all():
                self.log(f"health/{name}_mean_cosine", mean_cosine(embeddings))
                self.log(f"health/{name}_effective_rank", effective_rank(embeddings))
