"""Scores of one pool, seed by seed, and how far they agree: study X-1 of the methods' specifications.

A seed is a curated run and, beside it, training runs on that pool, whose ledgers hold what their methods scored. Scores
are compared by name over the seeds, so only those that every seed has are in the matrix.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from curation.data import storage, tables
from curation.evaluation.correlation import over_seeds, spearman_matrix
from curation.methods.typicality import Typicality
from curation.numerics.intervals import Interval
from curation.numerics.sampling import uid_words
from curation.report.folder import CurationRun, TrainingRun, load, remembered, scored_by
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
    unread: list[str]
    """Scores that were not looked at, being too many; they are if they are named."""


def agreement(seeds: Sequence[str], *, only: Sequence[str] = (), typicality: str | None = None) -> Agreement:
    """The agreement over seeds, each given as RUN or RUN+TRAINING+TRAINING. ValueError if one is no such thing, or has
    no run of its own.

    `only`: the scores that are compared, by default all that `scan` reads. `typicality`: a column of vectors whose
    typicality is one more score.
    """
    _check_apart(seeds)
    read = [scores_of(seed, typicality=typicality, wanted=only) for seed in seeds]
    found = [scores for scores, _ in read]
    unread = [] if only else sorted({name for _, names in read for name in names})
    if unknown := sorted(set(only) - {name for scores in found for name in scores}):
        raise ValueError(f"no seed has a score {unknown[0]!r}, there are {sorted(found[0])}")
    found = [{name: values for name, values in scores.items() if name in only or not only} for scores in found]
    common = [name for name in found[0] if all(name in scores for scores in found)]
    left_out = sorted({name for scores in found for name in scores} - {*common, *unread})
    if len(common) < 2:
        raise ValueError(f"it takes two scores that all seeds have, there are {common}; not all have {left_out}")
    matrices = [spearman_matrix({name: scores[name] for name in common}) for scores in found]
    return Agreement(common, matrices, over_seeds(matrices), left_out, unread)


def _check_apart(seeds: Sequence[str]) -> None:
    """ValueError if a seed has no run of its own: counted as another one, it makes intervals narrower than they are.

    Several trainings on one pool are seeds; what the pool alone scored is then the same in each.
    """
    runs_of = [{storage.absolute(url).rstrip("/") for url in seed.split(BETWEEN_RUNS)} for seed in seeds]
    named = Counter(url for runs in runs_of for url in runs)
    for seed, runs in zip(seeds, runs_of, strict=True):
        if min(named[url] for url in runs) > 1:
            raise ValueError(f"{seed!r} has no run of its own, its runs are named twice: it is no other seed")


def scores_of(
    seed: str, *, typicality: str | None = None, wanted: Sequence[str] = ()
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The scores of the embedded rows of one seed by name, a ledger's by its method's; and the names of those not read.

    `wanted` are read in any case.
    """
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
        name, read = scored_by(run, memory)
        beside[name] = read
    found = scan(curated[0].url, curated[0].numbers, steps=(), beside=beside, wanted=wanted)
    of_vectors = {} if typicality is None else {"typicality": _typicality(curated[0], typicality, found.addresses)}
    return {**found.scores, **of_vectors}, found.unread


def _typicality(run: CurationRun, column: str, addresses_n: np.ndarray) -> np.ndarray:
    """Each row's typicality (n,) among all of them, by a column of vectors; NaN for a row that has none.

    All rows at once, as the method does it up to `exact_rows`; ValueError above that, or if there is no such column.
    """
    method = Typicality(column=column)
    if len(addresses_n) > method.exact_rows:
        raise ValueError(f"typicality: {len(addresses_n):,} rows, and all are compared: at most {method.exact_rows:,}")
    parts = []
    for number in run.numbers:
        if column not in tables.column_names(run.url, number):
            raise ValueError(f"typicality: {run.url} has no column {column!r} in shard {number}")
        table = tables.read(run.url, number, ["address", "uid", column])
        parts.append(table.filter(pc.field(column).is_valid()))
    whole = pa.concat_tables(parts)
    rows = {
        column: torch.tensor(tables.as_array(whole[column], name=column)),
        "uid": torch.from_numpy(uid_words(whole["uid"].to_pylist()).view(np.int64)),
    }
    by_address = dict(zip(whole["address"].to_pylist(), method.score(rows, 0.0).tolist(), strict=True))
    return np.array([by_address.get(address, np.nan) for address in addresses_n.tolist()], np.float32)
