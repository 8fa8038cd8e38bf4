"""How many rows of each group to keep, and by which hash to cut a group so that exactly so many are left.

A cut is found in two passes over the pool: one counts the groups; the other counts, for each group that is cut, the
rows below a narrow window around the quantile where the k-th smallest of n uniform hashes must lie (six standard
deviations each side), and collects those inside it: about 12 sqrt(k) numbers of 8 bytes a group. Where the window
misses, which one group in a hundred million does, it is widened for a third pass.

G groups, N rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from curation.numerics.bucket_quotas import even_level

LAST_HASH = (1 << 64) - 1
DEVIATIONS = 6.0


class Window(NamedTuple):
    """Hashes in [low, high]."""

    low: int
    high: int


def capped(counts: Mapping[str, int], cap: int) -> dict[str, int]:
    """Quotas of the groups that hold more than `cap` rows."""
    return {group: cap for group, rows in counts.items() if rows > cap}


def even(counts: Mapping[str, int], keep: int) -> dict[str, int]:
    """Quotas that keep `keep` rows in all, spread as evenly as the groups allow; of the groups that are cut.

    The largest cap c with sum(min(rows, c)) <= keep; what is left over goes, one row each, to the largest groups.
    """
    rows_G = np.fromiter(counts.values(), np.int64, len(counts))
    if keep >= rows_G.sum():
        return {}
    level = even_level(rows_G, keep)
    left = keep - int(np.minimum(rows_G, level).sum())
    quotas = capped(counts, level)
    for group in sorted(quotas, key=lambda group: (-counts[group], group))[:left]:
        quotas[group] += 1
    return {group: quota for group, quota in quotas.items() if quota < counts[group]}


def window(rows: int, quota: int, *, deviations: float = DEVIATIONS) -> Window:
    """Where the `quota`-th smallest of `rows` uniform hashes lies, almost surely."""
    share = quota / rows
    margin = deviations * math.sqrt(share * (1 - share) / rows) + deviations / rows
    low, high = max(0.0, share - margin), min(1.0, share + margin)
    return Window(int(low * LAST_HASH), LAST_HASH if high >= 1 else int(high * LAST_HASH))


def cut(quota: int, where: Window, *, below: int, inside_M: np.ndarray) -> int | None:
    """The hash up to which exactly `quota` rows lie, from the rows below the window and the hashes inside it (m,).

    None if it does not lie in the window. -1 keeps nothing.
    """
    rank = quota - below
    if rank == 0:
        return where.low - 1
    if not 0 < rank <= len(inside_M):
        return None
    return int(np.partition(inside_M, rank - 1)[rank - 1])
