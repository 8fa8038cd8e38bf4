"""Folding: a batch of keys becomes its distinct keys in ascending order, each with all the rows in which it came.

One gather and one scatter per column then update many rows at once, in the order of memory, and no row is lost to
another one of the same key. Sorting is cheap because key and row share one int64 (5 ns a row; an argsort takes 12,
`numpy.unique` 70), and the work for repeats grows with the repeats alone.

n rows of a batch, m of a block; u distinct keys of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

BLOCK_ROWS = 10_240
"""Rows that are worked on at once. Arrays below 128 KiB come from the allocator's free lists; larger ones are mapped
anew at every call, and their page faults took half of the time of an update."""


class Fold(NamedTuple):
    """A block of a batch, each of its keys once; no other block has any of them."""

    keys: np.ndarray
    """(u,) int64, strictly ascending."""
    order: np.ndarray
    """(m,) int64: rows of the batch by ascending key, earlier rows first among equals."""
    repeats: np.ndarray
    """(m-u,) int64: places in that order whose key is the one before."""

    @property
    def owners(self) -> np.ndarray:
        """(m-u,) int64: for each repeat, the place of its key in `keys`."""
        return self.repeats - np.arange(1, len(self.repeats) + 1)

    def counts(self) -> np.ndarray:
        """How often each key came, (u,) uint32."""
        counts = np.ones(len(self.keys), dtype=np.uint32)
        np.add.at(counts, self.owners, np.uint32(1))
        return counts

    def firsts(self, in_order: np.ndarray) -> np.ndarray:
        """Of values (m,) in the order of the block, the first of each key (u,)."""
        return np.delete(in_order, self.repeats) if len(self.repeats) else in_order.copy()

    def largest(self, in_order: np.ndarray) -> np.ndarray:
        """Of values (m,) in the order of the block, the largest of each key (u,)."""
        largest = self.firsts(in_order)
        np.maximum.at(largest, self.owners, in_order[self.repeats])
        return largest

    def means(self, in_order: np.ndarray) -> np.ndarray:
        """Of values (m,) in the order of the block, the mean of each key (u,) float64; of one value, itself."""
        means = self.firsts(in_order).astype(np.float64)
        if len(self.repeats):
            np.add.at(means, self.owners, in_order[self.repeats].astype(np.float64))
            means /= self.counts()
        return means


class SortedBatch:
    """The rows of a batch by key. Every pass over it gives the same blocks, as folds of about 10,240 rows each."""

    def __init__(self, keys: np.ndarray) -> None:
        """Sorts the batch within the array of its keys (n,) int64, which is overwritten and has to stay as it is."""
        self._sorted, self._order = keys, None
        self._row_bits = max(0, len(keys) - 1).bit_length()
        if len(keys) and (keys.min() < 0 or int(keys.max()).bit_length() + self._row_bits > 63):
            # Key and row do not fit into one int64 together: the slow way, which no pool of today needs.
            self._order = np.argsort(keys, kind="stable")
            keys[:] = keys[self._order]
            self._row_bits = 0
            return
        came_sorted = (keys[1:] >= keys[:-1]).all()
        keys <<= self._row_bits
        for start in range(0, len(keys), BLOCK_ROWS):
            part = keys[start : start + BLOCK_ROWS]
            part |= np.arange(start, start + len(part))
        if not came_sorted:
            keys.sort()

    def __iter__(self) -> Iterator[Fold]:
        row_mask = (1 << self._row_bits) - 1
        start = 0
        while start < len(self._sorted):
            stop = min(start + BLOCK_ROWS, len(self._sorted))
            # To the end of the last key, so that no other block has it.
            stop = int(np.searchsorted(self._sorted, self._sorted[stop - 1] | row_mask, side="right"))
            part = self._sorted[start:stop]
            keys, order = part >> self._row_bits, part & row_mask
            if self._order is not None:
                order = self._order[start:stop]
            repeats = np.flatnonzero(keys[1:] == keys[:-1]) + 1
            yield Fold(np.delete(keys, repeats) if len(repeats) else keys, order, repeats)
            start = stop
