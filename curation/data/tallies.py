"""What is counted in one pass over the candidates of a selection: a tally of each shard's rows, and their sum.

A tally is told a shard's candidates, and which of them are left after each of the S steps so far: stages (S + 1, n)
bool, the first all true.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.data import labels
from curation.numerics.quotas import Window
from curation.numerics.sampling import hash_words, tie_hash, uid_words

EXAMPLES = 8
T = TypeVar("T")


class Tally(Protocol[T]):
    """A count over rows that adds up over shards, in order."""

    @property
    def needs(self) -> frozenset[str]:
        """Columns that it reads."""
        ...

    def __call__(self, table: pa.Table, stages_SN: np.ndarray) -> T:
        """One shard's."""
        ...

    def add(self, a: T, b: T) -> T:
        """Of two shards together."""
        ...


class Removed(NamedTuple):
    """Rows that the last step kept, and examples of what it removed, of the lowest tie hashes (m,): addresses (m,)."""

    rows: int
    ties: np.ndarray
    addresses: np.ndarray


@dataclass(frozen=True)
class RemovedRows:
    """What the last step removed. The examples are a sample that depends on no order of shards."""

    needs = frozenset({"uid", "address"})

    def __call__(self, table: pa.Table, stages_SN: np.ndarray) -> Removed:
        """One shard's."""
        gone = np.flatnonzero(stages_SN[-2] & ~stages_SN[-1])
        chosen = table.select(["uid", "address"]).take(pa.array(gone))
        ties = tie_hash(uid_words(chosen["uid"].to_pylist()))
        return _lowest(Removed(int(stages_SN[-1].sum()), ties, chosen["address"].to_numpy()))

    def add(self, a: Removed, b: Removed) -> Removed:
        """Of two together."""
        return _lowest(Removed(a.rows + b.rows, *map(np.concatenate, zip(a[1:], b[1:], strict=True))))


def _lowest(removed: Removed) -> Removed:
    order = np.argsort(removed.ties, kind="stable")[:EXAMPLES]
    return Removed(removed.rows, removed.ties[order], removed.addresses[order])


@dataclass(frozen=True)
class HaveOne:
    """How many of the rows that reach the step which is to come have a value in one of some columns, and how many in
    none: (2,) int64."""

    needs: frozenset[str]

    def __call__(self, table: pa.Table, stages_SN: np.ndarray) -> np.ndarray:
        """One shard's."""
        has_one = np.any([table[name].is_valid().to_numpy() for name in sorted(self.needs)], axis=0)
        reached = stages_SN[-1]
        return np.array([(reached & has_one).sum(), (reached & ~has_one).sum()])

    def add(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Of two together."""
        return a + b


class Label(NamedTuple):
    """A column by whose label rows are grouped; `edges` part a column of numbers."""

    column: str
    edges: tuple[float, ...] = ()

    @property
    def needs(self) -> frozenset[str]:
        """What it is made of."""
        return frozenset(labels.sources_of(self.column))

    def of(self, table: pa.Table) -> pa.DictionaryArray:
        """Each row's label, null where there is none."""
        return pc.call_function("dictionary_encode", [labels.labels(table, self.column, edges=self.edges)])


@dataclass(frozen=True)
class GroupCounts:
    """Label -> rows of that group that are left after each step (S + 1,); None for the rows without a label."""

    label: Label

    @property
    def needs(self) -> frozenset[str]:
        """What the label is made of."""
        return self.label.needs

    def __call__(self, table: pa.Table, stages_SN: np.ndarray) -> dict[str | None, np.ndarray]:
        """One shard's."""
        encoded = self.label.of(table)
        groups = [*encoded.dictionary.to_pylist(), None]
        places = np.asarray(encoded.indices.fill_null(len(groups) - 1))
        counts = np.stack([np.bincount(places[left], minlength=len(groups)) for left in stages_SN])
        return {group: counts[:, place] for place, group in enumerate(groups) if counts[0, place]}

    def add(self, a: dict[str | None, np.ndarray], b: dict[str | None, np.ndarray]) -> dict[str | None, np.ndarray]:
        """Of two together."""
        whole = dict(a)
        for group, counts in b.items():
            whole[group] = whole[group] + counts if group in whole else counts
        return whole


@dataclass(frozen=True)
class HashWindows:
    """Label -> how many rows of a group have a hash below its window, and the hashes inside it (m,) uint64."""

    label: Label
    windows: Mapping[str, Window]
    seed: int

    @property
    def needs(self) -> frozenset[str]:
        """What the label is made of, and the uid."""
        return self.label.needs | {"uid"}

    def __call__(self, table: pa.Table, stages_SN: np.ndarray) -> dict[str, tuple[int, np.ndarray]]:
        """One shard's: of the rows that reach the step which is to come."""
        reached = table.filter(pa.array(stages_SN[-1]))
        encoded, hashes = self.label.of(reached), hash_words(uid_words(reached["uid"].to_pylist()), self.seed)
        places = np.asarray(encoded.indices.fill_null(-1))
        told = {}
        for place, group in enumerate(encoded.dictionary.to_pylist()):
            if where := self.windows.get(group):
                mine = hashes[places == place]
                inside = mine[(mine >= np.uint64(where.low)) & (mine <= np.uint64(where.high))]
                told[group] = int((mine < np.uint64(where.low)).sum()), inside
        return told

    def add(self, a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[int, np.ndarray]]:
        """Of two together."""
        whole = dict(a)
        for group, (below, inside) in b.items():
            before = whole.get(group)
            whole[group] = (below, inside) if before is None else (before[0] + below, np.append(before[1], inside))
        return whole


@dataclass(frozen=True)
class WithinQuota:
    """A row test: the rows of each group whose hash is at most the group's cut; a group without one is kept, or not."""

    name: str
    label: Label
    cuts: Mapping[str, int]
    seed: int
    keep_others: bool
    keep_nulls: bool

    @property
    def needs(self) -> frozenset[str]:
        """What the label is made of, and the uid."""
        return self.label.needs | {"uid"}

    def passes(self, table: pa.Table) -> np.ndarray:
        """Which rows are within their group's quota."""
        encoded, hashes = self.label.of(table), hash_words(uid_words(table["uid"].to_pylist()), self.seed)
        groups: Sequence[str] = encoded.dictionary.to_pylist()
        cuts = [self.cuts.get(group) for group in groups]
        others = np.array([cut is None for cut in cuts] + [False], bool)
        nothing = np.array([cut == -1 for cut in cuts] + [False], bool)
        highest = np.array([0 if cut is None or cut < 0 else cut for cut in cuts] + [0], np.uint64)
        places = np.asarray(encoded.indices.fill_null(len(groups)))
        within = np.where(others[places], self.keep_others, (hashes <= highest[places]) & ~nothing[places])
        return np.where(places == len(groups), self.keep_nulls, within)
