"""The spec's planted pool, made smaller: eight clusters of unequal size and spread, near copies, and outliers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

SIZES = (25, 50, 75, 125, 200, 350, 525, 750)
NUM_COPIES, NUM_OUTLIERS = 125, 75


class Planted(NamedTuple):
    rows: Tensor
    is_outlier: Tensor
    copy_of: Tensor
    """The row whose near copy it is; -1 for the others."""
    cluster: Tensor
    """-1 for outliers."""


def planted_pool(*, seed: int, width: int = 64) -> Planted:
    """2,300 unit rows in random order, of which 3% are outliers and 5% near copies, as in the spec's synthetic test."""
    rng = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(len(SIZES), width, generator=rng), dim=1)
    spreads = torch.linspace(0.02, 0.06, len(SIZES))[torch.randperm(len(SIZES), generator=rng)]
    cluster = torch.repeat_interleave(torch.arange(len(SIZES)), torch.tensor(SIZES))
    noise = torch.randn(len(cluster), width, generator=rng)
    clean = F.normalize(centres[cluster] + spreads[cluster, None] * noise, dim=1)
    original = torch.randperm(len(clean), generator=rng)[:NUM_COPIES]
    copies = F.normalize(clean[original] + 1e-4 * torch.randn(NUM_COPIES, width, generator=rng), dim=1)
    outliers = F.normalize(torch.randn(NUM_OUTLIERS, width, generator=rng), dim=1)
    rows = torch.cat([clean, copies, outliers])
    none = torch.full((len(rows),), -1)
    copy_of, of_cluster = none.clone(), none.clone()
    copy_of[len(clean) : len(clean) + NUM_COPIES] = original
    of_cluster[: len(clean)], of_cluster[len(clean) : len(clean) + NUM_COPIES] = cluster, cluster[original]
    order = torch.randperm(len(rows), generator=rng)
    place = order.argsort()
    copy_of = torch.where(copy_of >= 0, place[copy_of.clamp_min(0)], -1)[order]
    is_outlier = torch.arange(len(rows))[order] >= len(clean) + NUM_COPIES
    return Planted(rows[order], is_outlier, copy_of, of_cluster[order])


def near_copies_kept(pool: Planted, chosen: Tensor) -> int:
    """Chosen rows whose near copy, or original, is chosen too; a pair counts once."""
    kept = set(chosen.tolist())
    return sum(1 for row, original in enumerate(pool.copy_of.tolist()) if row in kept and original in kept)
