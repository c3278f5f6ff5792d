"""Which parameters an optimizer treats how, and optimizers built with these rules from a model.

`lamb` and `adamw` are what a config names, as a partial that waits for the model:

    _target_: align_train.optim.lamb
    _partial_: true
    lr: 1e-3
"""

from typing import Any, Protocol, runtime_checkable

from torch.nn import Module, Parameter
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import AdamW

from align_train.optim.lamb import Lamb

Groups = list[dict[str, Any]]


@runtime_checkable
class Staged(Protocol):
    """A model that says of its parameters, by name, how many stages lie between them and its outputs."""

    def distances(self) -> dict[str, int]: ...  # noqa: D102 - said above


def lamb(
    model: Module,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 1e-5,
    *,
    layer_decay: float = 1.0,
    foreach: bool = True,
) -> Lamb:
    """`Lamb` over a model's trainable parameters, with the rule of `lamb_groups` and the options of `Lamb`.

    `layer_decay` is that of `by_distance`.
    """
    groups = by_distance(model, lamb_groups(model), lr, layer_decay)
    return Lamb(groups, lr, betas, eps, weight_decay, foreach=foreach)


def adamw(
    model: Module,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    *,
    layer_decay: float = 1.0,
) -> AdamW:
    """torch's fused AdamW, with its defaults, over a model's trainable parameters, with the rule of `adamw_groups`.

    `layer_decay` is that of `by_distance`.
    """
    beta1, beta2 = betas  # a config's list is not the tuple that AdamW asks for
    groups = by_distance(model, adamw_groups(model), lr, layer_decay)
    return AdamW(groups, lr, (beta1, beta2), eps, weight_decay, fused=True)


def lamb_groups(model: Module) -> Groups:
    """Batch norm without decay and layer adaptation, all the rest with both.

    The rule of kakaobrain/coyo-align, `exclude_from_weight_decay=['bn/']`. Note what it leaves in: biases, layer norm
    and the temperature.

    Raises:
        ValueError: the model has no trainable parameter.
    """
    norms = {id(p) for module in model.modules() if isinstance(module, _BatchNorm) for p in module.parameters(False)}
    parameters = _trainable(model)
    rest = {"params": [p for p in parameters if id(p) not in norms]}
    batch_norm = {"params": [p for p in parameters if id(p) in norms], "adapt": False, "weight_decay": 0.0}
    return _filled(rest, batch_norm)


def adamw_groups(model: Module) -> Groups:
    """Decay for matrices and kernels (two dimensions or more), none for biases, norms and the temperature.

    The rule of CLIP (arXiv 2103.00020, section 2.5: "all weights that are not gains or biases").

    Raises:
        ValueError: the model has no trainable parameter.
    """
    parameters = _trainable(model)
    matrices = {"params": [p for p in parameters if p.ndim >= 2]}
    vectors = {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}
    return _filled(matrices, vectors)


def by_distance(model: Module, groups: Groups, lr: float, layer_decay: float) -> Groups:
    """The groups parted by how far their parameters are from the model's outputs, nearest first.

    The learning rate of each part is lr * layer_decay ** distance (BERT's layer-wise decay: ELECTRA, arXiv 2003.10555,
    appendix B; of image towers BEiT, arXiv 2106.08254). At 1 the groups stay as they are.

    Raises:
        ValueError: `layer_decay` is not above 0 and at most 1, or the model has no stages.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"optimizer.layer_decay is {layer_decay}: give a factor above 0 and of at most 1, such as 0.8")
    if layer_decay == 1:
        return groups
    if not isinstance(model, Staged):
        raise ValueError(
            f"optimizer.layer_decay is {layer_decay}, but {type(model).__name__} has no stages: set it to 1"
        )
    known = model.distances()
    distance = {id(p): known[name] for name, p in model.named_parameters() if p.requires_grad}
    return [
        {**group, "params": [p for p in group["params"] if distance[id(p)] == far], "lr": lr * layer_decay**far}
        for group in groups
        for far in sorted({distance[id(p)] for p in group["params"]})
    ]


def _trainable(model: Module) -> list[Parameter]:
    """The parameters to train, each once although modules may share it; ValueError if there is none."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        total = sum(1 for _ in model.parameters())
        raise ValueError(
            f"none of the {total} parameters of {type(model).__name__} is trainable: unfreeze a part of it"
        )
    return parameters


def _filled(*groups: dict[str, Any]) -> Groups:
    """The groups that have a parameter."""
    return [group for group in groups if group["params"]]
