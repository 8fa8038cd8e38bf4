"""Exact quantiles of float32 values that lie in many places, from histograms that add up; and the Gini coefficient.

Every float32 has a 32-bit pattern in the order of the values. A histogram of the high 16 bits says in which bin a rank
lies, a second one of the low 16 bits within that bin says which value it is: two passes and 0.5 MB, whatever the number
of values. The counts of disjoint parts add up, so the same search serves one array and many actors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

NUM_BINS = 1 << 16
_SIGN = np.uint32(1 << 31)


def ordered_bits(values: np.ndarray) -> np.ndarray:
    """Integers (n,) uint32 in the order of finite float32 values (n,); -0.0 equals +0.0."""
    bits = (values + np.float32(0)).view(np.uint32)  # adding 0 turns -0.0 into +0.0
    return np.where(bits & _SIGN, ~bits, bits | _SIGN)


def from_ordered_bits(ordered: np.ndarray) -> np.ndarray:
    """The float32 values (n,) of the integers (n,); the inverse of `ordered_bits`."""
    bits = np.asarray(ordered, dtype=np.uint32)
    return np.where(bits & _SIGN, bits ^ _SIGN, ~bits).view(np.float32)


def count_bits(values: np.ndarray, *, prefix: int | None) -> np.ndarray:
    """Histogram (65536,) int64 of the high 16 ordered bits of float32 values; with a prefix, of the low 16 bits of the
    values whose high ones it is."""
    ordered = ordered_bits(values)
    if prefix is None:
        digits = ordered >> np.uint32(16)
    else:
        digits = ordered[(ordered >> np.uint32(16)) == prefix] & np.uint32(NUM_BINS - 1)
    return np.bincount(digits, minlength=NUM_BINS).astype(np.int64)


def quantiles_from_counts(counts_of: Callable[[int | None], np.ndarray], q: Sequence[float] | np.ndarray) -> np.ndarray:
    """Quantiles (len(q),) float32, order statistics as numpy's method "inverted_cdf"; NaN if there are no values.

    `counts_of(prefix)` is `count_bits` of all values, and is called once with None and once for each bin that holds a
    quantile. ValueError if a q is not in [0, 1]; RuntimeError if the values changed between the passes.
    """
    shares = np.atleast_1d(np.asarray(q, dtype=np.float64))
    if shares.ndim != 1 or not ((shares >= 0) & (shares <= 1)).all():
        raise ValueError(f"q must be a row of numbers in [0, 1], got {shares.tolist()}")
    high = counts_of(None)
    upto = np.cumsum(high)
    total = int(upto[-1])
    if total == 0:
        return np.full(len(shares), np.nan, dtype=np.float32)
    ranks = np.maximum(np.ceil(total * shares - 1), 0).astype(np.int64)
    bins = np.searchsorted(upto, ranks, side="right")
    ordered = np.zeros(len(shares), dtype=np.uint32)
    for prefix in np.unique(bins).tolist():
        low = counts_of(prefix)
        if low.sum() != high[prefix]:
            raise RuntimeError(f"the values changed between passes: {high[prefix]} in bin {prefix} became {low.sum()}")
        here = bins == prefix
        within = ranks[here] - (upto[prefix] - high[prefix])
        ordered[here] = (prefix << 16) + np.searchsorted(np.cumsum(low), within, side="right")
    return from_ordered_bits(ordered)


def gini(usage_histogram: np.ndarray) -> float:
    """Gini coefficient of usage in [0, 1), from how many samples were used 0, 1, 2, ... times (any length).

    Half the mean absolute difference of two samples over the mean; 0 if all samples were used alike, or if there is
    none. ValueError if the histogram is not a row of counts.
    """
    samples = np.asarray(usage_histogram)
    if samples.ndim != 1 or samples.dtype.kind not in "iu" or (samples < 0).any():
        raise ValueError(f"usage_histogram must be counts (m,), got {samples.dtype} {samples.shape}")
    samples = samples.astype(np.float64)
    used = samples * np.arange(len(samples))
    if used.sum() == 0:
        return 0.0
    lorenz = np.cumsum(used) / used.sum()
    area = (samples / samples.sum() * (lorenz + np.concatenate([[0.0], lorenz[:-1]]))).sum()
    return max(0.0, float(1 - area))
