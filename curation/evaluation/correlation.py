"""Do scores agree? Spearman's rank correlation of every pair, and its interval over seeds (claim X-1).

Every method avoids both the tail and the redundant head in some form, so a high correlation says that two papers
choose much the same rows, and a low one that they do not. Ranks, because scores have no common unit.

n rows, S scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from curation.numerics.intervals import Interval, t_interval

MIN_ROWS = 3
"""Fewer rows than this have no correlation worth the name."""


def ranks(values_n: np.ndarray) -> np.ndarray:
    """Ranks (n,) float64 from 1, equal values sharing the mean of theirs. `values` finite."""
    _, inverse, counts = np.unique(values_n, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def spearman(a_n: np.ndarray, b_n: np.ndarray) -> float:
    """Pearson's correlation of the ranks over the rows where both are finite; NaN below 3 rows, or if one is constant.

    ValueError if the lengths differ.
    """
    if len(a_n) != len(b_n):
        raise ValueError(f"scores must have one value per row each, got {len(a_n)} and {len(b_n)}")
    both = np.isfinite(a_n) & np.isfinite(b_n)
    if both.sum() < MIN_ROWS:
        return float("nan")
    a, b = (ranks(values[both]) for values in (a_n, b_n))
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale else float("nan")


def spearman_matrix(scores: Mapping[str, np.ndarray]) -> np.ndarray:
    """(S, S) float64, symmetric, 1 on the diagonal (NaN for a constant score), in order of `scores`."""
    columns = [np.asarray(values, np.float64) for values in scores.values()]
    matrix_SS = np.full((len(columns), len(columns)), np.nan)
    for i, a in enumerate(columns):
        for j in range(i, len(columns)):
            matrix_SS[i, j] = matrix_SS[j, i] = spearman(a, columns[j])
    return matrix_SS


def over_seeds(matrices: Sequence[np.ndarray]) -> list[list[Interval | None]]:
    """For each pair of scores the mean over seeds and its 95% t interval; None where a seed has no value.

    `matrices`: one (S, S) per seed, of the same scores in the same order. ValueError if none, or their shapes differ.
    """
    if not matrices or any(matrix.shape != matrices[0].shape for matrix in matrices):
        raise ValueError(f"matrices must be of one shape, got {[matrix.shape for matrix in matrices]}")
    stacked = np.stack(matrices)
    size = stacked.shape[1]
    return [
        [t_interval(cell.tolist()) if np.isfinite(cell := stacked[:, i, j]).all() else None for j in range(size)]
        for i in range(size)
    ]
