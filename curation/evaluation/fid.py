"""Fréchet distance between Gaussians fitted to two sets of features.

Heusel et al. 2017 (arXiv:1706.08500), Eq. 6, for features of any network: "FID" means Inception's, and figures of
different networks never compare, so a table names its features. Everything is float64.

The estimate is biased upwards by about 1/n (Chong and Forsyth 2020, arXiv:1911.07023): two sets are compared at equal
n, several sets with one reference at one n each, and `frechet_infinity` extrapolates 1/n to 0 for absolute figures.
A covariance of n <= D rows is singular; the distance is finite there and mostly bias.

N rows of one set, M of another, D features, B rows of a block.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BLOCK_ROWS = 16_384
POINTS = 15
"""Sizes to which the line in 1/n is fitted, as Chong and Forsyth do."""
INFINITY_ROWS = 2 * (POINTS - 1)
"""Fewer rows than this do not have so many sizes."""
SMALLEST_SHARE = 0.5
"""Of the rows, at the smallest of those sizes; the paper goes from 5,000 to 50,000 rows, which few studies have."""


class Moments(NamedTuple):
    """Count, mean (D,) and scatter (D, D), the sum of outer products of what is left of the mean; float64.

    They are all that the distance needs of a set, in memory that does not grow with it, and two parts' moments merge.
    """

    count: int
    mean_D: Tensor
    scatter_DD: Tensor

    def covariance(self) -> Tensor:
        """(D, D), unbiased. ValueError if there are fewer than two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs two rows, got {self.count}")
        return self.scatter_DD / (self.count - 1)

    def merged(self, other: Moments) -> Moments:
        """The moments of both sets together: Chan et al. 1979, Eq. 2.1, which does not cancel as sums of squares do."""
        if self.mean_D.shape != other.mean_D.shape:
            raise ValueError(f"features must be of one width, got {len(self.mean_D)} and {len(other.mean_D)}")
        count = self.count + other.count
        if not count:
            return self
        apart_D = other.mean_D - self.mean_D
        scatter_DD = self.scatter_DD + other.scatter_DD
        scatter_DD += torch.outer(apart_D, apart_D) * (self.count * other.count / count)
        return Moments(count, self.mean_D + apart_D * (other.count / count), scatter_DD)


def moments(features_ND: Tensor, *, block_rows: int = BLOCK_ROWS) -> Moments:
    """Moments of features of any float dtype, a block at a time. ValueError if they are not finite (N, D)."""
    if features_ND.ndim != 2 or not features_ND.dtype.is_floating_point:
        raise ValueError(f"features must be floats (N, D), got {features_ND.dtype} {tuple(features_ND.shape)}")
    if block_rows < 1:
        raise ValueError(f"block_rows must be at least 1, got {block_rows}")
    width = features_ND.shape[1]
    zeros = {"dtype": torch.float64, "device": features_ND.device}
    whole = Moments(0, torch.zeros(width, **zeros), torch.zeros(width, width, **zeros))
    for first in range(0, len(features_ND), block_rows):
        block_BD = features_ND[first : first + block_rows].double()
        mean_D = block_BD.mean(dim=0)
        if not torch.isfinite(mean_D).all():
            raise ValueError(f"features must be finite, a row of {first} to {first + len(block_BD) - 1} is not")
        centred_BD = block_BD - mean_D
        whole = whole.merged(Moments(len(block_BD), mean_D, centred_BD.T @ centred_BD))
    return whole


def frechet_distance(a_ND: Tensor, b_MD: Tensor) -> float:
    """Squared Fréchet distance of two sets of one size, in squared feature units.

    ValueError if N differs from M, whose biases would not compare, or is below 2.
    """
    if len(a_ND) != len(b_MD):
        raise ValueError(f"sets must be of one size, their bias depends on it, got {len(a_ND)} and {len(b_MD)}")
    return distance_of_moments(moments(a_ND), moments(b_MD))


def distance_of_moments(a: Moments, b: Moments) -> float:
    """||mu_a - mu_b||^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2)); arms that are compared with one reference have one n."""
    covariance_a, covariance_b = a.covariance(), b.covariance()
    if covariance_a.shape != covariance_b.shape:
        raise ValueError(f"features must be of one width, got {len(covariance_a)} and {len(covariance_b)}")
    mean_term = (a.mean_D - b.mean_D).square().sum()
    # The eigenvalues of S_a S_b are the squared singular values of S_a^(1/2) S_b^(1/2). Rooting them as eigenvalues
    # would make 1e-8 of each rounding error of 1e-16, which is all there is below rank when n <= D.
    root_of_product = torch.linalg.svdvals(_root(covariance_a) @ _root(covariance_b)).sum()
    return (mean_term + covariance_a.trace() + covariance_b.trace() - 2 * root_of_product).item()


def _root(covariance_DD: Tensor) -> Tensor:
    """The symmetric root (D, D); negative eigenvalues are rounding and count as 0."""
    values_D, vectors_DD = torch.linalg.eigh(covariance_DD)
    return (vectors_DD * values_D.clamp_min(0).sqrt()) @ vectors_DD.T


class Infinity(NamedTuple):
    """The distance at infinitely many rows, and what it was read off: sizes (15,) and the distances at them."""

    distance: float
    sizes: list[int]
    distances: list[float]


def frechet_infinity(features_ND: Tensor, reference: Moments, *, seed: int, points: int = POINTS) -> Infinity:
    """The intercept of a line through the distances of random subsets against 1/n: Chong and Forsyth 2020, Sec. 3.

    Sizes are spaced evenly from half of the rows to all. ValueError if there are fewer than 2 `points`, or so few rows
    that two sizes are one.
    """
    num_rows = len(features_ND)
    sizes = np.linspace(SMALLEST_SHARE * num_rows, num_rows, points).round().astype(int).tolist()
    if points < 2 or sizes[0] < 2 or len(set(sizes)) < points:
        raise ValueError(f"points must be at least 2, and the rows enough for as many sizes, got {points}, {num_rows}")
    generator = torch.Generator().manual_seed(seed)
    distances = []
    for size in sizes:
        rows = torch.randperm(num_rows, generator=generator)[:size]
        distances.append(distance_of_moments(moments(features_ND[rows.to(features_ND.device)]), reference))
    _, intercept = np.polyfit(1 / np.array(sizes), distances, 1)
    return Infinity(float(intercept), sizes, distances)
