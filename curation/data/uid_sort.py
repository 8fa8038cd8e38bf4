"""Rows sorted by uid when there are more than fit in memory: buckets on disk between splitters, sorted one by one.

Splitters are quantiles of a sample of the pool's own uids, so buckets are even whatever the uids look like (hashes,
counters, zero-padded numbers). A bucket of more than twice the wanted size, which a bad sample makes, is parted again
by its own quantiles. So memory is that of one bucket, about 4 million rows or 100 MB, for any pool in which no single
uid comes more often than that.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROWS_PER_BUCKET = 4_000_000
SAMPLED_ROWS = 65_536
ROW_DTYPE = np.dtype([("high", "<u8"), ("low", "<u8"), ("address", "<i8")])


def splitters(sample_words_N2: np.ndarray, *, num_rows: int, rows_per_bucket: int = ROWS_PER_BUCKET) -> np.ndarray:
    """Bounds (P-1, 2) uint64 that cut about `num_rows` rows into P even buckets, from a sample of their uids."""
    num_buckets = -(-num_rows // rows_per_bucket)
    if num_buckets <= 1 or len(sample_words_N2) == 0:
        return np.empty((0, 2), np.uint64)
    order = np.lexsort((sample_words_N2[:, 1], sample_words_N2[:, 0]))
    at = np.linspace(0, len(order) - 1, num_buckets + 1)[1:-1].astype(np.int64)
    bounds = np.unique(sample_words_N2[order[at]], axis=0)
    return bounds[(bounds != sample_words_N2[order[0]]).any(axis=1)]  # nothing of the sample lies below its first


class UidSort:
    """Takes (uid, address) rows in any order, gives them back sorted by uid, then address.

    ValueError if `folder` is not empty: rows of another sort would come back among these.
    """

    def __init__(self, folder: Path, *, splitters_P2: np.ndarray, rows_per_bucket: int = ROWS_PER_BUCKET):
        if any(folder.iterdir()):
            raise ValueError(f"folder must be empty, got {folder}")
        self._folder = folder
        self._bounds = comparable(splitters_P2)
        self._rows_per_bucket = rows_per_bucket

    def add(self, words_N2: np.ndarray, addresses: np.ndarray) -> None:
        """Add rows: uids (n, 2) uint64, addresses (n,) int64."""
        if not len(addresses):
            return
        rows = np.empty(len(addresses), ROW_DTYPE)
        rows["high"], rows["low"], rows["address"] = words_N2[:, 0], words_N2[:, 1], addresses
        bucket = np.searchsorted(self._bounds, comparable(words_N2), side="right")
        order = np.argsort(bucket, kind="stable")
        numbers, starts = np.unique(bucket[order], return_index=True)
        for number, start, end in zip(numbers, starts, [*starts[1:], len(rows)], strict=True):
            with open(self._path(int(number)), "ab") as file:
                rows[order[start:end]].tofile(file)

    def sorted_blocks(self) -> Iterator[np.ndarray]:
        """Blocks of rows (ROW_DTYPE): each sorted, and each wholly after the one before it; a uid is in one block."""
        for number in range(len(self._bounds) + 1):
            path = self._path(number)
            if not path.exists():
                continue
            if path.stat().st_size > 2 * self._rows_per_bucket * ROW_DTYPE.itemsize:
                yield from self._parted(path)
            else:
                yield _sorted(np.fromfile(path, ROW_DTYPE))

    def _parted(self, path: Path) -> Iterator[np.ndarray]:
        """The sorted blocks of a bucket that is too large."""
        rows = np.memmap(path, ROW_DTYPE, mode="r")
        sample = _words(rows[:: -(-len(rows) // SAMPLED_ROWS)])
        uids = np.unique(sample, axis=0)
        if len(uids) == 1:  # nothing to part
            yield _sorted(np.asarray(rows))
            return
        bounds = splitters(sample, num_rows=len(rows), rows_per_bucket=self._rows_per_bucket)
        bounds = bounds if len(bounds) else uids[1:2]  # nearly all of it is the first uid
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            parts = UidSort(Path(folder), splitters_P2=bounds, rows_per_bucket=self._rows_per_bucket)
            for at in range(0, len(rows), self._rows_per_bucket):
                part = rows[at : at + self._rows_per_bucket]
                parts.add(_words(part), part["address"])
            yield from parts.sorted_blocks()

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:06d}.rows"


def later_copies(block: np.ndarray) -> np.ndarray:
    """Addresses (m,) int64 of the rows of a sorted block whose uid an earlier address already has."""
    same = (block["high"][1:] == block["high"][:-1]) & (block["low"][1:] == block["low"][:-1])
    return block["address"][1:][same]


def _sorted(rows: np.ndarray) -> np.ndarray:
    return rows[np.lexsort((rows["address"], rows["low"], rows["high"]))]


def _words(rows: np.ndarray) -> np.ndarray:
    return np.stack([rows["high"], rows["low"]], axis=1)


def comparable(words_N2: np.ndarray) -> np.ndarray:
    """16-byte big-endian strings that compare as the two words do."""
    return np.ascontiguousarray(words_N2.astype(">u8")).view("S16").ravel()
