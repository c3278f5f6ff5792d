"""Between two models of one architecture: weights that know the new data and have not forgotten the old."""

from collections.abc import Mapping

from torch import Tensor


def interpolate(start: Mapping[str, Tensor], end: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """(1 - alpha) * start + alpha * end, tensor by tensor (WiSE-FT, arXiv 2109.01903, equation 1).

    Batch norm's running statistics are taken so too; integers, which are counts, are those of `end`. At 0 and 1 it is
    a copy of `start` or of `end`, bit by bit, integers included.

    Args:
        start: state dict of the model before fine-tuning.
        end: that of the same model after it, with its adapters merged.
        alpha: share of `end`, from 0 to 1.

    Raises:
        ValueError: alpha is out of range, or the two differ in a name or a shape.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}: give the end's share, from 0 to 1")
    _check_alike(start, end)
    if alpha in (0, 1):  # where the formula would lose the sign of a zero, and 0 times infinity is not 0
        return {name: value.clone() for name, value in (end if alpha else start).items()}
    return {
        name: (1 - alpha) * start[name] + alpha * value if value.is_floating_point() else value.clone()
        for name, value in end.items()
    }


def _check_alike(start: Mapping[str, Tensor], end: Mapping[str, Tensor]) -> None:
    for one, other, lacking in ((start, end, "end"), (end, start, "start")):
        for name in one:
            if name not in other:
                raise ValueError(
                    f"the two models cannot be mixed: the {lacking} has no {name}; both must be of one architecture, "
                    "with their adapters merged"
                )
    for name, value in start.items():
        if value.shape != end[name].shape:
            raise ValueError(
                f"the two models cannot be mixed: {name} is {tuple(value.shape)} at the start and "
                f"{tuple(end[name].shape)} at the end; both must be of one architecture"
            )
