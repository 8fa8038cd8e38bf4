"""Rows sorted by uid when there are more than fit in memory: buckets on disk between fixed splitters, sorted one by one.

Splitters are quantiles of a sample of the pool's own uids, so buckets are even whatever the uids look like (hashes,
counters, zero-padded numbers). Memory is that of one bucket, about 4 million rows or 100 MB, for any pool.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROWS_PER_BUCKET = 4_000_000
ROW_DTYPE = np.dtype([("high", "<u8"), ("low", "<u8"), ("address", "<i8")])


def splitters(sample_words_N2: np.ndarray, *, num_rows: int, rows_per_bucket: int = ROWS_PER_BUCKET) -> np.ndarray:
    """Bounds (P-1, 2) uint64 that cut about `num_rows` rows into P even buckets, from a sample of their uids."""
    num_buckets = -(-num_rows // rows_per_bucket)
    if num_buckets <= 1 or len(sample_words_N2) == 0:
        return np.empty((0, 2), np.uint64)
    order = np.lexsort((sample_words_N2[:, 1], sample_words_N2[:, 0]))
    at = np.linspace(0, len(order) - 1, num_buckets + 1)[1:-1].astype(np.int64)
    return np.unique(sample_words_N2[order[at]], axis=0)


class UidSort:
    """Takes (uid, address) rows in any order, gives them back sorted by uid, then address. `folder` must be empty."""

    def __init__(self, folder: Path, *, splitters_P2: np.ndarray):
        self._folder = folder
        self._bounds = _comparable(splitters_P2)

    def add(self, words_N2: np.ndarray, addresses: np.ndarray) -> None:
        """Add rows: uids (n, 2) uint64, addresses (n,) int64."""
        rows = np.empty(len(addresses), ROW_DTYPE)
        rows["high"], rows["low"], rows["address"] = words_N2[:, 0], words_N2[:, 1], addresses
        if len(self._bounds) == 0:
            self._append(0, rows)
            return
        bucket = np.searchsorted(self._bounds, _comparable(words_N2), side="right")
        order = np.argsort(bucket, kind="stable")
        numbers, starts = np.unique(bucket[order], return_index=True)
        for number, part in zip(numbers, np.split(rows[order], starts[1:]), strict=True):
            self._append(int(number), part)

    def sorted_blocks(self) -> Iterator[np.ndarray]:
        """Blocks of rows (ROW_DTYPE): each sorted, and each wholly after the one before it; a uid is in one block."""
        for number in range(len(self._bounds) + 1):
            path = self._path(number)
            if path.exists():
                rows = np.fromfile(path, ROW_DTYPE)
                yield rows[np.lexsort((rows["address"], rows["low"], rows["high"]))]

    def _append(self, number: int, rows: np.ndarray) -> None:
        with open(self._path(number), "ab") as file:
            rows.tofile(file)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:06d}.rows"


def later_copies(block: np.ndarray) -> np.ndarray:
    """Addresses (m,) int64 of the rows of a sorted block whose uid an earlier address already has."""
    same = (block["high"][1:] == block["high"][:-1]) & (block["low"][1:] == block["low"][:-1])
    return block["address"][1:][same]


def _comparable(words_N2: np.ndarray) -> np.ndarray:
    """16-byte big-endian strings that compare as the two words do."""
    return np.ascontiguousarray(words_N2.astype(">u8")).view("S16").ravel()
