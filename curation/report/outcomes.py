"""What became of each row: dropped, a later copy, cut by a step, or kept.

n rows of a shard.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.addresses import row_of, shard_of
from curation.data import storage, tables
from curation.recipe import OneOf, Select, Step, Threshold
from curation.selector import PoolSelector

NOT_SELECTED = "not selected"
DUPLICATE = "duplicate_uid"
GROUPS_OF_COPIES = 24
"""Uids whose rows are remembered, to be shown side by side."""


class Ranking(NamedTuple):
    """The column by whose values a selector ranks rows one by one."""

    column: str
    keeps_highest: bool
    """False of a rule that draws around a middle."""
    has_cut: bool
    """True if the rows of the highest values are kept, and no later selector cut among them."""


def ranking(steps: Sequence[Step]) -> Ranking | None:
    """How the last selector ranks that ranks by a column of numbers; those that compare rows are passed over."""
    selects = [step for step in steps if isinstance(step, Select)]
    for step in reversed(selects):
        selector = step.selector()
        name = getattr(selector, "column", None)
        if isinstance(name, str) and isinstance(selector, PoolSelector):
            keeps_highest = step.name == "clip_score"
            return Ranking(name, keeps_highest, keeps_highest and step is selects[-1])
    return None


def last_selector(steps: Sequence[Step]) -> str:
    """What a row is charged to that passes all filters and was not kept."""
    return next((step.name for step in reversed(steps) if isinstance(step, Select)), NOT_SELECTED)


def outcomes_of(table: pa.Table, steps: Sequence[Step], *, is_kept: np.ndarray, is_copy: np.ndarray) -> np.ndarray:
    """What became of each row, (n,) objects: its drop reason, DUPLICATE, the step that cut it, or "kept".

    A row is charged to the first filter that it does not pass, and otherwise to the last selector.
    """
    what = np.full(table.num_rows, last_selector(steps), dtype=object)
    for step in reversed([step for step in steps if isinstance(step, Threshold | OneOf)]):
        what[~step.test().passes(table)] = step.name
    what[is_copy] = DUPLICATE
    what[is_kept] = "kept"
    reasons = np.asarray(table["reason"].to_pylist(), dtype=object)
    dropped = np.asarray(table["status"].to_pylist()) != "ok"
    what[dropped] = reasons[dropped]
    return what


class KeptRows:
    """The addresses of the kept rows, read along with the shards; both go up."""

    def __init__(self, run: str):
        self._batches = self._read(storage.join(run, "selection", "selected.parquet"))
        self._waiting = np.zeros(0, np.int64)

    def among(self, addresses_n: np.ndarray) -> np.ndarray:
        """Which of a shard's rows were kept, (n,) bool. Shards must come in order of their numbers."""
        last = addresses_n[-1] if len(addresses_n) else -1
        while not len(self._waiting) or self._waiting[-1] <= last:
            more = next(self._batches, None)
            if more is None:
                break
            self._waiting = np.concatenate([self._waiting, more])
        is_kept = np.isin(addresses_n, self._waiting)
        self._waiting = self._waiting[np.searchsorted(self._waiting, last, side="right") :]
        return is_kept

    @staticmethod
    def _read(url: str) -> Iterator[np.ndarray]:
        if not storage.exists(url):
            return
        with storage.open_read(url) as file:
            for batch in pq.ParquetFile(file).iter_batches(columns=["address"]):
                yield batch.column(0).to_numpy()


class Copies:
    """Later copies of a uid, and the groups of the first few."""

    def __init__(self, run: str):
        url = storage.join(run, "selection", "duplicates.npy")
        self._addresses = np.zeros(0, np.int64)
        if storage.exists(url):
            with storage.open_read(url) as file:
                self._addresses = np.load(file, allow_pickle=False)
        self._wanted: set[str] = set()
        for address in self._addresses[:GROUPS_OF_COPIES].tolist():
            row = row_of(np.array([address]))[0]
            here = tables.read(run, int(shard_of(np.array([address]))[0]), ["uid"], rows=range(row, row + 1))
            self._wanted.update(here["uid"].to_pylist())
        self._found: dict[str, list[int]] = defaultdict(list)

    def among(self, addresses_n: np.ndarray) -> np.ndarray:
        return np.isin(addresses_n, self._addresses)

    def note(self, uids: list[str], addresses_n: np.ndarray) -> None:
        if self._wanted:
            for uid, address in zip(uids, addresses_n.tolist(), strict=True):
                if uid in self._wanted:
                    self._found[uid].append(address)

    def groups(self) -> list[list[int]]:
        return [found for found in self._found.values() if len(found) > 1]
