"""LAMB as ALIGN was trained with: Adam's direction, scaled tensor by tensor to the size of the weights.

You et al., arXiv 1904.00962; in the details tensorflow-addons 0.22, which kakaobrain/coyo-align uses and whose numbers
`tests/golden/lamb.npz` holds: both moments bias-corrected, decay added to the direction, no clipping of the ratio.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Lamb(Optimizer):
    """Layer-wise adaptive moments.

    For a tensor w with gradient g, at its step t = 1, 2, ...:

        m = b1 m + (1 - b1) g                       m_hat = m / (1 - b1^t)
        v = b2 v + (1 - b2) g^2                     v_hat = v / (1 - b2^t)
        u = m_hat / (sqrt(v_hat) + eps) + weight_decay w
        w = w - lr r u                              r = |w| / |u| if both are > 0, else 1

    A parameter group with `adapt=False` takes neither decay nor layer adaptation: u without the last term, r = 1. The
    reference does so for batch norm. All else is adapted, scalars too: a temperature moves by a factor of 1 +- lr
    a step. A tensor without a gradient (None) is skipped; one whose gradient is zero still decays.

    Args:
        params: tensors, named tensors or parameter groups.
        lr: relative step; 1e-3 in the paper, 2e-3 in Kakao's COYO run.
        betas: decay of the two moments; tensorflow-addons' default.
        eps: added to the root of the second moment; tensorflow-addons' default.
        weight_decay: 1e-5 in the ALIGN paper.
        foreach: True updates all tensors of a group together, False one after the other; the results are equal.

    Raises:
        ValueError: an option out of range; in `step`, a sparse gradient.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-5,
        *,
        foreach: bool = True,
    ) -> None:
        # A config's own kind of list would make the checkpoint one that only this program can load.
        options = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**options, "adapt": True, "foreach": foreach})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as any optimizer does, its options checked first."""
        _check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every tensor that has a gradient; the value of `closure`, if one is given, is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        batches = [(group, batch) for group in self.param_groups for batch in _batches(group["params"])]
        for group, (weights, grads) in batches:
            states = [self._next_state(w) for w in weights]
            update = _update_together if group["foreach"] else _update_one_by_one
            update(weights, grads, states, group)
        return loss

    def _next_state(self, w: Tensor) -> dict[str, Any]:
        """The state of w, begun if it has none, its step counted: tensors and numbers, so a checkpoint loads safely."""
        state = self.state[w]
        if not state:
            state.update(step=0, mean=torch.zeros_like(w), square=torch.zeros_like(w))
        state["step"] += 1
        return state


def _batches(params: list[Tensor]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """(weights, gradients) of those that have a gradient, by device and type: lists that one kernel can take."""
    batches: dict[Any, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for w in params:
        if w.grad is None:
            continue
        if w.grad.layout != torch.strided:
            raise ValueError(
                f"LAMB needs dense gradients, got a sparse one for a parameter of shape {tuple(w.shape)}: "
                f"build its embedding with sparse=False"
            )
        weights, grads = batches[w.device, w.dtype]
        weights.append(w)
        grads.append(w.grad)
    return list(batches.values())


def _update_one_by_one(
    weights: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any]
) -> None:
    """The formula of `Lamb` as it is written there: the reference that the fast path is tested against."""
    beta1, beta2 = group["betas"]
    for w, grad, state in zip(weights, grads, states, strict=True):
        mean, square, step = state["mean"], state["square"], state["step"]
        mean.mul_(beta1).add_(grad, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = (square / (1 - beta2**step)).sqrt() + group["eps"]
        update = mean / (1 - beta1**step) / root
        if group["adapt"]:
            update += group["weight_decay"] * w
            dtype = _norm_dtype(w)
            weight_norm = torch.linalg.vector_norm(w, dtype=dtype)
            update *= _ratio(weight_norm, torch.linalg.vector_norm(update, dtype=dtype))
        w.sub_(group["lr"] * update)


def _update_together(
    weights: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any]
) -> None:
    """The same for all tensors at once: a few large kernels, and nothing waits for the device."""
    beta1, beta2 = group["betas"]
    means, squares = [s["mean"] for s in states], [s["square"] for s in states]
    torch._foreach_mul_(means, beta1)
    torch._foreach_add_(means, grads, alpha=1 - beta1)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, grads, grads, value=1 - beta2)
    roots = torch._foreach_div(squares, [1 - beta2 ** s["step"] for s in states])
    torch._foreach_sqrt_(roots)
    torch._foreach_add_(roots, group["eps"])
    updates = torch._foreach_div(means, [1 - beta1 ** s["step"] for s in states])
    torch._foreach_div_(updates, roots)
    if group["adapt"]:
        torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
        dtype = _norm_dtype(weights[0])
        weight_norms = torch.stack(torch._foreach_norm(weights, 2, dtype=dtype))
        update_norms = torch.stack(torch._foreach_norm(updates, 2, dtype=dtype))
        torch._foreach_mul_(updates, _ratio(weight_norms, update_norms).unbind())
    torch._foreach_add_(weights, updates, alpha=-group["lr"])


def _ratio(weight_norm: Tensor, update_norm: Tensor) -> Tensor:
    """|w| / |u| where both are positive, else 1; chosen on the device."""
    both = (weight_norm > 0) & (update_norm > 0)
    return torch.where(both, weight_norm / update_norm, 1.0)


def _norm_dtype(w: Tensor) -> torch.dtype:
    """At least float32: one ratio of norms scales a whole tensor, and bf16 has two digits."""
    return torch.promote_types(w.dtype, torch.float32)


def _check(options: dict[str, Any]) -> None:
    """Raise ValueError for an option out of range, with its name and number."""
    for name in ("lr", "weight_decay"):
        if not 0 <= options[name] < float("inf"):
            raise ValueError(f"{name} of LAMB must be a finite number >= 0, got {options[name]}")
    # With 0, an element that never had a gradient, such as a word not yet seen, would become 0 / 0.
    if not 0 < options["eps"] < float("inf"):
        raise ValueError(f"eps of LAMB must be a finite number > 0, got {options['eps']}")
    betas = options["betas"]
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas of LAMB must be two numbers in [0, 1), such as (0.9, 0.999), got {tuple(betas)}")
