"""Lists of samples by what names them: opt-outs, known-bad images. Millions of entries fit, none is kept as a string.

An entry is 16 bytes, whatever it was made of: a uid as it is; the first half of an image's sha256; the first half of
the sha256 of a URL. A list is sorted once into an array that any process maps into its memory, and a lookup is a binary
search. 16 bytes an entry on disk, 48 in memory while it is sorted.

Files are text (an entry a line, "#" begins a comment), parquet (a column `uid`, `sha256` or `url`, in any case), or
DataComp's .npy of u8,u8, which holds uids (or halves of sha256s). An entry that cannot be understood is an error: a
person who asked to be left out must not be missed for a typing error.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import IO

import numpy as np

from curation.data import manifest, storage
from curation.data.mapped import mapped_arrays
from curation.data.parquet_columns import as_uid, find_name
from curation.data.parquet_shards import opened_file
from curation.data.read_rules import ListKind
from curation.data.storage import ListedShard
from curation.data.uid_sort import comparable

FOLDER = "lists"
ENTRIES_AT_A_TIME = 65_536
ENTRY = np.dtype("S16")
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


def entries_of(values: Sequence[str], kind: ListKind) -> np.ndarray:
    """What a list holds of each value, (n,) S16. ValueError that names the first value which is none of its kind."""
    return np.array([_entry(value, kind) for value in values], ENTRY)


def listed(patterns: str) -> list[ListedShard]:
    """The files that `patterns` name, as a pool's shards do. ValueError if there are none."""
    try:
        return storage.list_shards(patterns)
    except ValueError as error:
        raise ValueError(str(error).replace("pool.shards: no shard", "exclude: no file")) from error


def build(output: str, files: Sequence[ListedShard], kind: ListKind) -> str:
    """Sort the entries of some files into OUTPUT/lists/DIGEST.npy, if it is not there; returns its URL.

    The digest is that of the files' fingerprints, so a list that was edited is another list. ValueError if a file is
    not there, or holds an entry that is none.
    """
    for url, fingerprint in files:
        if not fingerprint:
            raise ValueError(f"exclude: {url} is named but not there")
    digest = manifest.digest([kind, *[list(file) for file in sorted(files)]])
    url = storage.join(output, FOLDER, f"{digest[:16]}.npy")
    if not storage.exists(url):
        blocks = [block for file in files for block in _blocks(file.url, kind)]
        entries = np.unique(np.concatenate([np.zeros(0, ENTRY), *blocks]))
        with storage.write_atomic(url) as out:
            np.save(out, entries)
    return url


@lru_cache(maxsize=16)
def opened(url: str) -> np.ndarray:
    """The sorted entries of a list, (m,) S16, mapped into memory."""
    folder, _, name = url.rpartition("/")
    return mapped_arrays(folder, [name])[0]


def contains(list_M: np.ndarray, entries_N: np.ndarray) -> np.ndarray:
    """Which entries (n,) S16 a sorted list (m,) S16 has, (n,) bool."""
    if not len(list_M):
        return np.zeros(len(entries_N), bool)
    at = np.minimum(np.searchsorted(list_M, entries_N), len(list_M) - 1)
    return list_M[at] == entries_N


def _entry(value: str, kind: ListKind) -> bytes:
    if kind == "uid":
        uid = as_uid(value)
        if uid is None:
            raise ValueError(f"a uid is 32 hex digits, got {value!r}")
        return bytes.fromhex(uid)
    if _SHA256.fullmatch(value):
        return bytes.fromhex(value)[:16]
    if kind == "sha256":
        raise ValueError(f"a sha256 is 64 hex digits, got {value!r}")
    return hashlib.sha256(value.encode("utf-8")).digest()[:16]


def _blocks(url: str, kind: ListKind) -> Iterator[np.ndarray]:
    name = url.partition("?")[0].lower()
    if name.endswith(".npy"):
        yield _from_npy(url)
        return
    read = _from_parquet(url, kind) if name.endswith(".parquet") else _from_text(url)
    try:
        while values := list(islice(read, ENTRIES_AT_A_TIME)):
            yield entries_of(values, kind)
    except ValueError as error:
        raise ValueError(f"exclude: {url}: {error}") from error


def _from_npy(url: str) -> np.ndarray:
    with storage.open_read(url) as file:
        array = np.load(file, allow_pickle=False)
    if array.dtype != np.dtype("u8,u8") or array.ndim != 1:
        raise ValueError(f"exclude: {url} is {array.dtype} {array.shape}, a list is u8,u8 (n,)")
    return comparable(np.stack([array["f0"], array["f1"]], axis=1))


def _from_text(url: str) -> Iterator[str]:
    with storage.open_read(url) as file:
        yield from _lines(file)


def _lines(file: IO[bytes]) -> Iterator[str]:
    for number, line in enumerate(file):
        # Spreadsheets begin a file with a byte order mark, which is none of the first entry's bytes.
        text = line.decode("utf-8" if number else "utf-8-sig").strip()
        if text and not text.startswith("#"):
            yield text


def _from_parquet(url: str, kind: ListKind) -> Iterable[str]:
    with opened_file(url) as parquet:
        name = find_name(parquet.schema_arrow.names, kind)
        if name is None:
            raise ValueError(f"it has no column {kind!r}, it has {parquet.schema_arrow.names}")
        for batch in parquet.iter_batches(ENTRIES_AT_A_TIME, columns=[name], use_threads=False):
            for value in batch.column(0).drop_null().to_pylist():
                yield value.hex() if isinstance(value, bytes) else str(value)
