"""`python -m jobs.benchmark subsets`: what the rules of a selection pick, judged on the picked rows themselves.

No model is trained: Fréchet distance, precision, recall, density and coverage of each subset's own rows against the
pool, on features that the rules did not see. Claims of the specification, each over five pools with t intervals:

    T-1  share of planted outliers and near-duplicates in each subset, share of all outliers that it took
    T-2  distance of each subset, to the whole pool and to its clean part; differences to random, paired by pool
    T-4  the same at outlier shares of 0, 1, 3 and 10%
    T-6  the same at budgets of 1 to 50% of the pool, at 3% outliers

Straw men, one number alone, stand beside the rules where there are images (`straw_men`).
Every cell (track, pool, outlier share, budget) is written when it is done and not done again. The rules' settings are
those of the specification; nothing is fitted to these pools.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from curation.evaluation.compare import Reference
from curation.methods import load_selector
from curation.numerics.intervals import t_interval
from jobs.benchmarks.pairs import provenance
from jobs.benchmarks.parts import once
from jobs.benchmarks.subset_pools import (
    CLEAN,
    NEAR,
    NUM_POOLS,
    OUTLIER,
    TRACKS,
    StudyPool,
    image_parts,
    image_pool,
    matched,
    point_pool,
)

ARMS: dict[str, dict[str, Any]] = {
    "random": {"name": "uniform"},
    "coreset": {"name": "coreset"},
    "typicality": {"name": "typicality"},
    "typicality (lightly)": {"name": "typicality", "rule": "lightly"},
    "typiclust": {"name": "typicality", "rule": "typiclust"},
    "top typicality": {"name": "typicality", "rule": "top"},
}
OUTLIER_SHARES = (0.0, 0.01, 0.03, 0.10)
BUDGETS = (0.01, 0.02, 0.05, 0.10, 0.20, 0.50)
SHARE, BUDGET = 0.03, 0.10
"""Where the other claim does not vary them; the article keeps 1,000 of 11,647."""


def benchmark(*, tiny: bool, folder: Path, tracks: Sequence[str] | None = None) -> dict[str, Any]:
    """All figures, or those of some tracks; what is in the folder already is not done again."""
    pools = 1 if tiny else NUM_POOLS
    shares, budgets = ((0.0, SHARE), (BUDGET, 0.5)) if tiny else (OUTLIER_SHARES, BUDGETS)
    tracks = tracks or (("planted", "flickr8k") if tiny else ("planted", *TRACKS))
    cells = []
    for track in tracks:
        if track == "planted":
            cells.append((track, SHARE, BUDGET))
            continue
        settings = {(share, BUDGET) for share in shares} | {(SHARE, budget) for budget in budgets}
        cells += [(track, *setting) for setting in sorted(settings)]
    figures: dict[str, Any] = {}
    for track, share, budget in cells:
        told = [_cell(track, number, share=share, budget=budget, folder=folder, tiny=tiny) for number in range(pools)]
        figures[f"{track}, outliers {share:.0%}, budget {budget:.0%}"] = found = summary(told)
        _say(track, share, budget, found)
    return {
        **provenance(),
        "benchmark": "subsets",
        "pools": pools,
        "features": {"selection": "MobileNet v1, 1,024", "metric": "ResNet-20 of CIFAR-10, 64; planted: the points"},
        "interval": "t, 95%, over pools",
        "cells": figures,
    }


def summary(cells: Sequence[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Each arm's figures over the pools, as means with intervals, and its distances minus random's, paired by pool."""
    told: dict[str, Any] = {}
    for arm in cells[0]:
        figures = {name: _interval([cell[arm][name] for cell in cells]) for name in cells[0][arm]}
        for name in ("distance_to_pool", "distance_to_clean"):
            figures[f"{name}_minus_random"] = _interval([cell[arm][name] - cell["random"][name] for cell in cells])
        told[arm] = figures
    return told


def _interval(values: Sequence[float]) -> dict[str, Any]:
    return {**t_interval(values)._asdict(), "values": list(values)}


def judge(pool: StudyPool, *, keep: int, seed: int) -> dict[str, dict[str, float]]:
    """Every arm's figures on one pool: what it picked, and how its own rows compare with the pool."""
    rows = {
        "image_embedding": torch.from_numpy(pool.selection),
        "uid": torch.from_numpy(np.random.default_rng(seed).integers(0, 2**62, (len(pool.kind), 2))),
    }
    metric = torch.from_numpy(pool.metric)
    chosen = {
        arm: load_selector(**method).select(rows, keep, 0.0, torch.Generator().manual_seed(seed)).indices.numpy()
        for arm, method in ARMS.items()
    }
    # One number alone: its highest, equal ones parted by the seed's shuffle.
    shuffled = np.random.default_rng(seed).permutation(len(pool.kind))
    for name, score in pool.straw.items():
        chosen[name] = shuffled[np.argsort(-score[shuffled], kind="stable")[:keep]]
    arms = {arm: metric[indices] for arm, indices in chosen.items()}
    compared = Reference(metric).compare(arms, seed=seed)
    to_clean = Reference(metric[torch.from_numpy(pool.kind == CLEAN)])
    return {
        arm: {
            **picked(pool, indices),
            "distance_to_pool": compared[arm].distance,
            "distance_to_clean": to_clean.distance(arms[arm]),
            **{name: getattr(compared[arm], name) for name in ("precision", "recall", "density", "coverage")},
        }
        for arm, indices in chosen.items()
    }


def picked(pool: StudyPool, indices: np.ndarray) -> dict[str, float]:
    """Shares in [0, 1]: outliers in the subset, of all outliers those in it, rows whose copy or original is in it.

    A near-duplicate counts only beside the row that it copies: alone it is as good as that.
    """
    inside = np.zeros(len(pool.kind), bool)
    inside[indices] = True
    outliers = pool.kind == OUTLIER
    twins = (pool.kind == NEAR) & inside & inside[np.maximum(pool.copy_of, 0)]
    return {
        "outliers": (outliers & inside).sum() / len(indices),
        "outliers_taken": (outliers & inside).sum() / max(1, outliers.sum()),
        "near_duplicates": twins.sum() / len(indices),
    }


def _cell(track: str, number: int, *, share: float, budget: float, folder: Path, tiny: bool) -> dict[str, Any]:
    """The figures of one pool at one setting."""

    def made() -> dict[str, Any]:
        if track == "planted":
            pool = point_pool(number)
        else:
            pairs = folder / ("tiny" if tiny else "pairs")
            others = [other for other in range(2 if tiny else NUM_POOLS) if other != number]
            pool = image_pool(image_parts(track, number, pairs, tiny=tiny), outlier_share=share, seed=number)
            pool = matched(pool, [image_parts(track, other, pairs, tiny=tiny)[CLEAN] for other in others])
        return judge(pool, keep=round(budget * len(pool.kind)), seed=number)

    return once(folder / track / f"{'tiny-' if tiny else ''}{number}-outliers{share:g}-budget{budget:g}.json", made)


def _say(track: str, share: float, budget: float, told: dict[str, Any]) -> None:
    print(f"{track}, {share:.0%} outliers, {budget:.0%} kept")
    names = ("outliers", "outliers_taken", "near_duplicates", "distance_to_pool", "distance_to_clean")
    print(f"{'':<22}" + "".join(f"{name:>20}" for name in names))
    for arm, figures in told.items():
        print(f"{arm:<22}" + "".join(f"{_text(figures[name]):>20}" for name in names), flush=True)


def _text(figure: dict[str, Any]) -> str:
    half = figure["half_width"]
    return f"{figure['mean']:.4g}" + ("" if half is None else f" ± {half:.2g}")
