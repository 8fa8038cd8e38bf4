"""Ratios that a noisy machine cannot fake: two commands in turn, compared in pairs, the median with its interval."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Sequence
from datetime import date
from math import comb
from pathlib import Path
from typing import Any, NamedTuple


class Ratio(NamedTuple):
    """Median of paired ratios, and the order-statistic interval that holds it with `confidence`."""

    median: float
    low: float
    high: float
    confidence: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}] ({self.confidence:.0%}, {self.pairs} pairs)"


def interleaved(ours: Callable[[], float], rival: Callable[[], float], *, pairs: int) -> list[tuple[float, float]]:
    """(ours, rival) figures of `pairs` runs each; the order within a pair alternates, so drift hits both alike."""
    figures = []
    for index in range(pairs):
        if index % 2 == 0:
            mine, theirs = ours(), rival()
        else:
            theirs, mine = rival(), ours()
        figures.append((mine, theirs))
    return figures


def paired_ratio(figures: Sequence[tuple[float, float]], *, at_least: float = 0.95) -> Ratio:
    """ours / rival over the pairs. The interval is exact for any distribution: order statistics around the median.

    With fewer than six pairs the widest interval holds the median with less than 0.95; `confidence` says with how much.
    ValueError if there is no pair, or a rival's figure is not positive.
    """
    if not figures or any(theirs <= 0 for _, theirs in figures):
        raise ValueError(f"figures must be pairs whose second is positive, got {list(figures)}")
    ratios = sorted(mine / theirs for mine, theirs in figures)
    n = len(ratios)
    cut = 0
    while cut + 1 < n / 2 and _coverage(n, cut + 1) >= at_least:
        cut += 1
    return Ratio(statistics.median(ratios), ratios[cut], ratios[n - 1 - cut], _coverage(n, cut), n)


def _coverage(n: int, cut: int) -> float:
    """Probability that the median lies between the order statistics `cut` and n-1-cut, counted from 0."""
    return 1 - 2 * sum(comb(n, k) for k in range(cut + 1)) / 2**n


def provenance() -> dict[str, Any]:
    """Date, hardware and commit ("-dirty" if files were changed since), which stand beside every figure."""
    return {
        "date": date.today().isoformat(),
        "cpus": len(os.sched_getaffinity(0)),
        "cpu": _cpu_model(),
        "python": platform.python_version(),
        "commit": _commit() or "unknown",
    }


def _commit() -> str:
    """Of this code, not of the folder that one stands in; empty outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:  # git is not installed
        return ""


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
