"""Tests of a row by itself: what every filter of a selection comes down to, so that no mask of a pool is stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.data import derived_columns, hash_lists, labels
from curation.data.json_columns import as_text
from curation.data.labels import URL_COLUMNS
from curation.data.read_rules import ListKind
from curation.numerics import sampling

Nulls = Literal["drop", "keep"]


class RowTest(Protocol):
    """A test of rows, each by itself."""

    @property
    def name(self) -> str:
        """What the account calls it: the reason why a row was left out."""
        ...

    @property
    def needs(self) -> frozenset[str]:
        """Columns that it reads."""
        ...

    def passes(self, table: pa.Table) -> np.ndarray:
        """Which rows pass, (n,) bool."""
        ...


@dataclass(frozen=True)
class Within:
    """Rows whose number lies in [at_least, at_most]; NaN is no value."""

    name: str
    column: str
    at_least: float | None
    at_most: float | None
    nulls: Nulls

    @property
    def needs(self) -> frozenset[str]:
        """What the column is made of."""
        return frozenset(derived_columns.sources_of(self.column))

    def passes(self, table: pa.Table) -> np.ndarray:
        """Which rows lie in the range."""
        values = derived_columns.numbers(table, self.column)
        low = -np.inf if self.at_least is None else self.at_least
        high = np.inf if self.at_most is None else self.at_most
        return np.where(np.isnan(values), self.nulls == "keep", (values >= low) & (values <= high))


@dataclass(frozen=True)
class OneOf:
    """Rows whose label is one of some words."""

    name: str
    column: str
    words: tuple[str, ...]
    nulls: Nulls

    @property
    def needs(self) -> frozenset[str]:
        """What the label is made of."""
        return frozenset(labels.sources_of(self.column))

    def passes(self, table: pa.Table) -> np.ndarray:
        """Which rows have one of the words."""
        values = labels.labels(table, self.column)
        words = pc.SetLookupOptions(value_set=pa.array(self.words, pa.string()))
        among = pc.call_function("is_in", [values], words).to_numpy(zero_copy_only=False)
        return np.where(values.is_null().to_numpy(zero_copy_only=False), self.nulls == "keep", among)


@dataclass(frozen=True)
class NotListed:
    """Rows that a list does not name."""

    name: str
    list_url: str
    kind: ListKind

    @property
    def needs(self) -> frozenset[str]:
        """What the list names samples by."""
        return frozenset(URL_COLUMNS if self.kind == "url" else {self.kind})

    @property
    def found_by(self) -> frozenset[str]:
        """Columns of which a row must have one to be found."""
        return self.needs

    def blind(self, rows: int) -> str:
        """What is wrong if none of so many rows has one."""
        return (
            f"{self.name}: the list names samples by {self.kind}, and none of the {rows} samples has one (no "
            f"{' or '.join(sorted(self.needs))}): nobody would be left out. Give a list of what they have"
        )

    def passes(self, table: pa.Table) -> np.ndarray:
        """Which rows are not on the list."""
        list_M = hash_lists.opened(self.list_url)
        is_listed = np.zeros(table.num_rows, bool)
        for column in sorted(self.needs):
            texts = as_text(table[column])
            has_value = texts.is_valid().to_numpy()
            entries = hash_lists.entries_of(texts.drop_null().to_pylist(), self.kind)
            is_listed[has_value] |= hash_lists.contains(list_M, entries)
        return ~is_listed


@dataclass(frozen=True)
class NotCopied:
    """Rows whose image's bytes an evaluation set does not have, by a column that is 1 for those that it has."""

    name: str
    column: str

    @property
    def needs(self) -> frozenset[str]:
        """The column, and what it was made of."""
        return frozenset({self.column}) | self.found_by

    @property
    def found_by(self) -> frozenset[str]:
        """Columns of which a row must have one to be found."""
        return frozenset({"sha256"})

    def blind(self, rows: int) -> str:
        """What is wrong if none of so many rows has one."""
        return (
            f"{self.name}: copies are found by the sha256 of an image, and none of the {rows} samples has one: set "
            "decontaminate.exact to false"
        )

    def passes(self, table: pa.Table) -> np.ndarray:
        """Which rows are no copies."""
        return derived_columns.numbers(table, self.column) != 1


@dataclass(frozen=True)
class InPart:
    """Rows whose hash lies in one of the ranges [low, high), or, with `inside` false, in none of them.

    Parts of a pool are ranges of one seeded hash in [0, 1), so they are disjoint if their ranges are, and a sample's
    part is the same in every run and pool. Where there is no sha256 to hash, the uid is hashed.
    """

    name: str
    low: float
    high: float
    seed: int
    by: Literal["uid", "sha256"]
    inside: bool

    @property
    def needs(self) -> frozenset[str]:
        """What is hashed."""
        return frozenset({"uid", self.by})

    def passes(self, table: pa.Table) -> np.ndarray:
        """Which rows are in the part, or are not."""
        hashed = zip(table[self.by].to_pylist(), table["uid"].to_pylist(), strict=True)
        names = [(value or uid)[:32] for value, uid in hashed]
        place = sampling.hash_uniform(sampling.uid_words(names), self.seed)
        return ((place >= self.low) & (place < self.high)) == self.inside


def check_disjoint(parts: Mapping[str, tuple[float, float]], *, others: Mapping[str, tuple[float, float]]) -> None:
    """ValueError if a part shares samples with one of another name, among `parts` or `others`."""
    for name, (low, high) in parts.items():
        for other, (other_low, other_high) in [*parts.items(), *others.items()]:
            if name != other and max(low, other_low) < min(high, other_high):
                raise ValueError(
                    f"holdout parts must be disjoint: {name!r} [{low}, {high}) overlaps {other!r} "
                    f"[{other_low}, {other_high})"
                )
