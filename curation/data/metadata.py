"""Numbers about a pool's samples that lie elsewhere, joined by uid: DataComp's metadata parquets beside its tars.

The metadata are sorted by uid once, on disk, into arrays that any process maps into its memory: a lookup is a binary
search, so shards need not correspond to metadata files, and memory grows with neither. 32 bytes a row (its uid, and
where it lies, for the vectors beside it) and 8 for each column: 12.8 million rows of DataComp's small pool with 5
columns are 0.9 GB.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from curation.columns import FORMAT_VERSION
from curation.data import manifest, storage
from curation.data.mapped import mapped_arrays
from curation.data.parquet_columns import as_uid, find_name
from curation.data.parquet_shards import num_rows_of, opened_file
from curation.data.storage import ListedShard
from curation.data.tables import as_numbers
from curation.data.uid_sort import UidSort, splitters

FOLDER = "metadata"
ROWS_AT_A_TIME = 65_536
SAMPLED_FILES, SAMPLED_ROWS = 64, 1024


class MetadataFile(NamedTuple):
    """A parquet file that was sorted in, and how many rows it has."""

    url: str
    rows: int


class Index(NamedTuple):
    """Sorted uids as two arrays (n,) uint64, and columns (n,) float64 by name; NaN where there is no value."""

    high: np.ndarray
    low: np.ndarray
    columns: dict[str, np.ndarray]
    file: np.ndarray
    """Which of `files` each row is in, and which of its rows it is: (n,) float64, whole numbers."""
    row: np.ndarray
    files: list[MetadataFile]

    def find(self, uid: str) -> dict[str, float] | None:
        """The numbers of a sample; None if the metadata have no such uid."""
        at = self._place(uid)
        if at is None:
            return None
        values = {name: float(column[at]) for name, column in self.columns.items()}
        return {name: value for name, value in values.items() if not np.isnan(value)}

    def locate(self, uid: str) -> tuple[int, int] | None:
        """The place among `files` and the row in that file where a sample is; None if there is no such uid."""
        at = self._place(uid)
        return None if at is None else (int(self.file[at]), int(self.row[at]))

    def _place(self, uid: str) -> int | None:
        high, low = np.uint64(int(uid[:16], 16)), np.uint64(int(uid[16:], 16))
        first, stop = (int(np.searchsorted(self.high, high, side)) for side in ("left", "right"))
        at = first + int(np.searchsorted(self.low[first:stop], low))
        return None if at == stop or self.low[at] != low else at


def listed(patterns: str) -> list[ListedShard]:
    """The metadata files that `patterns` name, as those of a pool's shards do. ValueError if there are none."""
    try:
        return storage.list_shards(patterns)
    except ValueError as error:
        raise ValueError(str(error).replace("pool.shards:", "pool.metadata:")) from error


def url_of(output: str, digest: str) -> str:
    """Where the index of metadata with this digest lies."""
    return storage.join(output, FOLDER, digest[:16])


def digest_of(files: Sequence[ListedShard]) -> str:
    """Names the metadata: their files and fingerprints. ValueError if one is absent."""
    for url, fingerprint in files:
        if not fingerprint:
            raise ValueError(f"pool.metadata: {url} is named but not there")
    return manifest.digest([list(shard) for shard in sorted(files)])


def build(url: str, files: Sequence[ListedShard]) -> dict[str, Any]:
    """Sort the metadata into an index at `url`, if it is not there; returns its account.

    Of rows with one uid the first counts. ValueError if a file has no uids, or is no parquet file; OSError as the store
    raises it.
    """
    account_url = storage.join(url, "index.json")
    if storage.exists(account_url) and "files" in (account := manifest.read(account_url)):
        return account
    urls = [shard.url for shard in sorted(files)]
    with tempfile.TemporaryDirectory(prefix="curation-metadata-") as spool:
        names, account = _write_sorted(Path(spool), urls)
        for name in _array_names(len(names)):
            with open(Path(spool) / name, "rb") as file, storage.write_atomic(storage.join(url, name)) as out:
                shutil.copyfileobj(file, out, storage.BLOCK_BYTES)
    account = {"format_version": FORMAT_VERSION, "columns": names, **account}
    storage.write_bytes(account_url, json.dumps(account, indent=1).encode())
    return account


@lru_cache(maxsize=2)
def opened(url: str) -> Index:
    """The index at `url`, mapped into memory; one in a bucket is first copied to this machine, once a process."""
    account = manifest.read(storage.join(url, "index.json"))
    names = account["columns"]
    high, low, *columns, file, row = mapped_arrays(url, _array_names(len(names)))
    files = [MetadataFile(*file) for file in account["files"]]
    return Index(high, low, dict(zip(names, columns, strict=True)), file, row, files)


def _array_names(num_columns: int) -> list[str]:
    return ["high.npy", "low.npy", *(f"column_{place:04d}.npy" for place in range(num_columns)), "file.npy", "row.npy"]


def _write_sorted(spool: Path, files: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Write the arrays into the folder; the columns' names, and the account of the files and their rows."""
    schemas = [_number_columns(file) for file in files]
    names = sorted({name for columns in schemas for name in columns})
    (spool / "sort").mkdir()
    firsts = (words[:SAMPLED_ROWS] for file in files[:SAMPLED_FILES] for words, *_ in islice(_blocks(file, []), 1))
    sample = np.concatenate([np.zeros((0, 2), np.uint64), *firsts])
    rows_of = [_num_rows(file) for file in files]
    rows_in_all = sum(rows_of)
    by_uid = UidSort(spool / "sort", splitters_P2=splitters(sample, num_rows=rows_in_all))
    read = 0
    with contextlib.ExitStack() as open_files:
        raw = [open_files.enter_context(open(spool / f"{place}.raw", "wb")) for place in range(len(names) + 2)]
        for place, file in enumerate(files):
            for words, values, rows in _blocks(file, names):
                by_uid.add(words, np.arange(read, read + len(words)))
                read += len(words)
                for out, column in zip(raw, [*values, np.full(len(rows), float(place)), rows], strict=True):
                    column.tofile(out)
    kept = _gather(spool, by_uid, arrays=_array_names(len(names)), read=read)
    account = {"rows": rows_in_all, "malformed_uid": rows_in_all - read, "repeated_uid": read - kept}
    return names, {**account, "files": [list(file) for file in zip(files, rows_of, strict=True)]}


def _gather(spool: Path, by_uid: UidSort, *, arrays: Sequence[str], read: int) -> int:
    """Write the arrays in order of uid, each uid once; how many there are."""
    num_columns = len(arrays) - 2
    raw = [np.memmap(spool / f"{c}.raw", np.float64, "r", shape=(read,)) if read else () for c in range(num_columns)]
    outs = [spool / name for name in arrays]
    kept = 0
    with contextlib.ExitStack() as open_files:
        parts = [open_files.enter_context(open(f"{path}.part", "wb")) for path in outs]
        for block in by_uid.sorted_blocks():
            is_first = np.ones(len(block), bool)
            is_first[1:] = (block["high"][1:] != block["high"][:-1]) | (block["low"][1:] != block["low"][:-1])
            block = block[is_first]
            kept += len(block)
            columns = [block["high"], block["low"], *(column[block["address"]] for column in raw)]
            for part, column in zip(parts, columns, strict=True):
                np.ascontiguousarray(column).tofile(part)
    for path, dtype in zip(outs, ["<u8", "<u8", *["<f8"] * num_columns], strict=True):
        with open(path, "wb") as out, open(f"{path}.part", "rb") as file:
            np.lib.format.write_array_header_1_0(out, {"descr": dtype, "fortran_order": False, "shape": (kept,)})
            shutil.copyfileobj(file, out, storage.BLOCK_BYTES)
    return kept


def _number_columns(url: str) -> list[str]:
    """The columns that can be joined: numbers and truth values. ValueError if the file has no uids."""
    with opened_file(url) as parquet:
        schema = parquet.schema_arrow
        if find_name(schema.names, "uid") is None:
            raise ValueError(f"pool.metadata: {url} has no column 'uid' to join by, it has {schema.names}")
        unique = {field.name: field.type for field in reversed(list(schema))}
        return [name for name, dtype in unique.items() if _is_number(dtype)]


def _is_number(dtype: pa.DataType) -> bool:
    return (
        pa.types.is_integer(dtype)
        or pa.types.is_floating(dtype)
        or pa.types.is_boolean(dtype)
        or pa.types.is_decimal(dtype)
    )


def _num_rows(url: str) -> int:
    with opened_file(url) as parquet:
        return num_rows_of(parquet)


def _blocks(url: str, names: Sequence[str]) -> Iterator[tuple[np.ndarray, list[np.ndarray], np.ndarray]]:
    """Uids (m, 2) uint64 of the rows that have one; of these the columns `names` and their rows, (m,) float64 each."""
    first = 0
    with opened_file(url) as parquet:
        known = parquet.schema_arrow.names
        uid_name = find_name(known, "uid")
        columns = [name for name in names if name in known]
        for batch in parquet.iter_batches(ROWS_AT_A_TIME, columns=[uid_name, *columns], use_threads=False):
            uids = [as_uid(value) for value in batch.column(batch.schema.names.index(uid_name)).to_pylist()]
            has_uid = np.array([uid is not None for uid in uids], bool)
            words = np.array([(int(u[:16], 16), int(u[16:], 16)) for u in uids if u is not None], np.uint64)
            values = [
                _numbers(batch.column(batch.schema.names.index(name)), name)[has_uid]
                if name in known
                else np.full(int(has_uid.sum()), np.nan)
                for name in names
            ]
            yield words.reshape(-1, 2), values, first + np.flatnonzero(has_uid).astype(np.float64)
            first += len(uids)


def _numbers(column: pa.Array, name: str) -> np.ndarray:
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    return as_numbers(pa.chunked_array([column]), name=name)
