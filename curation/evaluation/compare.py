"""Several sets against one reference: the same number of rows of each, the same rows of the reference, one projection.

All measures move with the number of rows, so arms of different sizes are refused. The Fréchet distance is to the whole
reference; the others are to as many of its rows as an arm has, drawn once for all arms. Features of more than 256
numbers are projected on the reference's principal directions, so that covariances of some hundred rows mean something.

N rows of the reference, n rows of each arm, D features, P principal directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from curation.evaluation.fid import BLOCK_ROWS, distance_of_moments, frechet_infinity, moments
from curation.evaluation.manifold import manifold_metrics

MAX_WIDTH = 256


class Compared(NamedTuple):
    """How one arm of `rows` rows compares with the reference: Fréchet distance and the four shares of `manifold`."""

    rows: int
    distance: float
    precision: float
    recall: float
    density: float
    coverage: float


def check_one_size(sizes: Mapping[str, int]) -> None:
    """ValueError if the arms' numbers of rows differ."""
    if len(set(sizes.values())) != 1:
        raise ValueError(f"arms must be of one size, all measures depend on it, got {dict(sizes)}")


class Reference:
    """What arms are compared with."""

    def __init__(self, features_ND: Tensor, *, max_width: int = MAX_WIDTH):
        """ValueError if the features are not finite (N, D) with N >= 2, or `max_width` is below 1."""
        if max_width < 1:
            raise ValueError(f"max_width must be at least 1, got {max_width}")
        whole = moments(features_ND)
        self._mean_D = whole.mean_D
        # eigh sorts ascending: the last directions are those of the largest variance.
        self._directions_DP = (
            None if features_ND.shape[1] <= max_width else torch.linalg.eigh(whole.covariance())[1][:, -max_width:]
        )
        self._features_NP = self.projected(features_ND)
        self._moments = whole if self._directions_DP is None else moments(self._features_NP)

    @property
    def rows(self) -> int:
        """N."""
        return len(self._features_NP)

    def projected(self, features_nD: Tensor) -> Tensor:
        """Features (n, P) in the reference's principal directions; as they are if there are no more than P."""
        if self._directions_DP is None:
            return features_nD
        # In blocks: a million rows of 1,024 are 8 GB in float64.
        parts = features_nD.split(BLOCK_ROWS)
        return torch.cat([((part.double() - self._mean_D) @ self._directions_DP).float() for part in parts])

    def distance(self, features_nD: Tensor) -> float:
        """Fréchet distance to the whole reference; compares with that of another set of n rows only."""
        return distance_of_moments(moments(self.projected(features_nD)), self._moments)

    def distance_infinity(self, features_nD: Tensor, *, seed: int) -> float:
        """The Fréchet distance that ever more such rows would come to, as `frechet_infinity` has it with `seed`."""
        return frechet_infinity(self.projected(features_nD), self._moments, seed=seed).distance

    def compare(self, arms: Mapping[str, Tensor], *, seed: int) -> dict[str, Compared]:
        """Each arm's measures; `seed` draws the reference's rows. ValueError if arms differ in size, or have more rows
        than the reference."""
        check_one_size({name: len(features) for name, features in arms.items()})
        return {name: self.compare_one(arm, seed=seed) for name, arm in arms.items()}

    def compare_one(self, features_nD: Tensor, *, seed: int) -> Compared:
        """One arm's measures, as `compare` has them; the caller sees to it that all arms are of one size."""
        rows = len(features_nD)
        if rows > len(self._features_NP):
            raise ValueError(f"the reference has {len(self._features_NP)} rows, fewer than an arm's {rows}")
        drawn = torch.randperm(len(self._features_NP), generator=torch.Generator().manual_seed(seed))[:rows]
        real_nP = self._features_NP[drawn.to(self._features_NP.device)]
        return Compared(rows, self.distance(features_nD), *manifold_metrics(real_nP, self.projected(features_nD)))
