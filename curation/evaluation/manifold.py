"""Precision, recall, density and coverage: do generated samples lie where real ones do, and reach all of them?

A set's manifold is the union of balls around its rows, each as large as the distance to the k-th nearest other row.
Precision and recall: Kynkäänniemi et al. 2019 (arXiv:1904.06991), Eq. 1 to 3. Density and coverage: Naeem et al. 2020
(arXiv:2002.09797), Eq. 3 and 4: the real balls only, so that one outlier among the generated rows cannot inflate
recall. A row on the rim of a ball is inside (authors' code; dgm-eval leaves it out). All four move with the number of
rows, so both sets are of one size.

Worked, with k = 1: real rows 0, 1, 2, 10 have radii 1, 1, 1, 8; generated rows 0.5, 1.6, 30, 31 have 1.1, 1.1, 1, 1.
0.5 and 1.6 lie in two real balls each, 30 and 31 in none: precision 2/4, density 4 / (1 * 4). The balls of 0, 1 and 2
hold a generated row: coverage 3/4. 0, 1 and 2 lie in generated balls: recall 3/4.

N rows of each set, D features, R and S rows of a block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from curation.numerics.distances import nearest_others, squared_distance_blocks


class Manifold(NamedTuple):
    """Shares in [0, 1]; density may exceed 1 where generated rows crowd into many real balls."""

    precision: float
    recall: float
    density: float
    coverage: float


def manifold_metrics(real_ND: Tensor, generated_ND: Tensor, *, k_recall: int = 3, k_coverage: int = 5) -> Manifold:
    """The four measures; `k_recall` is that of precision and recall, `k_coverage` that of density and coverage.

    Costs 3 N^2 D multiply-adds. ValueError if the sets differ in size or width, or have too few rows for a k.
    """
    num_rows = len(real_ND)
    if len(generated_ND) != num_rows:
        raise ValueError(f"sets must be of one size, the measures depend on it, got {num_rows} and {len(generated_ND)}")
    if not 1 <= min(k_recall, k_coverage) <= max(k_recall, k_coverage) < num_rows:
        raise ValueError(f"k must be in [1, {num_rows - 1}], the other rows, got {k_recall} and {k_coverage}")
    near_NK = nearest_others(real_ND, max(k_recall, k_coverage)).square()
    recall_N, coverage_N = near_NK[:, k_recall - 1], near_NK[:, k_coverage - 1]
    generated_N1 = nearest_others(generated_ND, k_recall)[:, -1:].square()
    flags = {"dtype": torch.bool, "device": real_ND.device}
    in_real, in_generated, holds = (torch.zeros(num_rows, **flags) for _ in range(3))
    num_held = 0
    for block in squared_distance_blocks(generated_ND, real_ND):
        inside_RS = block.squared_RS <= recall_N[block.keys]
        in_real[block.rows] |= inside_RS.any(dim=1)
        inside_RS = block.squared_RS <= coverage_N[block.keys]
        num_held += int(inside_RS.sum())
        holds[block.keys] |= inside_RS.any(dim=0)
        in_generated[block.keys] |= (block.squared_RS <= generated_N1[block.rows]).any(dim=0)
    shares = [flag.double().mean().item() for flag in (in_real, in_generated, holds)]
    return Manifold(shares[0], shares[1], num_held / (k_coverage * num_rows), shares[2])
