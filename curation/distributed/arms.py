"""The arms of a study: which rows of a pool each selection holds, on which features, and what it shares with them.

N rows of the pool, k rows of an arm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch

from curation.data import manifest, storage, tables
from curation.data.pool_rows import selected_uids
from curation.methods import load_selector, selector_names
from curation.models.frozen import frozen_digest
from curation.models.registry import weights_digest
from curation.numerics import sampling
from curation.recipe.curate import Embed
from curation.recipe.evaluate import STRAW_MEN, Arm, Judged
from curation.recipe.parts import WeightsSource
from curation.selector import Rows

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
        if _is_method(arm):
            needs |= _selector(arm, selected_on).needs
    return sorted(needs)


def choose(arm: Arm, pool: pa.Table, *, keep: int, selected_on: str, seed: int, cut_full: bool) -> np.ndarray:
    """Places (k,) int64 in the pool, ascending: what a method keeps of it, or what a selection holds of it.

    A selection of more than `keep` rows is cut at random; so is `full`, if `cut_full`. ValueError if one has fewer, or
    rows that the pool has not.
    """
    if arm.source == EVERYTHING:
        return _cut(np.arange(len(pool)), keep=keep, seed=seed) if cut_full else np.arange(len(pool))
    if _is_method(arm):
        selector = _selector(arm, selected_on)
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


def shared_features(run: str, *, selected_on: str, measured_by: frozenset[str]) -> list[str]:
    """A warning if selections are measured with the network, named as `networks_of` does, that they were made on."""
    if not networks_of(run, selected_on) & measured_by:
        return []
    return [
        f"methods select on {selected_on!r} and are measured with the network that made it: that flatters what was "
        "selected on it"
    ]


def networks_of(run: str, column: str) -> frozenset[str]:
    """Digests of the network that made a column of vectors, weights included; each kind of column has its own form."""
    if column == "image_embedding":
        embed = Embed.model_validate(manifest.read(storage.join(run, "recipe.json"))["recipe"]["embed"])
        if embed.cached:
            return frozenset({embed.cached})
        source: WeightsSource = {"pretrained": embed.pretrained, "checkpoint": embed.checkpoint, "seed": embed.seed}
        return frozenset({frozen_digest("open_clip", embed.model, **source), weights_digest(embed.model, **source)})
    pieces = manifest.committed(run, tables.piece_stage(tables.piece_of(column)))
    return frozenset(str(record["made_by"]["weights"]) for record in pieces.values())


def _is_method(arm: Arm) -> bool:
    return arm.source in STRAW_MEN or arm.source in selector_names()


def _selector(arm: Arm, selected_on: str) -> Any:
    """The arm's method, on the column that the study selects on if it has a field for it; a straw man has its own."""
    if arm.source in STRAW_MEN:
        return load_selector("clip_score", column=STRAW_MEN[arm.source])
    selector = load_selector(arm.source)
    return load_selector(arm.source, column=selected_on) if hasattr(selector, "column") else selector


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
