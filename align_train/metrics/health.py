"""How healthy embeddings are: whether pairs meet, whether the space is used, whether the towers stay apart."""

from math import exp, log

import torch
from torch import Tensor
from torch.nn.functional import normalize

from align_train.metrics.checks import check_embeddings, check_same_space
from align_train.metrics.scores import block, exact, precision_of

ROWS = 4096  # normalised at a time


def alignment(image: Tensor, text: Tensor) -> float:
    """Mean squared distance between the normalised embeddings of pairs: 0 if they meet, 2 if they are orthogonal.

    Wang and Isola, "Understanding contrastive representation learning through alignment and uniformity on the
    hypersphere", arXiv 2005.10242, with their exponent 2.

    Args:
        image: (N, D), row i belongs to row i of text.
        text: (N, D).

    Raises:
        ValueError: shapes do not fit or a value is not finite.
    """
    check_same_space(image=image, text=text)
    if len(image) != len(text):
        raise ValueError(f"alignment is of pairs, but there are {len(image)} images and {len(text)} texts")
    with exact(image.device):
        apart = (_unit(a) - _unit(b) for a, b in zip(image.split(ROWS), text.split(ROWS), strict=True))
        return sum(x.square().sum(dtype=torch.float64).item() for x in apart) / len(image)


def uniformity(embeddings: Tensor) -> float:
    """log of the mean of exp(-2 d^2) over pairs of different rows, d their distance once normalised.

    0 for a collapsed tower, near -4 for rows spread evenly over a sphere of many dimensions; lower is more uniform.
    Wang and Isola, arXiv 2005.10242, with their t = 2. All N (N - 1) / 2 pairs, a block at a time: with many rows,
    pass a sample of them. A row of zeros has distance 1 from every other that is not.

    Args:
        embeddings: (N, D), N >= 2, normalised here.

    Raises:
        ValueError: not (N, D), fewer than two rows, or not finite.
    """
    rows = _at_least_two("uniformity", embeddings)
    size, total = block(embeddings.device), torch.zeros((), dtype=torch.float64, device=embeddings.device)
    with exact(embeddings.device):
        unit = _unit(embeddings)
        squares = 2 * unit.square().sum(1)
        for top in range(0, rows, size):
            across = slice(top, top + size)
            for left in range(top, rows, size):
                down = slice(left, left + size)
                # -2 d^2 = 4 x y - 2 |x|^2 - 2 |y|^2
                near = torch.addmm(squares[down], 4 * unit[across], unit[down].T, beta=-1)
                near = near.sub_(squares[across, None]).exp_()
                total += (near.triu_(1) if left == top else near).sum(1).sum(dtype=torch.float64)
    return log(total.item() / (rows * (rows - 1) / 2))


def modality_gap(image: Tensor, text: Tensor) -> float:
    """Distance between the mean of the normalised images and that of the normalised texts, 0 to 2.

    Liang et al., "Mind the gap", arXiv 2203.02053, section 4.1.

    Args:
        image: (N, D).
        text: (M, D).

    Raises:
        ValueError: shapes do not fit or a value is not finite.
    """
    check_same_space(image=image, text=text)
    with exact(image.device):
        return torch.linalg.vector_norm(_sums(image)[0] / len(image) - _sums(text)[0] / len(text)).item()


def effective_rank(embeddings: Tensor) -> float:
    """How many directions embeddings use: 1 if all lie on one line, up to min(N, D) if they fill the space.

        exp( - sum_i p_i log p_i ),  p_i = s_i / sum_j s_j,  s = singular values of the (N, D) matrix

    Roy and Vetterli, "The effective rank", EUSIPCO 2007. The matrix is taken as it is, the mean not removed, so
    embeddings that share one large component have a low effective rank, as they should.

    Raises:
        ValueError: not (N, D), empty, not finite, or all zero.
    """
    check_embeddings("embeddings", embeddings)
    with exact(embeddings.device):
        values = torch.linalg.svdvals(embeddings.to(precision_of(embeddings)))
    if not values.any():
        raise ValueError(f"embeddings {tuple(embeddings.shape)} are all zero, their effective rank is not defined")
    return exp(torch.special.entr(values / values.sum()).sum().item())


def mean_cosine(embeddings: Tensor) -> float:
    """Mean cosine between two different rows: near 0 for spread-out embeddings, near 1 for a collapsed tower.

    With x the normalised rows, ( |sum_i x_i|^2 - sum_i |x_i|^2 ) / (N (N - 1)): O(N D), no N x N matrix. A row of zeros
    has cosine 0 with every other.

    Args:
        embeddings: (N, D), N >= 2, normalised here.

    Raises:
        ValueError: not (N, D), fewer than two rows, or not finite.
    """
    rows = _at_least_two("a mean cosine", embeddings)
    with exact(embeddings.device):
        together, each = _sums(embeddings)
        return ((together.square().sum() - each) / (rows * (rows - 1))).item()


def _at_least_two(what: str, embeddings: Tensor) -> int:
    check_embeddings("embeddings", embeddings)
    if len(embeddings) < 2:
        raise ValueError(f"{what} between rows needs at least 2 rows, got {tuple(embeddings.shape)}")
    return len(embeddings)


def _sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """(D,) the sum of the normalised rows and () that of their squared lengths, in float64."""
    together, each = x.new_zeros(x.shape[1], dtype=torch.float64), x.new_zeros((), dtype=torch.float64)
    for rows in x.split(ROWS):
        unit = _unit(rows).double()
        together += unit.sum(0)
        each += unit.square().sum()
    return together, each


def _unit(x: Tensor) -> Tensor:
    """Rows of length 1, or of zeros, in at least float32."""
    return normalize(x.to(precision_of(x)), dim=1)
