"""The kept set as the ecosystem expects it: DataComp's subset file, and tars that img2dataset's readers take.

Every file is a function of the selection and the pool's bytes alone: fixed times, owners and orders, so the same input
gives the same bytes. Layouts are those of img2dataset, DataComp (`resharder.py`) and open_clip (`sizes.json`).
"""

from __future__ import annotations

import hashlib
import io
import json
import posixpath
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.data import storage
from curation.data.shards import read_sample_members, split_name

SUBSET_DTYPE = np.dtype([("f0", "<u8"), ("f1", "<u8")])
SHARD_FORMAT = "{:05d}.tar"
MTIME = 0

KEPT_SCHEMA = pa.schema(
    [
        ("address", pa.int64()),
        ("uid", pa.string()),
        ("key", pa.string()),
        ("shard", pa.string()),
        ("offset", pa.int64()),
        ("sha256", pa.string()),
        ("score", pa.float32()),
        ("copies", pa.uint32()),
    ]
)
"""The kept samples of a tar, in order of address: where the raw bytes of each lie, and how often it is written."""

ORIGIN_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("uid", pa.string()),
        ("address", pa.int64()),
        ("score", pa.float32()),
        ("shard", pa.string()),
        ("source_key", pa.string()),
    ]
)
"""The parquet beside a curated tar: which sample of the pool each of its keys is."""


def write_subset(url: str, blocks: Iterable[np.ndarray], *, num_rows: int) -> None:
    """DataComp's subset file: `num_rows` uids as u8,u8, from blocks (n, 2) uint64 that come in sorted order.

    ValueError if another number of uids comes.
    """
    header = {"descr": SUBSET_DTYPE.descr, "fortran_order": False, "shape": (num_rows,)}
    written = 0
    with storage.write_atomic(url) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for words_N2 in blocks:
            file.write(np.ascontiguousarray(words_N2, "<u8").tobytes())
            written += len(words_N2)
        if written != num_rows:
            raise ValueError(f"{url}: {written} uids came, {num_rows} were announced")


def write_tar(folder: str, index: int, rows: pa.Table) -> int:
    """One curated tar (rows: KEPT_SCHEMA) with its _stats.json and its parquet of origins; returns its samples.

    The members' bytes are those of the pool. A key stays as it was, unless it leaves the folder ("../", "/"), when the
    uid takes its place, or was used in this tar before, when "-1", "-2", ... follow; so do a sample's further copies.
    OSError if a shard cannot be read; ValueError if it no longer holds the sample.
    """
    tar_name, origin_name, stats_name = _file_names(index)
    used: set[str] = set()
    origins: list[dict[str, Any]] = []
    with (
        storage.write_atomic(storage.join(folder, tar_name)) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar,
    ):
        for row, members in _with_members(rows):
            for _ in range(row["copies"]):
                key = _free_key(row, used)
                for extension, data in members:
                    tar.addfile(_header(f"{key}.{extension}", len(data)), io.BytesIO(data))
                origins.append({**row, "key": key, "source_key": row["key"]})
    with storage.write_atomic(storage.join(folder, origin_name)) as file:
        columns = [[origin[name] for origin in origins] for name in ORIGIN_SCHEMA.names]
        pq.write_table(pa.table(columns, schema=ORIGIN_SCHEMA), file)
    storage.write_bytes(storage.join(folder, stats_name), _json({"successes": len(origins)}))
    return len(origins)


def remove_tar(folder: str, index: int) -> None:
    """Remove a tar that an earlier selection of this run wrote, and what lies beside it."""
    for name in _file_names(index):
        storage.delete(storage.join(folder, name))


def write_index(folder: str, sizes: Mapping[str, int], *, arguments: Mapping[str, Any], num_read: int) -> None:
    """sizes.json (open_clip counts samples with it) and meta.json (DataComp's train.py finds the shards with it)."""
    storage.write_bytes(storage.join(folder, "sizes.json"), _json(dict(sorted(sizes.items()))))
    meta = {
        **{name: str(value) for name, value in sorted(arguments.items())},
        "output_shard_format": SHARD_FORMAT,
        "processed_count": num_read,
        "output_count": sum(sizes.values()),
        "output_shard_count": len(sizes),
        "cwd": ".",
    }
    storage.write_bytes(storage.join(folder, "meta.json"), _json(meta))


def _file_names(index: int) -> tuple[str, str, str]:
    tar_name = SHARD_FORMAT.format(index)
    stem = tar_name.removesuffix(".tar")
    return tar_name, f"{stem}.parquet", f"{stem}_stats.json"


def _with_members(rows: pa.Table) -> Iterator[tuple[dict[str, Any], list[tuple[str, bytes]]]]:
    """Each row with its members (extension, bytes); in order of address, so one shard is open at a time."""
    with ExitStack() as open_shard:
        url, raw = None, None
        for row in rows.to_pylist():
            if raw is None or row["shard"] != url:
                open_shard.close()
                url = row["shard"]
                raw = open_shard.enter_context(storage.open_read(url))
            members = [(*split_name(name), data) for name, data in read_sample_members(raw, row["offset"])]
            images = {hashlib.sha256(data).hexdigest() for _, _, data in members}
            if any(key != row["key"] for key, _, _ in members) or row["sha256"] not in images:
                raise ValueError(
                    f"{url} no longer holds sample {row['key']!r} at offset {row['offset']}: it was edited"
                )
            yield row, [(extension, data) for _, extension, data in members]


def _free_key(row: Mapping[str, Any], used: set[str]) -> str:
    source = row["key"]
    stays_inside = not posixpath.isabs(source) and ".." not in source.split("/") and "\\" not in source
    wanted = key = source if stays_inside else row["uid"]
    number = 0
    while key in used:
        number += 1
        key = f"{wanted}-{number}"
    used.add(key)
    return key


def _header(name: str, size: int) -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.size, header.mtime, header.mode = size, MTIME, 0o444
    return header


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
