"""Factors of features: which units a row activates, which of them are common and which rare, and a row's rank in both.

Source: our completion of arXiv:2603.04981 (its equations are not public). A unit is a direction; a row activates the K
units of its largest positive responses. A unit's frequency f is the share of rows that activate it, and a unit is alive
if at least two rows and at most half of all do. Common units C are the most frequent alive ones that cover half of all
activations, rare ones Q the less frequent half. With activations scaled to sum 1 over a row's alive units,

    representativeness R = sum over C of f a / sum over C of f        rarity D = sum over a row's units in Q of -log f

What is learnt of a pool are sums over its rows, so parts of it add up in any order, in memory that does not grow with
it. Ranks come of counts by the upper 24 bits of a value's place in float32's order, so values within 2**-15 of each
other share a rank; that is 16 million counts at most, however many rows there are.

N rows, D features, M units, K active units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from curation.numerics.sampling import order_bits

COVERED = 0.5
"""Share of all activations that the common units cover."""
LEAST_ROWS, LARGEST_SHARE = 2, 0.5
"""A unit that fewer rows activate says nothing, and one that more than this share activates ranks nobody."""
RANK_SHIFT = 8


class Encoder(NamedTuple):
    """What turns rows into factors: a row less `offset`, by `scale`, times `weight`, plus `bias`; the K largest."""

    offset_D: Tensor
    scale: float
    weight_MD: Tensor
    bias_M: Tensor
    num_active: int

    def standardised(self, rows_ND: Tensor) -> Tensor:
        """Rows (N, D) float32 of mean 0 and mean length 1 over the pool."""
        return (rows_ND.float() - self.offset_D) * self.scale

    def active(self, rows_ND: Tensor) -> Active:
        """The factors of rows (N, D) as they are stored."""
        return top_units(F.linear(self.standardised(rows_ND), self.weight_MD, self.bias_M), self.num_active)


class Active(NamedTuple):
    """Which units rows activate, and how much: values (N, K) >= 0, of which 0 is not active."""

    values_NK: Tensor
    units_NK: Tensor


def top_units(responses_NM: Tensor, num_active: int) -> Active:
    """The `num_active` largest responses of each row, negative ones cut to 0."""
    values_NK, units_NK = responses_NM.topk(min(num_active, responses_NM.shape[1]), dim=1)
    return Active(values_NK.relu(), units_NK)


def count_units(active: Active, num_units: int) -> np.ndarray:
    """Rows (M,) int64 that activate each unit."""
    return torch.bincount(active.units_NK[active.values_NK > 0], minlength=num_units).numpy()


@dataclass(frozen=True)
class FactorFacts:
    """What a pool's frequencies say of each unit."""

    frequency_M: np.ndarray
    alive_M: np.ndarray
    common_M: np.ndarray
    rare_M: np.ndarray

    @property
    def dead_share(self) -> float:
        """Share of the units that no row activates."""
        return float((self.frequency_M == 0).mean())


def facts_of(counts_M: np.ndarray, num_rows: int) -> FactorFacts:
    """The facts of units that `counts_M` of `num_rows` rows activate. ValueError if no unit is alive."""
    frequency_M = counts_M / max(1, num_rows)
    alive_M = (counts_M >= LEAST_ROWS) & (frequency_M <= LARGEST_SHARE)
    if not alive_M.any():
        raise ValueError(
            f"no factor is activated by at least {LEAST_ROWS} and at most {LARGEST_SHARE:.0%} of the {num_rows} rows"
        )
    order = np.flatnonzero(alive_M)
    order = order[np.argsort(-counts_M[order], kind="stable")]
    covered = np.cumsum(counts_M[order])
    num_common = int(np.searchsorted(covered, COVERED * covered[-1])) + 1
    common_M, rare_M = np.zeros_like(alive_M), np.zeros_like(alive_M)
    common_M[order[:num_common]] = True
    rare_M[order[len(order) - len(order) // 2 :]] = True
    return FactorFacts(frequency_M, alive_M, common_M, rare_M)


def representativeness(active: Active, facts: FactorFacts) -> Tensor:
    """How well rows cover the common units, (N,) float32 in [0, 1]; 0 for a row without an alive unit."""
    frequency_M, alive_M = torch.from_numpy(facts.frequency_M), torch.from_numpy(facts.alive_M)
    weight_M = torch.where(torch.from_numpy(facts.common_M), frequency_M, 0.0)
    weight_M = weight_M / weight_M.sum()
    values_NK = active.values_NK.double() * alive_M[active.units_NK]
    shares_NK = values_NK / values_NK.sum(dim=1, keepdim=True).clamp_min(1e-30)
    return (shares_NK * weight_M[active.units_NK]).sum(dim=1).float()


def rarity(active: Active, facts: FactorFacts) -> Tensor:
    """How rare the units are that rows activate, (N,) float32 >= 0, in nats."""
    frequency_M = torch.from_numpy(facts.frequency_M)
    weight_M = torch.where(torch.from_numpy(facts.rare_M), -frequency_M.clamp_min(1e-30).log(), 0.0)
    return (weight_M[active.units_NK] * (active.values_NK > 0)).sum(dim=1).float()


class RankCounts(NamedTuple):
    """Values of a pool by their place in order: (u,) uint32 ascending, and how many rows have each. They add up."""

    places: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, values_N: np.ndarray) -> RankCounts:
        """The counts of values (N,) float32."""
        places, counts = np.unique(order_bits(values_N) >> np.uint32(RANK_SHIFT), return_counts=True)
        return cls(places, counts.astype(np.int64))

    def plus(self, other: RankCounts) -> RankCounts:
        """The counts of both."""
        places, inverse = np.unique(np.concatenate([self.places, other.places]), return_inverse=True)
        counts = np.bincount(inverse, np.concatenate([self.counts, other.counts])).astype(np.int64)
        return RankCounts(places, counts)

    def ranks(self, values_N: np.ndarray) -> np.ndarray:
        """Average ranks (N,) float32 of values in the pool, scaled to [0, 1]; of an unknown value, those below it."""
        total = int(self.counts.sum())
        ends = np.cumsum(self.counts)
        wanted = order_bits(values_N) >> np.uint32(RANK_SHIFT)
        at = np.searchsorted(self.places, wanted)
        inside = at < len(self.places)
        is_known = inside.copy()
        is_known[inside] = self.places[at[inside]] == wanted[inside]
        below = np.where(at > 0, ends[np.maximum(at, 1) - 1], 0)
        middle = np.where(is_known, (self.counts[np.minimum(at, len(ends) - 1)] - 1) / 2, 0.0)
        return ((below + middle) / max(1, total - 1)).clip(0, 1).astype(np.float32)
