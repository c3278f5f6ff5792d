"""Nearest neighbours: does an image lie near training images of its class?"""

import torch
from torch import Tensor

from align_train.metrics.checks import check_integers, check_same_space
from align_train.metrics.scores import block, exact, least_scores, not_below, precision_of, wrong_scores


def neighbour_ranks(query: Tensor, bank: Tensor, query_label: Tensor, bank_label: Tensor, most: int = 20) -> Tensor:
    """How many of the bank's rows of other classes are at least as near as the nearest of the query's own class.

    Recall@K, a hit if any of the K nearest has the query's class, is the share of ranks below K, for K <= most
    (`recall_at`). Near is a high dot product. Ties count against the model, as in `retrieval_ranks`. One product with
    the whole bank, in blocks; what is held beside the arguments does not grow with the bank.

    Args:
        query: (Q, D) embeddings, L2-normalised for cosine similarity.
        bank: (N, D) embeddings, likewise.
        query_label: (Q,) integers.
        bank_label: (N,) integers.
        most: ranks are not told apart from here on.

    Returns:
        (Q,) int64 in 0..most; `most` where the bank has none of the query's class (`without_class` says where).

    Raises:
        ValueError: shapes do not fit, a value is not finite, the bank has only one class, most < 1.
    """
    check_same_space(query=query, bank=bank)
    check_integers("query_label", query_label, "query", len(query))
    check_integers("bank_label", bank_label, "row of the bank", len(bank))
    if most < 1:
        raise ValueError(f"most must be at least 1, got {most}")
    query_label, bank_label = query_label.to(query.device), bank_label.to(query.device)
    if (bank_label == bank_label[0]).all():
        raise ValueError(
            f"all {len(bank)} rows of the bank are of class {int(bank_label[0])}: there is nothing to tell"
        )
    ranks = torch.zeros_like(query_label, dtype=torch.int64)
    with exact(query.device):
        best = _best_right(query, bank, query_label, bank_label)
        least = least_scores(best, query, bank)
        for rows, _, scores in wrong_scores(query, bank, query_label, bank_label):
            ranks[rows] += not_below(scores, least[rows, None], 1)
    return ranks.clamp(max=most).masked_fill(without_class(query_label, bank_label), most)


def without_class(query_label: Tensor, bank_label: Tensor) -> Tensor:
    """(Q,) true where a query's class does not occur in the bank, so that no neighbour can be right."""
    return torch.isin(query_label, bank_label.to(query_label.device), invert=True)


def _best_right(query: Tensor, bank: Tensor, query_label: Tensor, bank_label: Tensor) -> Tensor:
    """(Q,) the highest score within the query's own class; -inf without one.

    Class by class: of C equally large ones, that is one C-th of the product with the whole bank.
    """
    size, dtype = block(query.device), precision_of(query, bank)
    best = torch.full((len(query),), -torch.inf, device=query.device, dtype=dtype)
    classes, queries = query_label.unique(return_counts=True)
    in_order, order = bank_label.sort()
    starts, ends = (torch.searchsorted(in_order, classes, right=right).tolist() for right in (False, True))
    asking = query_label.argsort().split(queries.tolist())
    for mine, start, end in zip(asking, starts, ends, strict=True):
        for theirs in order[start:end].split(size) if start < end else ():
            columns = bank[theirs].to(dtype).T
            for rows in mine.split(size):
                best[rows] = torch.maximum(best[rows], (query[rows].to(dtype) @ columns).amax(1))
    return best
