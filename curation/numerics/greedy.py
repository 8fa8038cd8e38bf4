"""Greedy selection by distance to what is already selected: k-center, and rules that weigh the distance.

Gonzalez 1985 (doi:10.1016/0304-3975(85)90224-5): the row farthest from the chosen ones is chosen next, which covers
all rows within twice the least possible radius. A step needs one column of the matrix of distances. Made one at a
time, each is a pass over all rows through memory; so the columns of the rows that score highest are made together, in
one matrix product, and used if their turn comes before they are forgotten. The choice does not depend on that.

N rows, D embedding, K chosen.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curation.numerics.neighbors import squared_distances

COLUMNS_AHEAD = 32
"""Made in one product: as long as two or three singly, at 20,000 x 512 on a CPU."""
COLUMNS_KEPT = 256
"""Columns that wait for their turn; N float32 each."""

Scores = Callable[[Tensor, list[int]], Tensor]
"""(nearest2_N, chosen) -> scores (N,) of the next choice; those of chosen rows do not matter."""


def greedy_by_distance(rows_ND: Tensor, *, keep: int, first: int, scores: Scores) -> Tensor:
    """Rows (keep,) int64 in the order of choice: `first`, then each time the row of the highest score, the lowest
    place among equals.

    `scores` is told the squared Euclidean distance of each row to the nearest chosen row other than itself (inf for the
    only one) and the chosen rows. ValueError if `keep` is not in [0, N], or `first` not in [0, N).
    """
    n = len(rows_ND)
    if not 0 <= keep <= n:
        raise ValueError(f"keep must be in [0, {n}], got {keep}")
    if keep and not 0 <= first < n:
        raise ValueError(f"first must be in [0, {n}), got {first}")
    rows_ND = rows_ND.float()
    norms2_N = rows_ND.square().sum(dim=1)
    nearest2_N = torch.full_like(norms2_N, torch.inf)
    is_chosen = torch.zeros(n, dtype=torch.bool, device=rows_ND.device)
    ahead: dict[int, Tensor] = {}
    chosen: list[int] = []
    following = first
    likely = torch.tensor([first] if keep else [], device=rows_ND.device)
    while len(chosen) < keep:
        if following not in ahead:
            columns = squared_distances(rows_ND, likely, norms2_N).T.contiguous()
            ahead.update(zip(likely.tolist(), columns, strict=True))
            while len(ahead) > COLUMNS_KEPT:
                del ahead[next(iter(ahead))]
        column = ahead.pop(following)
        column[following] = torch.inf
        torch.minimum(nearest2_N, column, out=nearest2_N)
        chosen.append(following)
        is_chosen[following] = True
        if len(chosen) < keep:
            score_N = scores(nearest2_N, chosen).masked_fill(is_chosen, -torch.inf)
            following = int(score_N.argmax())
            if following not in ahead:
                likely = score_N.topk(min(COLUMNS_AHEAD, n - len(chosen))).indices
                others = likely[likely != following]
                # Last, so that it is there when the oldest are forgotten.
                likely = torch.cat([others, torch.tensor([following], device=likely.device)])
    return torch.tensor(chosen, dtype=torch.int64, device=rows_ND.device)


def k_center(rows_ND: Tensor, *, keep: int, first: int) -> Tensor:
    """Rows (keep,) int64: `first`, then each time the row farthest from the chosen ones. Errors as above."""
    return greedy_by_distance(rows_ND, keep=keep, first=first, scores=lambda nearest2_N, _: nearest2_N)
