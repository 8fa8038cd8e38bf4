"""How varied a set of rows is: what to log of every sub-batch, lest a method quietly collapses on a few modes.

N rows, D embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def effective_clusters(assignments: Tensor) -> float:
    """exp(entropy) of the clusters' shares of the rows: k equal clusters count k, a dominating one counts little more
    than 1. Hill 1973 (doi:10.2307/1934352), the number of order 1.

    `assignments` (N,): each row's cluster, integers >= 0. ValueError if there is no row or a number is not one.
    """
    if assignments.ndim != 1 or not len(assignments) or assignments.dtype.is_floating_point:
        raise ValueError(
            f"assignments must be integers (N,) with N >= 1, got {assignments.dtype} {tuple(assignments.shape)}"
        )
    # unique, not bincount: a sub-batch of 512 rows may come from 10**7 clusters.
    _, counts = assignments.unique(return_counts=True)
    shares = counts.double() / len(assignments)
    return (-(shares * shares.log()).sum()).exp().item()


@torch.no_grad()
def duplicate_share(embeddings_ND: Tensor, *, threshold: float, block_rows: int = 1024) -> float:
    """Share of the rows, in [0, 1], that have another row of the set at a cosine of at least `threshold`.

    Rows of any float dtype, brought to unit norm in float32; so even equal rows may be 1e-6 short of a cosine of 1.
    Costs N**2 D / 2 multiply-adds, memory block_rows x N float32. ValueError if there is no row, a row is zero or not
    finite, or `threshold` is not in (-1, 1].
    """
    if embeddings_ND.ndim != 2 or not len(embeddings_ND):
        raise ValueError(f"embeddings must be (N, D) with N >= 1, got {tuple(embeddings_ND.shape)}")
    if not -1 < threshold <= 1:
        raise ValueError(f"threshold must be in (-1, 1], got {threshold}")
    if block_rows < 1:
        raise ValueError(f"block_rows must be at least 1, got {block_rows}")
    norms = torch.linalg.vector_norm(embeddings_ND, dim=1, dtype=torch.float32)
    wrong = (~(torch.isfinite(norms) & (norms > 0))).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(f"embeddings must be finite and not zero, row {wrong[0]} has norm {norms[wrong[0]].item()}")
    unit_ND = F.normalize(embeddings_ND.float(), dim=1)
    has_twin = torch.zeros(len(unit_ND), dtype=torch.bool, device=unit_ND.device)
    for first in range(0, len(unit_ND), block_rows):
        # A pair is looked at once, from its earlier row, and marks both.
        close_RM = (unit_ND[first : first + block_rows] @ unit_ND[first:].T >= threshold).triu_(diagonal=1)
        has_twin[first : first + block_rows] |= close_RM.any(dim=1)
        has_twin[first:] |= close_RM.any(dim=0)
    return has_twin.double().mean().item()
