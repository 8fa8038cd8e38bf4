"""What pool selectors share: in memory, `select` is the exact top `keep` of `sort_key`, ties by the hash of the uid.

This is the order in which `numerics.sampling.CutSearch` cuts a whole pool, so both choose the same rows.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Generator, Tensor

from curation.numerics.sampling import exact_top, tie_hash
from curation.selector import PoolSelector, Rows, Selection, check_keep, check_needs, num_rows, uniform_weights


def select_by_sort_key(
    selector: PoolSelector, rows: Rows, *, keep: int | None, progress: float, rng: Generator
) -> Selection:
    """The exact top `keep` rows, best first, each with weight 1. The seed of the noise is drawn from `rng`.

    ValueError if a needed column is missing or `keep` is not in [0, n].
    """
    check_needs(selector, rows)
    keep = check_keep(keep, num_rows(rows))
    seed = int(torch.randint(2**63 - 1, (), generator=rng, device=rng.device))
    keys = selector.sort_key(rows, progress, seed)
    ties = tie_hash(uid_column_words(rows["uid"]))
    indices = torch.from_numpy(exact_top(keys.cpu().numpy(), ties, keep)).to(keys.device)
    return Selection(indices=indices, weights=uniform_weights(keep).to(keys.device))


def uid_column_words(uid_N2: Tensor) -> np.ndarray:
    """The column `uid`, (n, 2) int64 bit patterns, as the words (n, 2) uint64 that `numerics.sampling` hashes."""
    return uid_N2.cpu().numpy().view(np.uint64)
