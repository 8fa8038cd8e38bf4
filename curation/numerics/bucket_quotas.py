"""How many rows to keep of each bucket, when a pool is too large to be chosen from as one set.

K buckets.
"""

from __future__ import annotations

from typing import Literal

import numpy as np


def bucket_quotas(sizes_K: np.ndarray, *, keep: int, rule: Literal["proportional", "even"]) -> np.ndarray:
    """Rows to keep of each bucket, (K,) int64, `keep` in all and none more than the bucket has.

    proportional: `keep` by the buckets' sizes, rounded by largest remainder. even: the same number of each, and what
    small buckets lack is parted evenly among the others. Of equal claims the lower bucket comes first. ValueError if
    `keep` is not in [0, sum of sizes].
    """
    sizes_K = np.asarray(sizes_K, np.int64)
    total = int(sizes_K.sum())
    if not 0 <= keep <= total:
        raise ValueError(f"keep must be in [0, {total}], got {keep}")
    if not keep:
        return np.zeros_like(sizes_K)
    if rule == "proportional":
        # Python's integers: keep * size passes 2**63 for pools of billions.
        shares = [divmod(keep * int(size), total) for size in sizes_K]
        given_K = np.array([whole for whole, _ in shares], np.int64)
        by_remainder = np.argsort([-rest for _, rest in shares], kind="stable")
        given_K[by_remainder[: keep - int(given_K.sum())]] += 1
        return given_K
    level = even_level(sizes_K, keep)
    given_K = np.minimum(sizes_K, level)
    has_more = np.flatnonzero(sizes_K > level)
    given_K[has_more[: keep - int(given_K.sum())]] += 1
    return given_K


def even_level(sizes_K: np.ndarray, keep: int) -> int:
    """The most rows that every bucket can give, or all it has, without more than `keep` in all."""
    low, high = 0, keep
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if int(np.minimum(sizes_K, middle).sum()) <= keep else (low, middle - 1)
    return low
