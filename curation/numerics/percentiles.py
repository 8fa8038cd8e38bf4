"""Where a row stands among all rows of a pool, when no process holds them all: percentiles read off a sorted sample.

Percentile 0 is the highest value, 1 the lowest, and a row among N distinct ones has (rank + 1/2) / N. A sample of all
rows gives these exactly; one of m rows is off by about 1 / (2 sqrt(m)): 0.0005 for a million, whatever the pool's size.
Rows of one value share the middle of their ranks.

n rows, m rows of the sample.
"""

from __future__ import annotations

import numpy as np


def sorted_sample(values: np.ndarray) -> np.ndarray:
    """The finite values (m,) float32, ascending. ValueError if there is none."""
    finite = values[np.isfinite(values)].astype(np.float32)
    if not len(finite):
        raise ValueError("percentiles need a finite value, there is none")
    return np.sort(finite)


def percentiles(values: np.ndarray, sample_m: np.ndarray) -> np.ndarray:
    """Percentiles (n,) float32 of values (n,) in a sorted sample, 0 for the highest; NaN where the value is none."""
    wanted = values.astype(np.float32)
    below = np.searchsorted(sample_m, wanted, side="left")
    upto = np.searchsorted(sample_m, wanted, side="right")
    # Of a row that is not in the sample, below == upto: it stands between two rows of it.
    percentile = 1 - (below + upto) / (2 * len(sample_m))
    return np.where(np.isfinite(wanted), percentile, np.nan).astype(np.float32)


def inclusion(percentile_n: np.ndarray, is_kept_n: np.ndarray, *, parts: int = 10) -> np.ndarray:
    """Share of the rows that is kept, of each of `parts` equal ranges of the percentile, (parts,); NaN of none."""
    place = np.minimum((percentile_n * parts).astype(np.int64), parts - 1)
    rows = np.bincount(place, minlength=parts)
    kept = np.bincount(place, weights=is_kept_n.astype(np.float64), minlength=parts)
    return np.divide(kept, rows, out=np.full(parts, np.nan), where=rows > 0)
