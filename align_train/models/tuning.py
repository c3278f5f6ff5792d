"""Which parts of a trained model are trained on, and how the others are kept at rest."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain

from torch import nn
from transformers.models.align.modeling_align import AlignTextSelfAttention

from align_train.models.align import Align
from align_train.models.batch_norm import FrozenBatchNorm2d, GhostBatchNorm2d
from align_train.models.lora import MARK, Lora, adapted_matrices, has_lora, insert_lora
from align_train.models.repairs import StochasticDepth
from align_train.models.stages import Stage, stages

WORDS = ("full", "frozen", "lora")
Part = str | int


@dataclass(frozen=True)
class Tuning:
    """Settings: what of each tower is trained.

    `full` is all of it. `frozen` is none: the tower then gives in training what it gives in evaluation, as in LiT
    (Zhai et al., arXiv 2111.07991). A whole number is so many last stages, see `stages`; those below are frozen.
    `lora` is adapters alone; weights and batch norm are frozen, dropout and stochastic depth are not.

    Attributes:
        image: full, frozen, lora, or the number of last stages, of at most 8.
        text: the same, of at most the number of layers and 2.
        temperature: train the divisor of the logits.
        lora: the adapters, where a tower has some.

    Raises:
        ValueError: a tower's value is none of these, or both towers are frozen.
    """

    image: Part = "full"
    text: Part = "full"
    temperature: bool = True
    lora: Lora = field(default_factory=Lora)

    def __post_init__(self) -> None:
        for name, part in self._towers().items():
            count = isinstance(part, int) and not isinstance(part, bool) and part >= 1
            if part not in WORDS and not count:
                raise ValueError(
                    f"tuning.{name} is {part!r}: give {', '.join(WORDS)}, or the number of last stages to train, "
                    "of at least 1"
                )
        if self.image == self.text == "frozen":
            raise ValueError("tuning.image and tuning.text are both frozen: nothing is left to train, so free one")

    def prepare(self, model: Align) -> list[str]:
        """Make a model ready to be trained so, in place, before it is compiled or copied; once only.

        The state dict keeps its keys, unless there are adapters: see `merge_lora`.

        Returns:
            What was done, a line for each tower and the temperature.

        Raises:
            ValueError: a tower has fewer stages, the model has adapters already, or peft is not installed.
        """
        if has_lora(model):
            raise ValueError("the model has adapters of LoRA already: merge them first (merge_lora)")
        self._check_stages(stages(model))
        wanted = [tower for tower, part in self._towers().items() if part == "lora"]
        matrices = {tower: adapted_matrices(model, tower) for tower in wanted}
        if matrices:
            insert_lora(model, chain.from_iterable(matrices.values()), self.lora)
        model.requires_grad_(False)
        model.temperature.requires_grad_(self.temperature)
        towers = stages(model).items()  # as they are now, with their adapters
        told = [self._prepare_tower(name, tower, len(matrices.get(name, []))) for name, tower in towers]
        return [*told, f"temperature {'trained' if self.temperature else 'at rest'}"]

    def _towers(self) -> dict[str, Part]:
        return {"image": self.image, "text": self.text}

    def _check_stages(self, towers: dict[str, list[Stage]]) -> None:
        for name, part in self._towers().items():
            tower = towers[name]
            if isinstance(part, int) and part > len(tower):
                raise ValueError(
                    f"tuning.{name} is {part}, but the {name} tower has {len(tower)} stages: {_names(tower)}"
                )

    def _prepare_tower(self, name: str, tower: list[Stage], matrices: int) -> str:
        """One tower, given the number of its matrices that have adapters; the line about it."""
        part = self._towers()[name]
        if part == "lora":
            train_adapters(_modules(tower))
            trained, rest = _counts(tower)
            rank = f"LoRA of rank {self.lora.rank} on {matrices:,} matrices"
            return f"{name} tower: {rank}, {trained:,} parameters trained beside {rest:,} at rest"
        kept = {"full": len(tower), "frozen": 0}[part] if isinstance(part, str) else part
        below, above = tower[: len(tower) - kept], tower[len(tower) - kept :]
        put_to_rest(_modules(below))
        for module in _modules(above):
            module.requires_grad_(True)
        trained, rest = _counts(tower)
        if not trained:
            return f"{name} tower frozen: {rest:,} parameters at rest"
        if not rest:
            return f"{name} tower: all {trained:,} parameters trained"
        return f"{name} tower: {_names(above)} trained, {trained:,} parameters, the {rest:,} below at rest"


def put_to_rest(modules: Iterable[nn.Module]) -> None:
    """Let modules do in training what they do in evaluation, whatever mode is set later, and train none of them."""
    for module in modules:
        module.requires_grad_(False)
        freeze_statistics(module)
        for layer in module.modules():
            if isinstance(layer, nn.Dropout | StochasticDepth):
                layer.p = 0.0
            elif isinstance(layer, AlignTextSelfAttention):
                layer.attention_dropout = 0.0


def freeze_statistics(module: nn.Module) -> None:
    """Let all batch norms use their running statistics in training and leave them as they are."""
    for layer in module.modules():
        if isinstance(layer, GhostBatchNorm2d):
            layer.__class__ = FrozenBatchNorm2d
            layer.group_size = None


def train_adapters(modules: Iterable[nn.Module]) -> None:
    """Train the adapters of modules alone, and leave batch norm's statistics as they are."""
    for module in modules:
        freeze_statistics(module)
        for name, weight in module.named_parameters():
            weight.requires_grad_(MARK in f".{name}")


def _modules(tower: list[Stage]) -> list[nn.Module]:
    return [module for _, modules in tower for module in modules]


def _names(tower: list[Stage]) -> str:
    return ", ".join(name for name, _ in tower)


def _counts(tower: list[Stage]) -> tuple[int, int]:
    """Numbers trained and at rest."""
    weights = [weight for module in _modules(tower) for weight in module.parameters()]
    trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    return trained, sum(weight.numel() for weight in weights) - trained
