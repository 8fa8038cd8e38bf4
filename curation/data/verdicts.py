"""Which rows a step of a selection kept that compared rows with one another, and their scores: a folder of three files.

`address.npy` (int64, ascending) and `score.npy` (float32) have a value for each row that was kept, `begins.npy` says
where in them each shard's rows begin (shards + 1). So a task that looks at a shard reads that shard's part. The folder
is whole if `begins.npy`, which is written last, is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from curation import addresses
from curation.data import storage

HEADER_BYTES = 128
"""Of a one-dimensional array of a simple type, whatever its length below 10**20."""


class KeptRows(NamedTuple):
    """Kept rows in order of address."""

    address: np.ndarray
    score: np.ndarray


@dataclass(frozen=True)
class Verdict:
    """The test of a row that such a step comes down to."""

    name: str
    folder: str

    @property
    def needs(self) -> frozenset[str]:
        """The address."""
        return frozenset({"address"})

    def passes(self, table: pa.Table) -> np.ndarray:
        """Which rows were kept, (n,) bool; the rows of a table are of one shard."""
        return np.isin(table["address"].to_numpy(), self._kept(table).address)

    def scores(self, table: pa.Table) -> np.ndarray:
        """Scores (n,) float32; NaN for rows that were not kept."""
        kept, where = self._kept(table), table["address"].to_numpy()
        scores = np.full(len(where), np.nan, np.float32)
        at = np.searchsorted(kept.address, where).clip(max=max(len(kept.address) - 1, 0))
        if len(kept.address):
            found = kept.address[at] == where
            scores[found] = kept.score[at[found]]
        return scores

    def _kept(self, table: pa.Table) -> KeptRows:
        if not table.num_rows:
            return KeptRows(np.zeros(0, np.int64), np.zeros(0, np.float32))
        shards = np.unique(addresses.shard_of(table["address"].to_numpy()))
        assert len(shards) == 1, f"rows of one shard were expected, got {shards.tolist()}"
        return read(self.folder, int(shards[0]))


def exists(folder: str) -> bool:
    """True if a verdict is there, whole."""
    return storage.exists(storage.join(folder, "begins.npy"))


def write(folder: str, blocks: Iterator[KeptRows], *, num_rows: int, num_shards: int) -> None:
    """Write a verdict from blocks of kept rows in order of address, `num_rows` in all; memory is that of a block."""
    begins = np.zeros(num_shards + 1, np.int64)
    with (
        storage.write_atomic(storage.join(folder, "address.npy")) as address_file,
        storage.write_atomic(storage.join(folder, "score.npy")) as score_file,
    ):
        for file, dtype in ((address_file, "<i8"), (score_file, "<f4")):
            header = {"descr": dtype, "fortran_order": False, "shape": (num_rows,)}
            np.lib.format.write_array_header_1_0(file, header)
            assert file.tell() == HEADER_BYTES
        written = 0
        for block in blocks:
            address_file.write(block.address.astype("<i8").tobytes())
            score_file.write(block.score.astype("<f4").tobytes())
            begins += np.searchsorted(addresses.shard_of(block.address), np.arange(num_shards + 1))
            written += len(block.address)
        assert written == num_rows, f"{written} rows came, {num_rows} were announced"
    with storage.write_atomic(storage.join(folder, "begins.npy")) as file:
        np.save(file, begins.astype("<i8"))


def read(folder: str, shard_number: int) -> KeptRows:
    """The kept rows of one shard: of the files only the bytes that hold them are read."""
    first, last = stored_part(storage.join(folder, "begins.npy"), "<i8", shard_number, shard_number + 2).tolist()
    return KeptRows(
        stored_part(storage.join(folder, "address.npy"), "<i8", first, last),
        stored_part(storage.join(folder, "score.npy"), "<f4", first, last),
    )


def stored_part(url: str, dtype: str, start: int, stop: int) -> np.ndarray:
    """Entries [start, stop) of a one-dimensional .npy file of a known type: only the bytes that hold them are read."""
    if start == stop:
        return np.zeros(0, dtype)
    first, last = (HEADER_BYTES + np.dtype(dtype).itemsize * place for place in (start, stop))
    return np.frombuffer(storage.read_range(url, first, last), dtype)
