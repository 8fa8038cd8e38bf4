"""Ratios that a noisy machine cannot fake: two commands run in turn, compared pair by pair, the median with its interval."""

from __future__ import annotations

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
    """ours / rival over the pairs. The interval is exact for any distribution: order statistics around the median."""
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
    """Date, hardware and commit, which stand beside every figure."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "date": date.today().isoformat(),
        "cpus": len(_cpus()),
        "cpu": _cpu_model(),
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
    }


def _cpus() -> set[int]:
    import os

    return os.sched_getaffinity(0)


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
