"""Krippendorff's alpha: how far raters agree beyond chance, with any number of ratings a unit.

Krippendorff, "Computing Krippendorff's Alpha-Reliability", 2011. 1 is full agreement, 0 what chance would give, below 0
is disagreement by system. Units that one rater alone has seen tell nothing and do not count.

N ratings, V values, U units.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

Metric = Literal["nominal", "interval"]


def krippendorff_alpha(unit_N: np.ndarray, value_N: np.ndarray, *, metric: Metric = "nominal") -> float | None:
    """1 - observed / expected disagreement; None if no unit has two ratings, or all ratings are one value.

    `nominal`: two values agree or do not. `interval`: disagreement is the squared difference, so for -1, 0, 1 a win
    against a loss weighs four times a win against a tie.
    """
    unit_N, value_N = np.asarray(unit_N), np.asarray(value_N)
    if unit_N.shape != value_N.shape or unit_N.ndim != 1:
        raise ValueError(f"units and values must be (N,) both, got {unit_N.shape} and {value_N.shape}")
    values_V, value_N = np.unique(value_N, return_inverse=True)
    units_U, unit_N = np.unique(unit_N, return_inverse=True)
    counts_UV = np.zeros((len(units_U), len(values_V)))
    np.add.at(counts_UV, (unit_N, value_N), 1)
    counts_UV = counts_UV[counts_UV.sum(1) >= 2]
    ratings_U = counts_UV.sum(1)
    # How often value v stands beside value w in a unit, each unit weighing as many ratings as it has.
    weight_U1 = 1 / np.maximum(ratings_U - 1, 1)[:, None]
    coincidence_VV = counts_UV.T @ (counts_UV * weight_U1) - np.diag((counts_UV * weight_U1).sum(0))
    total_V = coincidence_VV.sum(1)
    distance_VV = (values_V[:, None] - values_V[None, :]) ** 2 if metric == "interval" else 1 - np.eye(len(values_V))
    num_ratings = total_V.sum()
    expected = (total_V[:, None] * total_V[None, :] * distance_VV).sum()
    if num_ratings < 2 or expected == 0:
        return None
    return float(1 - (num_ratings - 1) * (coincidence_VV * distance_VV).sum() / expected)
