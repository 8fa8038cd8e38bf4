"""The arms of a study: which rows of a pool each selection holds, and how many of those it is measured against.

N rows of the pool, k rows of an arm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch

from curation.data import manifest, tables
from curation.data.pool_rows import selected_uids
from curation.methods import load_selector, selector_names
from curation.numerics import sampling
from curation.recipe.evaluate import STRAW_MEN, Arm, Judged
from curation.selector import BucketSelector, Rows

EVERYTHING = "full"
J = TypeVar("J", bound=Judged)
Told = Callable[[Mapping[str, Mapping[str, int]], Sequence[str]], None]
"""Hears, before any figure, the overlap of each arm and the warnings."""


def with_straw_men(recipe: J) -> tuple[J, list[str]]:
    """The recipe with an arm for each straw man whose column the run has, and what is said of those it has not."""
    if not recipe.straw_men:
        return recipe, []
    there = tables.column_names(recipe.run, min(manifest.committed(recipe.run, "embed")))
    wanted = {name: column for name, column in STRAW_MEN.items() if name not in {a.name for a in recipe.all_arms()}}
    notes = [
        f"no arm {name}: the run has no column {column} (docs/evaluation.md says what makes it)"
        for name, column in wanted.items()
        if column not in there
    ]
    added = tuple(name for name, column in wanted.items() if column in there)
    return recipe.model_copy(update={"arms": (*recipe.arms, *added), "straw_men": False}), notes


def columns_of(arms: Sequence[Arm], *, selected_on: str) -> list[str]:
    """The columns that the arms' methods need, with the uid and the content's hash."""
    needs = {"uid", "sha256"}
    for arm in arms:
        if is_method(arm):
            needs |= selector_of(arm, selected_on).needs
    return sorted(needs)


def choose(arm: Arm, pool: pa.Table, *, keep: int, selected_on: str, seed: int, cut_full: bool) -> np.ndarray:
    """Places (k,) int64 in the pool, ascending: what a method keeps of it, or what a selection holds of it.

    A selection of more than `keep` rows is cut at random; so is `full`, if `cut_full`. ValueError if one has fewer, or
    rows that the pool has not.
    """
    if arm.source == EVERYTHING:
        return _cut(np.arange(len(pool)), keep=keep, seed=seed) if cut_full else np.arange(len(pool))
    if is_method(arm):
        selector = selector_of(arm, selected_on)
        chosen = selector.select(_rows(pool, selector.needs), keep, 0.0, torch.Generator().manual_seed(seed))
        return np.sort(chosen.indices.numpy())
    places = {uid: place for place, uid in enumerate(pool["uid"].to_pylist())}
    uids = selected_uids(arm.source)
    if foreign := [uid for uid in uids if uid not in places]:
        raise ValueError(
            f"arm {arm.name}: {len(foreign)} of {len(uids)} uids are not in the pool, {foreign[0]} for one"
        )
    return _cut(np.array(sorted({places[uid] for uid in uids})), keep=keep, seed=seed, arm=arm.name)


def overlap(evaluated: pa.Table, rows: np.ndarray, pool: pa.Table) -> dict[str, int]:
    """How many of the samples that are measured against are among the rows of a selection, by the content's hash."""
    held = set(pool["sha256"].take(pa.array(rows)).to_pylist())
    inside = sum(sha256 in held for sha256 in evaluated["sha256"].to_pylist())
    return {"evaluated": len(evaluated), "held_by_the_selection": inside}


def is_method(arm: Arm) -> bool:
    """True if the arm is what a method or a straw man keeps, False if its rows are there already."""
    return arm.source in STRAW_MEN or arm.source in selector_names()


def selector_of(arm: Arm, selected_on: str) -> Any:
    """The arm's method, which sees the study's column if it compares vectors.

    A column of another kind, such as a percentile, is the method's own, and so is a straw man's.
    """
    if arm.source in STRAW_MEN:
        return load_selector("clip_score", column=STRAW_MEN[arm.source])
    selector = load_selector(arm.source)
    compares_vectors = isinstance(selector, BucketSelector) and selector.bucket_by == "clusters"
    return load_selector(arm.source, column=selected_on) if compares_vectors else selector


def _rows(pool: pa.Table, needs: frozenset[str]) -> Rows:
    rows: Rows = {}
    for name in needs:
        if name == "uid":
            rows[name] = torch.from_numpy(sampling.uid_words(pool[name].to_pylist()).view(np.int64))
        else:
            rows[name] = torch.from_numpy(tables.as_array(pool[name], name=name).astype(np.float32))
    return rows


def _cut(rows: np.ndarray, *, keep: int, seed: int, arm: str = EVERYTHING) -> np.ndarray:
    if len(rows) < keep:
        raise ValueError(f"arm {arm} has {len(rows)} rows, keep is {keep}")
    return np.sort(np.random.default_rng(seed).choice(rows, keep, replace=False))
