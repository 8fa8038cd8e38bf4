"""How sure a mean over a few seeds is: Student's t interval. And how sure a share of many rows is: Wilson's.

A t interval of three seeds is wide (4.3 standard errors); that is what three seeds are worth.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Two-sided 95% quantiles of Student's t for 1 to 9 degrees of freedom."""
Z_95 = 1.959964


class Interval(NamedTuple):
    """A mean with the half width of its 95% interval; None for a single value, which has none."""

    mean: float
    half_width: float | None


def t_interval(values: Sequence[float]) -> Interval:
    """Mean of `values` (n >= 1) and the half width of its two-sided 95% t interval. ValueError if there is none."""
    if not values:
        raise ValueError("an interval needs a value, got none")
    n = len(values)
    half = None if n < 2 else t_95(n - 1) * statistics.stdev(values) / math.sqrt(n)
    return Interval(statistics.fmean(values), half)


def t_95(degrees: int) -> float:
    """Two-sided 95% quantile of Student's t. From 10 degrees on by Cornish and Fisher's expansion, within 0.001."""
    if degrees < 1:
        raise ValueError(f"degrees must be at least 1, got {degrees}")
    if degrees <= len(T_95):
        return T_95[degrees - 1]
    z, third = Z_95, 3 * Z_95**7 + 19 * Z_95**5 + 17 * Z_95**3 - 15 * Z_95
    return (
        z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2) + third / (384 * degrees**3)
    )


def wilson(successes: float, trials: int) -> tuple[float, float]:
    """95% interval of a share, Wilson 1927; (0, 1) without trials. ValueError unless 0 <= successes <= trials.

    Ties may count as half successes; the interval is then wider than it need be, for a tie varies less than a vote.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"successes must be in [0, {trials}], got {successes}")
    if not trials:
        return 0.0, 1.0
    share, z2 = successes / trials, Z_95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z_95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return max(0.0, centre - half), min(1.0, centre + half)
