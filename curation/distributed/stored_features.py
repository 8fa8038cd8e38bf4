"""Vectors that a run stores, streamed by shards: their mean and scale, and mixed batches to train on.

A row's features are columns of vectors or numbers side by side; rows that lack one are left out. Passes run as tasks
over groups of shards, and what they return adds up. Batches are mixed in a buffer of a few of them, from shards that
come in a seeded order: memory does not grow with the pool.

n rows, D features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from curation.data import tables
from curation.distributed.tasks import in_groups, ordered
from curation.recipe.columns import FactorsRecipe

BUFFERED_BATCHES = 16
"""Batches that are mixed with one another before they are trained on."""


def features_of(table: pa.Table, features: Sequence[str]) -> np.ndarray:
    """Columns of vectors or numbers side by side, (n, D) float32."""
    parts = [tables.as_array(table[name], name=name).astype(np.float32) for name in features]
    return np.concatenate([part if part.ndim == 2 else part[:, None] for part in parts], axis=1)


def has_features(table: pa.Table, features: Sequence[str]) -> np.ndarray:
    """Which rows have all of the columns, (n,) bool."""
    return np.all([table[name].is_valid().to_numpy() for name in features], axis=0)


def read_features(run: str, number: int, features: Sequence[str]) -> np.ndarray:
    """The features (n, D) float32 of a shard's embedded rows that have them."""
    table = tables.read(run, number, [*features, "status"])
    table = table.filter(pc.field("status") == "ok")
    return features_of(table.filter(pa.array(has_features(table, features))), features)


def each_group(recipe: FactorsRecipe, numbers: Sequence[int], function: Any, *arguments: Any) -> Iterator[Any]:
    """function(run, shards, features, *arguments) as a task for each group of shards."""
    groups = in_groups(list(numbers))
    return ordered(function, ((recipe.run, group, recipe.features, *arguments) for group in groups))


def mean_and_length(recipe: FactorsRecipe, numbers: Sequence[int]) -> tuple[Tensor, float, int]:
    """The features' mean (D,), their mean distance from it, and how many rows have them. ValueError if they are few, or
    all the same."""
    parts = list(each_group(recipe, numbers, _sums))
    rows = sum(part[1] for part in parts)
    if rows < 2:
        raise ValueError(f"features: {rows} rows of {recipe.run} have {list(recipe.features)}")
    mean_D = torch.from_numpy(sum(part[0] for part in parts) / rows).float()
    length = sum(each_group(recipe, numbers, _lengths, mean_D.numpy())) / rows
    if length == 0:
        raise ValueError(f"features: {list(recipe.features)} are the same in all {rows} rows of {recipe.run}")
    return mean_D, length, rows


def mixed_batches(recipe: FactorsRecipe, numbers: Sequence[int], *, batch: int) -> Iterator[Tensor]:
    """Endless batches (n, D) of rows; what does not fill a batch at a pass's end is left out of that pass."""
    for epoch in range(10**9):
        rng = np.random.default_rng([recipe.seed, epoch])
        waiting: list[np.ndarray] = []
        for number in rng.permutation(np.asarray(numbers)).tolist():
            waiting.append(read_features(recipe.run, number, recipe.features))
            if sum(map(len, waiting)) >= BUFFERED_BATCHES * batch:
                mixed = rng.permutation(np.concatenate(waiting))
                whole = len(mixed) // 2 // batch * batch
                yield from torch.from_numpy(mixed[:whole]).split(batch)
                waiting = [mixed[whole:]]
        rest = rng.permutation(np.concatenate(waiting))
        if whole := len(rest) // batch * batch:
            yield from torch.from_numpy(rest[:whole]).split(batch)


# What runs in a task: plain functions of one group of shards.


def _sums(run: str, numbers: list[int], features: Sequence[str]) -> tuple[np.ndarray, int]:
    parts = [read_features(run, number, features) for number in numbers]
    return np.sum([part.sum(axis=0, dtype=np.float64) for part in parts], axis=0), sum(map(len, parts))


def _lengths(run: str, numbers: list[int], features: Sequence[str], mean_D: np.ndarray) -> float:
    return sum(float(np.linalg.norm(read_features(run, number, features) - mean_D, axis=1).sum()) for number in numbers)
