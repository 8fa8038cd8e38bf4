"""The contract of a method: rows in, k indices and k weights out.

A method scores rows and selects some of them; it keeps no state, opens no file and holds no model. Offline the rows are
a pool's tables, online they are a super-batch; the same object serves both. How many rows to keep is the recipe's
business, never a field of the selector.

B rows in; K rows chosen.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor

from curation.columns import is_run_value

Rows = dict[str, Tensor]
"""Columns (n, ...) and run values without a row axis; `columns.is_run_value` says which is which.

The column `uid` is (n, 2) int64: the bit patterns of the uid's high and low 64 bits.
"""


class Selection(NamedTuple):
    """K chosen rows: indices (K,) int64, distinct; weights (K,) float32, finite, >= 0.

    A weight multiplies the row's loss inside a plain mean; weights have mean 1 unless the selector is `unbiased`.
    """

    indices: Tensor
    weights: Tensor


@runtime_checkable
class Selector(Protocol):
    """One paper's way to choose rows."""

    @property
    def needs(self) -> frozenset[str]:
        """Names that must be in the rows."""
        ...

    @property
    def records(self) -> Literal["score", "loss"]:
        """What the ledger keeps for this method."""
        ...

    @property
    def fixed_size(self) -> bool:
        """True if exactly `keep` rows are chosen; False if the method decides how many, and takes keep=None."""
        ...

    @property
    def unbiased(self) -> bool:
        """True if the weights undo the selection's bias instead of having mean 1."""
        ...

    def score(self, rows: Rows, progress: float) -> Tensor:
        """Scores (n,) float32, higher = rather keep; may look at all rows at once. `progress` runs from 0 to 1."""
        ...

    def select(self, rows: Rows, keep: int | None, progress: float, rng: Generator) -> Selection:
        """`keep` of the rows, with weights. ValueError if `keep` is not in [0, n]."""
        ...


@runtime_checkable
class PoolSelector(Selector, Protocol):
    """A selector that decides one row at a time, and so serves a pool of any size.

    Over a pool it means: the exact top `keep` rows by `sort_key`, ties by the hash of the uid.
    """

    def sort_key(self, rows: Rows, progress: float, seed: int) -> Tensor:
        """Keys (n,) float32, each from its own row; noise comes from hash(uid, seed) alone. NaN sorts last."""
        ...


@runtime_checkable
class BucketSelector(Selector, Protocol):
    """A selector that compares rows with one another, and so serves a pool bucket by bucket.

    Over a pool of at most `exact_rows` rows it means its `select` on all of them; over a larger one, its `select` on
    each of the buckets of about `bucket_rows` rows into which the pool is cut, with a part of `keep` for each.
    """

    @property
    def column(self) -> str:
        """What the pool is cut by."""
        ...

    @property
    def bucket_by(self) -> Literal["clusters", "hashes"]:
        """clusters: k-means of the column's vectors. hashes: rows of an equal hash are in one bucket."""
        ...

    @property
    def exact_rows(self) -> int:
        """Up to so many rows are one bucket."""
        ...

    @property
    def bucket_rows(self) -> int:
        """About so many rows are in each bucket of a larger pool."""
        ...


@runtime_checkable
class QuotaSelector(BucketSelector, Protocol):
    """A bucket selector that keeps as many rows as it is told."""

    @property
    def quota(self) -> Literal["proportional", "even"]:
        """How `keep` is parted among the buckets: by their rows, or evenly as far as they have them."""
        ...

    def select_scored(self, rows: Rows, keep: int, progress: float, rng: Generator) -> tuple[Selection, Tensor]:
        """What `select` and `score` give, for the price of one."""
        ...


@runtime_checkable
class OutcomeSelector(BucketSelector, Protocol):
    """A bucket selector that decides itself how many rows stay: those that score above a mark."""

    @property
    def above(self) -> float:
        """The mark."""
        ...


@runtime_checkable
class EvenSelector(PoolSelector, Protocol):
    """A pool selector that promises how evenly it uses rows, where it is asked once a round."""

    def usage_gap(self, rows: Rows) -> int | None:
        """What the usage of two rows can differ by at most, after any round; None if nothing is promised."""
        ...


def num_rows(rows: Rows) -> int:
    """The common length of the columns. ValueError if there is no column or the lengths differ."""
    lengths = {name: len(column) for name, column in rows.items() if not is_run_value(name)}
    if not lengths:
        raise ValueError(f"rows hold no column, only {sorted(rows)}")
    if len(set(lengths.values())) > 1:
        raise ValueError(f"columns differ in length: {lengths}")
    return next(iter(lengths.values()))


def take(rows: Rows, indices: Tensor) -> Rows:
    """The rows at `indices` (k,), in that order; run values pass through untouched."""
    return {name: value if is_run_value(name) else value[indices] for name, value in rows.items()}


def check_needs(selector: Selector, rows: Rows) -> None:
    """ValueError that names the columns or run values which `selector` needs and `rows` lack."""
    missing = sorted(selector.needs - rows.keys())
    if missing:
        raise ValueError(f"{type(selector).__name__} needs {missing}, the rows have {sorted(rows)}")


def check_keep(keep: int | None, n: int) -> int:
    """`keep` itself, if it lies in [0, n]. ValueError otherwise."""
    if keep is None or not 0 <= keep <= n:
        raise ValueError(f"keep must be in [0, {n}], got {keep}")
    return keep


def uniform_weights(k: int) -> Tensor:
    """Weights (k,) float32, all 1."""
    return torch.ones(k, dtype=torch.float32)
