"""Some rows of a curated run, drawn at random once and small enough to stay in memory: their features and labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from curation.data import tables
from curation.data.offered import OfferedShard


class DrawnRows(NamedTuple):
    """Features (N, F) and class numbers (N,) int64."""

    features_NF: np.ndarray
    labels_N: np.ndarray


def draw_rows(
    run: str,
    shards: Sequence[OfferedShard],
    *,
    num_rows: int,
    features: str,
    label: str,
    classes: Mapping[str, int],
    seed: int,
) -> DrawnRows:
    """`num_rows` of what the shards offer, or all of it, evenly drawn; one shard's table in memory at a time.

    ValueError if a row's label is none of `classes`.
    """
    ends = np.cumsum([shard.offered for shard in shards])
    wanted = np.sort(np.random.default_rng(seed).permutation(int(ends[-1]))[:num_rows])
    parts, labels = [], []
    for shard, last in zip(shards, ends.tolist(), strict=True):
        here = wanted[(wanted >= last - shard.offered) & (wanted < last)] - (last - shard.offered)
        if not len(here):
            continue
        numbers = shard.row_numbers(0, shard.offered)[here]
        table = tables.read(run, shard.number, [features, label]).take(pa.array(numbers))
        parts.append(tables.as_array(table[features], name=features))
        labels += [str(value) for value in table[label].to_pylist()]
    if unknown := [value for value in labels if value not in classes]:
        raise ValueError(
            f"comparison.run: {len(unknown)} of {len(labels)} rows of {run} have a {label} that is none of the "
            f"{len(classes)} classes learnt, {unknown[0]!r} for one"
        )
    return DrawnRows(np.concatenate(parts), np.array([classes[value] for value in labels]))
