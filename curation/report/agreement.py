"""Scores of one pool, seed by seed, and how far they agree: study X-1 of the methods' specifications.

A seed is a curated run and, beside it, training runs on that pool, whose ledgers hold what their methods scored. Scores
are compared by name over the seeds, so only those that every seed has are in the matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from curation.evaluation.correlation import over_seeds, spearman_matrix
from curation.numerics.intervals import Interval
from curation.report.folder import CurationRun, TrainingRun, load, remembered
from curation.report.scan import scan

BETWEEN_RUNS = "+"


class Agreement(NamedTuple):
    """Spearman's correlation of each pair of scores, over seeds."""

    scores: list[str]
    matrices: list[np.ndarray]
    """One (S, S) for each seed."""
    pairs: list[list[Interval | None]]
    left_out: list[str]
    """Scores that not every seed has."""


def agreement(seeds: Sequence[str]) -> Agreement:
    """The agreement over seeds, each given as RUN or RUN+TRAINING+TRAINING. ValueError if one is no such thing."""
    found = [scores_of(seed) for seed in seeds]
    common = [name for name in found[0] if all(name in scores for scores in found)]
    left_out = sorted({name for scores in found for name in scores} - set(common))
    if len(common) < 2:
        raise ValueError(f"it takes two scores that all seeds have, there are {common}; not all have {left_out}")
    matrices = [spearman_matrix({name: scores[name] for name in common}) for scores in found]
    return Agreement(common, matrices, over_seeds(matrices), left_out)


def scores_of(seed: str) -> dict[str, np.ndarray]:
    """The scores of the embedded rows of one seed, by name; a ledger's by its method's."""
    runs = [run for url in seed.split(BETWEEN_RUNS) for run in load(url)]
    curated = [run for run in runs if isinstance(run, CurationRun)]
    if len(curated) != 1:
        raise ValueError(f"{seed!r} must name one curated run, and training runs on it; it names {len(curated)}")
    beside = {}
    for run in runs:
        if not isinstance(run, TrainingRun):
            continue
        memory = remembered(run)
        if memory is None or run.recipe.get("data", {}).get("run") != curated[0].url:
            raise ValueError(f"{run.url} has no ledger on disk, or was not trained on {curated[0].url}")
        beside[str(run.recipe["method"]["name"])] = memory.scores_of
    return scan(curated[0].url, curated[0].numbers, steps=(), beside=beside).scores
