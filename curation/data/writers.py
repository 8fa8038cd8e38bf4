"""The kept set as the ecosystem expects it: DataComp's subset file, and tars that img2dataset's readers take.

Every file is a function of the selection and the pool's bytes alone: fixed times, owners and orders, so the same input
gives the same bytes. Layouts are those of img2dataset, DataComp (`resharder.py`) and open_clip (`sizes.json`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from operator import itemgetter
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.data import open_shard, storage
from curation.data.parquet_shards import is_parquet, read_rows
from curation.data.read_rules import ReadRules, split_name
from curation.data.samples import Sample
from curation.data.shards import read_sample_members

SUBSET_DTYPE = np.dtype([("f0", "<u8"), ("f1", "<u8")])
SHARD_FORMAT = "{:05d}.tar"
MTIME = 0
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")

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
        ("caption", pa.string()),
        ("url", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
)
"""The kept samples of a tar, in order of address: where the raw bytes of each lie, how often it is written, and what
its parquet tells of it."""

ORIGIN_SCHEMA = pa.schema(
    [
        ("caption", pa.string()),
        ("url", pa.string()),
        ("key", pa.string()),
        ("status", pa.string()),
        ("error_message", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("sha256", pa.string()),
        ("uid", pa.string()),
        ("address", pa.int64()),
        ("score", pa.float32()),
        ("shard", pa.string()),
        ("source_key", pa.string()),
    ]
)
"""The parquet beside a curated tar: img2dataset's columns, and which sample of the pool each of its keys is."""


def write_subset(url: str, blocks: Iterable[np.ndarray], *, num_rows: int) -> None:
    """DataComp's subset file: `num_rows` uids as u8,u8, from blocks (n, 2) uint64 that come in sorted order.

    ValueError if another number of uids comes, or if they are not sorted: its readers search in them.
    """
    header = {"descr": SUBSET_DTYPE.descr, "fortran_order": False, "shape": (num_rows,)}
    written, last = 0, np.zeros((1, 2), np.uint64)
    with storage.write_atomic(url) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for words_N2 in blocks:
            high, low = np.concatenate([last, words_N2]).T
            if np.any((high[1:] < high[:-1]) | ((high[1:] == high[:-1]) & (low[1:] < low[:-1]))):
                raise ValueError(f"{url}: the uids do not come in sorted order")
            file.write(np.ascontiguousarray(words_N2, "<u8").tobytes())
            written, last = written + len(words_N2), np.array([[high[-1], low[-1]]])
        if written != num_rows:
            raise ValueError(f"{url}: {written} uids came, {num_rows} were announced")


def write_tar(folder: str, index: int, rows: pa.Table, *, rules: ReadRules) -> int:
    """One curated tar (rows: KEPT_SCHEMA) with its _stats.json and its parquet of origins; returns its samples.

    The members' bytes are those of the pool; where captions come from elsewhere than the txt, the txt is the row's
    caption. A row of a parquet file becomes an image, a json of its other columns (with `uid`, by which DataComp finds
    it) and a txt. A key stays as it was, unless it could leave the folder ("../", "/", "\\") or has control
    characters, when the uid takes its place, or was used in this tar before, when "-1", "-2", ... follow; so do a
    sample's further copies. A member whose extension could do as much is left out.
    OSError if a shard cannot be read, or no longer holds the sample.
    """
    tar_name, origin_name, stats_name = _file_names(index)
    used: Counter[str] = Counter()
    origins: list[dict[str, Any]] = []
    with (
        storage.write_atomic(storage.join(folder, tar_name)) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT, encoding="utf-8") as tar,
    ):
        for row, members in _with_members(rows, rules):
            for _ in range(row["copies"]):
                key = _free_key(row, used)
                for extension, data in members:
                    tar.addfile(_header(f"{key}.{extension}", len(data)), io.BytesIO(data))
                origins.append(
                    {**row, "key": key, "source_key": row["key"], "status": "success", "error_message": None}
                )
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


def remove_index(folder: str) -> None:
    """Remove what an earlier selection of this run left beside its tars: index, subset file and card."""
    for name in ("sizes.json", "meta.json", "sample_ids.npy", "README.md"):
        storage.delete(storage.join(folder, name))


def _file_names(index: int) -> tuple[str, str, str]:
    tar_name = SHARD_FORMAT.format(index)
    stem = tar_name.removesuffix(".tar")
    return tar_name, f"{stem}.parquet", f"{stem}_stats.json"


def _with_members(rows: pa.Table, rules: ReadRules) -> Iterator[tuple[dict[str, Any], list[tuple[str, bytes]]]]:
    """Each row with its members (extension, bytes); in order of address, so one shard is open at a time."""
    for url, of_shard in groupby(rows.to_pylist(), key=itemgetter("shard")):
        with storage.open_read(open_shard.file_of(url)) as raw:
            yield from (_from_parquet if is_parquet(url) else _from_tar)(raw, list(of_shard), rules)


def _from_tar(
    raw: BinaryIO, rows: list[dict[str, Any]], rules: ReadRules
) -> Iterator[tuple[dict[str, Any], list[tuple[str, bytes]]]]:
    for row in rows:
        try:
            members = read_sample_members(raw, row["offset"])
        except ValueError as error:
            raise _edited(row) from error
        names = [split_name(name) or ("", "") for name, _ in members]
        images = {hashlib.sha256(data).hexdigest() for _, data in members}
        if {key for key, _ in names} != {row["key"]} or row["sha256"] not in images:
            raise _edited(row)
        extensions = [extension for _, extension in names]
        kept = [(name, data) for name, (_, data) in zip(extensions, members, strict=True) if _is_harmless(name)]
        yield row, kept if rules.caption_fields == ("txt",) else _with_caption(kept, row["caption"])


def _from_parquet(
    raw: BinaryIO, rows: list[dict[str, Any]], rules: ReadRules
) -> Iterator[tuple[dict[str, Any], list[tuple[str, bytes]]]]:
    try:
        samples = read_rows(raw, [row["offset"] for row in rows], url=open_shard.file_of(rows[0]["shard"]), rules=rules)
        for row, sample in zip(rows, samples, strict=True):
            found = sample.key, sample.offset, sample.sha256
            if found != (row["key"], row["offset"], row["sha256"]) or sample.image is None or sample.caption is None:
                raise _edited(row)
            if rules.best_caption_of:
                sample = dataclasses.replace(sample, caption=row["caption"])
            yield row, _members_of(sample, row)
    except ValueError as error:
        raise _edited(rows[0]) from error


def _with_caption(members: list[tuple[str, bytes]], caption: str) -> list[tuple[str, bytes]]:
    """The members with the caption that was used as their txt, in its place or at the end: trainers read no other."""
    chosen = ("txt", caption.encode())
    if all(name != "txt" for name, _ in members):
        return [*members, chosen]
    return [chosen if name == "txt" else (name, data) for name, data in members]


def _members_of(sample: Sample, row: Mapping[str, Any]) -> list[tuple[str, bytes]]:
    """The members of a parquet row, as img2dataset orders them. `sample` has an image and a caption."""
    assert sample.image is not None
    assert sample.caption is not None
    ours = {"uid": row["uid"], "key": sample.key, "caption": sample.caption}
    sizes = {"width": row["width"], "height": row["height"]}
    text = json.dumps(_finite({**sizes, **sample.fields, **ours}), indent=4)
    members = [(_image_extension(sample.image), sample.image), ("json", text.encode())]
    return [*members, ("txt", sample.caption.encode())]


def _image_extension(image: bytes) -> str:
    """jpg, png or webp by the first bytes; jpg for all else: open_clip looks for no other, and decodes by the bytes."""
    if image.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    return "webp" if image[:4] == b"RIFF" and image[8:12] == b"WEBP" else "jpg"


def _finite(value: Any) -> Any:
    """A value in which NaN and infinity are null: Python would write them, and no other reader of JSON takes them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return {name: _finite(item) for name, item in value.items()} if isinstance(value, dict) else value


def _edited(row: Mapping[str, Any]) -> OSError:
    return OSError(f"{row['shard']} no longer holds sample {row['key']!r} at offset {row['offset']}: it was edited")


def _free_key(row: Mapping[str, Any], used: Counter[str]) -> str:
    """The row's key in this tar; `used` counts how often each was wanted, so that equal keys cost no search."""
    key = wanted = row["key"] if _is_harmless(row["key"]) else row["uid"]
    while key in used:
        key = f"{wanted}-{used[wanted]}"
        used[wanted] += 1
    used[key] += 1
    return key


def _is_harmless(name: str) -> bool:
    """True if a part of a member's name stays in the folder into which a reader puts it, on any system."""
    return not (name.startswith("/") or ".." in name.split("/") or "\\" in name or _CONTROL.search(name))


def _header(name: str, size: int) -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.size, header.mtime, header.mode = size, MTIME, 0o444
    return header


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
