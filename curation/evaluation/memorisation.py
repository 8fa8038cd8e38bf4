"""Memorisation: are generated samples copies of the training samples?

Two measures, by distance in a feature space that is named beside them:

    nearest-train ratio  distance to the nearest training row / to the second nearest. A copy has a ratio near 0, a row
                         among many a ratio near 1; below 1/3 it counts as memorised (Yoon et al. 2023; Gu et al. 2023,
                         arXiv:2310.02664, Sec. 2). Training rows with a twin would hide their copies: equal ones are
                         told apart by neither, so the second nearest is the nearest at another place.
    AuthPct              share of authentic rows (Alaa et al. 2022, arXiv:2102.08921, Sec. 3; as dgm-eval counts): the
                         nearest training row is nearer to another training row than to the generated one.

n generated rows, M training rows, D features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from curation.numerics.distances import nearest_keys, nearest_others

MEMORISED_BELOW = 1 / 3


class Memorisation(NamedTuple):
    """Of a set of generated rows: median ratio, share of ratios below 1/3, share of authentic rows."""

    median_ratio: float
    memorised_share: float
    authentic_share: float


def nearest_train_ratio(generated_nD: Tensor, train_MD: Tensor) -> Tensor:
    """Ratio (n,) float64 in [0, 1] of each generated row; 0 for a copy, also of a training row that has a twin.

    The second nearest is the nearest one that does not equal the nearest. ValueError if there are fewer than two
    different training rows.
    """
    unique_MD = train_MD.unique(dim=0)
    if len(unique_MD) < 2:
        raise ValueError(f"a ratio needs two different training rows, got {len(unique_MD)}")
    distances_n2, _ = nearest_keys(generated_nD, unique_MD, 2)
    # The second is at distance 0 only if rounding made it so: then the row is a copy for all that can be told.
    return torch.where(distances_n2[:, 1] > 0, distances_n2[:, 0] / distances_n2[:, 1].clamp_min(1e-300), 0.0)


def authentic(generated_nD: Tensor, train_MD: Tensor) -> Tensor:
    """(n,) bool: the nearest training row is strictly nearer to another one than to the generated row."""
    distances_n1, places_n1 = nearest_keys(generated_nD, train_MD, 1)
    return nearest_others(train_MD, 1)[places_n1[:, 0], 0] < distances_n1[:, 0]


def memorisation(generated_nD: Tensor, train_MD: Tensor) -> Memorisation:
    """Both measures. ValueError if there is no generated row, or fewer than two different training rows."""
    if not len(generated_nD):
        raise ValueError("generated: there is no row")
    ratio = nearest_train_ratio(generated_nD, train_MD)
    return Memorisation(
        ratio.median().item(),
        (ratio < MEMORISED_BELOW).double().mean().item(),
        authentic(generated_nD, train_MD).double().mean().item(),
    )
