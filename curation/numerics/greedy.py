"""Greedy selection by distance to what is already selected: k-center, and rules that weigh the distance.

Gonzalez 1985 (doi:10.1016/0304-3975(85)90224-5): the row farthest from the chosen ones is chosen next, which covers
all rows within twice the least possible radius. A step needs one column of the matrix of distances. Made one at a
time, each is a pass over all rows through memory; so columns are made together, in one matrix product: for scores of a
row alone those of all that are chosen among a few candidates, else those of the rows that score highest, to be used if
their turn comes before they are forgotten. The choice does not depend on that, but for rounding.

N rows, D embedding, K chosen, M candidates.
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

CANDIDATES = 512
"""Rows among which is chosen before all rows hear of it: 512 x 512 distances are made in a few ms."""
COLUMNS_AT_ONCE = 64
"""N float32 each, and as much again while they are made."""

RowScore = Callable[[Tensor, Tensor], Tensor]
"""(squared distances (M,), places (M,) of those rows) -> scores (M,)."""
Scores = Callable[[Tensor, list[int]], Tensor]
"""(nearest2_N, chosen) -> scores (N,) of the next choice; those of chosen rows do not matter."""


def greedy_by_distance(rows_ND: Tensor, *, keep: int, first: int, scores: Scores) -> Tensor:
    """Rows (keep,) int64 in the order of choice: `first`, then each time the row of the highest score, the lowest
    place among equals.

    `scores` is told the squared Euclidean distance of each row to the nearest chosen row other than itself (inf for the
    only one) and the chosen rows. ValueError if `keep` is not in [0, N], or `first` not in [0, N).
    """
    n = len(rows_ND)
    _check(n, keep, first)
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


def greedy_by_spacing(rows_ND: Tensor, *, keep: int, first: int, score: RowScore) -> Tensor:
    """The same choice for a score of each row alone that never grows when its distance shrinks, many rows at a time.

    A row outside the highest-scoring few can only sink, so as long as one of those scores above what the best of the
    others had, the next choice is among them; and there the distances are one small matrix. Then all rows hear of all
    that was chosen in one product. `score` is told squared distances to the nearest chosen row, and the rows' places.
    """
    n = len(rows_ND)
    _check(n, keep, first)
    rows_ND = rows_ND.float()
    norms2_N = rows_ND.square().sum(dim=1)
    nearest2_N = torch.full_like(norms2_N, torch.inf)
    everywhere = torch.arange(n, device=rows_ND.device)
    is_chosen = torch.zeros(n, dtype=torch.bool, device=rows_ND.device)
    chosen, fresh = everywhere[:0], everywhere[first : first + min(keep, 1)]
    while len(fresh):
        chosen = torch.cat([chosen, fresh])
        is_chosen[fresh] = True
        for part in fresh.split(COLUMNS_AT_ONCE):
            nearest = squared_distances(rows_ND, part, norms2_N).amin(dim=1)
            torch.minimum(nearest2_N, nearest, out=nearest2_N)
        if len(chosen) == keep:
            break
        score_N = score(nearest2_N, everywhere).masked_fill(is_chosen, -torch.inf)
        top = score_N.topk(min(CANDIDATES, n - len(chosen)))
        rest = -torch.inf if len(top.indices) == n - len(chosen) else float(top.values[-1])
        best = int(score_N.argmax())
        places_M = top.indices.sort().values
        if best not in places_M:  # more rows score alike than there are candidates
            fresh = everywhere[best : best + 1]
            continue
        distances_MM = squared_distances(
            rows_ND[places_M], torch.arange(len(places_M), device=rows_ND.device), norms2_N[places_M]
        )
        fresh = places_M[
            _choices(
                nearest2_N[places_M],
                distances_MM,
                lambda near_M, places_M=places_M: score(near_M, places_M),
                first=int(torch.searchsorted(places_M, best)),
                most=keep - len(chosen),
                above=rest,
            )
        ]
    return chosen


def _choices(
    near_M: Tensor, distances_MM: Tensor, score: Callable[[Tensor], Tensor], *, first: int, most: int, above: float
) -> Tensor:
    """Places (m,) among M rows: `first`, then each time the highest score, while it is higher than `above`."""
    is_chosen = torch.zeros(len(near_M), dtype=torch.bool, device=near_M.device)
    choices, following = [], first
    while True:
        choices.append(following)
        is_chosen[following] = True
        near_M = torch.minimum(near_M, distances_MM[following])
        score_M = score(near_M).masked_fill(is_chosen, -torch.inf)
        following = int(score_M.argmax())
        if len(choices) == most or not float(score_M[following]) > above:
            return torch.tensor(choices, device=near_M.device)


def k_center(rows_ND: Tensor, *, keep: int, first: int) -> Tensor:
    """Rows (keep,) int64: `first`, then each time the row farthest from the chosen ones. Errors as above."""
    return greedy_by_spacing(rows_ND, keep=keep, first=first, score=lambda nearest2_M, _: nearest2_M)


def _check(n: int, keep: int, first: int) -> None:
    if not 0 <= keep <= n:
        raise ValueError(f"keep must be in [0, {n}], got {keep}")
    if keep and not 0 <= first < n:
        raise ValueError(f"first must be in [0, {n}), got {first}")
