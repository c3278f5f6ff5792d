"""What a run is about to take, said and checked before its first step."""

import logging
import os
from collections.abc import Mapping

import lightning as L
import torch

from align_train.data.counting import Epoch, count_epochs
from align_train.distributed import rank
from align_train.engine.data import PairData
from align_train.engine.device_speed import Peak, peak_of
from align_train.engine.sharding import FullySharded
from align_train.engine.split import Split
from align_train.models import Align
from align_train.models.batch_norm import tracking_layers
from align_train.models.cost import Cost, cost_of
from align_train.models.memory import memory_of, virtual_batch

log = logging.getLogger(__name__)


class Budget(L.Callback):
    """Prints batch, parameters, memory, length and FLOPs of a run on the first rank; refuses what cannot be split.

    Args:
        chunk_size: rows whose logits are in memory at once, as `Contrastive` has it; None for all.

    Attributes:
        cost: FLOPs of pairs; None before the run is set up.
        peak: what a device does at best; None before that.
    """

    def __init__(self, chunk_size: int | None = None) -> None:
        self.cost: Cost | None = None
        self.peak: Peak | None = None
        self._chunk_size = chunk_size

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check and print, as soon as the ranks know each other; ValueError as `Split`.

        So early, the weights are not yet on the device, nor shared out.
        """
        if stage != "fit":
            return
        model, device = pl_module.model, trainer.strategy.root_device
        assert isinstance(model, Align)
        split = split_of(trainer, model)
        self.cost, self.peak = cost_of(model), peak_of(device, trainer.precision)  # on all ranks: they may share cores
        if rank() > 0:
            return
        data = trainer.datamodule
        epochs = count_epochs(data.sources, data.order) if isinstance(data, PairData) else {}
        shards = split.ranks if isinstance(trainer.strategy, FullySharded) else 1
        memory = memory_of(model, trainer.precision)
        need = memory.of(split.micro, split.local, split.batch_size, self._chunk_size, shards)
        room = memory_there(device, trainer.num_devices)
        print(f"batch {split}")
        print(told_parameters(model))
        print(f"memory about {need / 1e9:,.3g} GB a rank, of {room / 1e9:,.3g} GB that are there")
        print(told_length(split.batch_size, trainer.max_steps, epochs))
        print(told_compute(self.cost, self.peak, model.preprocessing.max_tokens))
        warn_of_memory(need, room, split)


def split_of(trainer: L.Trainer, model: Align) -> Split:
    """How a run's batch is split; ValueError if it cannot be, or if micro-batches would make another model of it."""
    data, group_size = trainer.datamodule, virtual_batch(model)
    split = Split(data.batch_size, trainer.world_size, data.micro_batch, group_size)
    if split.accumulation > 1 and group_size is None and tracking_layers(model):
        raise ValueError(
            f"step.micro_batch={data.micro_batch} splits {split.local:,} pairs of a rank, but batch norm over a whole "
            "batch needs them at once: set model.batch_norm.statistics=virtual (or frozen), or step.micro_batch=null "
            "and model.gradient_checkpointing=true; in fine-tuning these settings have no `model.` before them"
        )
    return split


def memory_there(device: torch.device, processes: int) -> float:
    """Bytes that a rank can have: what is free on its GPU, or its share of the machine's memory."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / processes


def warn_of_memory(need: float, room: float, split: Split) -> None:
    """Say so where an estimate is more than there is; not an error, since it is one."""
    if need > room:
        log.warning(
            "a rank will need about %.3g GB, and there are %.3g GB: set step.micro_batch to less than %d, "
            "or model.gradient_checkpointing=true (gradient_checkpointing=true in fine-tuning)",
            need / 1e9,
            room / 1e9,
            split.micro,
        )


def told_parameters(model: Align) -> str:
    """One line: parameters in all, of each tower, and how many of them are trained."""
    towers = {"image tower": model.vision_model, "text tower": model.text_model}
    counts = {name: sum(p.numel() for p in tower.parameters()) for name, tower in towers.items()}
    total = sum(p.numel() for p in model.parameters())
    counts["projection and temperature"] = total - sum(counts.values())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parts = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    return f"parameters {total:,} ({parts}), {trained:,} of them trained"


def told_length(batch_size: int, steps: int, epochs: Mapping[str, Epoch]) -> str:
    """One line: pairs in all, and how often that is through the data."""
    pairs = batch_size * steps
    parts = [
        f"{'' if epoch.exact else 'about '}{pairs / epoch.pairs:,.3g} epochs of {epoch.pairs:,} pairs ({name})"
        for name, epoch in epochs.items()
    ]
    return f"length {steps:,} steps, {pairs:,} pairs, {'; '.join(parts) or 'epochs unknown'}"


def told_compute(cost: Cost, peak: Peak, tokens: int) -> str:
    """One line: FLOPs of a pair with the longest caption, and the peak that utilisation is a share of."""
    most = cost.pairs(torch.tensor([tokens]))
    return (
        f"compute {most / 1e9:,.3g} GFLOPs a pair of {tokens} tokens, forward and backward; a device does at most "
        f"{peak.flops / 1e12:,.3g} TFLOP/s ({peak.source})"
    )
