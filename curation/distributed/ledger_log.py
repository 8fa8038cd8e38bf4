"""The ledger's log on disk: records that outlive the process, and what a torn one means.

A record is a frame (magic, length, checksums) and a body: a length, a JSON text, and the arrays that it names. A last
record that was cut was never acknowledged, so it is cut off; damage anywhere else is an error that names the place.
"""

from __future__ import annotations

import io
import json
import logging
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from curation.data import storage

READ_THREADS = 16

_FRAME = struct.Struct("<4sQII")  # magic, bytes of the body, its crc32, crc32 of the 16 bytes before
_MAGIC = b"LGR1"

Arrays = Mapping[str, np.ndarray]


class Record(NamedTuple):
    meta: Mapping[str, Any]
    arrays: Arrays
    num_bytes: int


class Segment:
    """A part of the log that one process writes: a growing file on a local disk, an object per record elsewhere."""

    def __init__(self, url: str, *, fsync: bool):
        self.name = url.rsplit("/", 1)[-1]
        self.num_bytes = 0
        self._url, self._fsync, self._count, self._has_rest = url, fsync, 0, False
        self._file = None
        if storage.is_local(url):
            Path(url).parent.mkdir(parents=True, exist_ok=True)
            self._file = open(f"{url}.log", "xb", buffering=0)  # noqa: SIM115 (closed by close)
            if fsync:
                _fsync_folder(Path(url).parent)

    def append(self, meta: Mapping[str, Any], arrays: Arrays) -> None:
        """On return the record outlives this process. OSError if it cannot be written: then it never was.

        In a bucket a record whose request failed may be there all the same, until the next one replaces it.
        """
        parts = _encode(meta, arrays)
        if self._file is None:
            storage.write_bytes(storage.join(self._url, f"{self._count:08d}.rec"), b"".join(parts))
        else:
            self._append_local(parts)
        self._count += 1
        self.num_bytes += sum(len(part) for part in parts)

    def _append_local(self, parts: Sequence[bytes | memoryview]) -> None:
        assert self._file is not None
        if self._has_rest:  # of a record that failed, and cutting it off failed too
            self._cut()
        self._has_rest = True
        try:
            for part in parts:
                rest = memoryview(part)
                while rest:
                    rest = rest[self._file.write(rest) :]
            if self._fsync:
                os.fsync(self._file.fileno())
        except OSError:
            self._cut()
            raise
        self._has_rest = False

    def _cut(self) -> None:
        assert self._file is not None
        self._file.seek(self.num_bytes)
        self._file.truncate()
        self._has_rest = False

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _fsync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _encode(meta: Mapping[str, Any], arrays: Arrays) -> list[bytes | memoryview]:
    filled = {name: np.ascontiguousarray(array) for name, array in arrays.items() if len(array)}
    columns = [[name, array.dtype.str, len(array)] for name, array in filled.items()]
    text = json.dumps({**meta, "arrays": columns}).encode()
    body = [len(text).to_bytes(4, "little"), text, *(array.data.cast("B") for array in filled.values())]
    crc = 0
    for part in body:
        crc = zlib.crc32(part, crc)
    num_bytes = sum(len(part) for part in body)
    start = _FRAME.pack(_MAGIC, num_bytes, crc, 0)[:-4]
    return [start + zlib.crc32(start).to_bytes(4, "little"), *body]


def _decode(body: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    at = 4 + int.from_bytes(body[:4], "little")
    meta = json.loads(body[4:at])
    arrays = {}
    for name, dtype, length in meta.pop("arrays"):
        arrays[name] = np.frombuffer(body, dtype, length, at)
        at += arrays[name].nbytes
    return meta, arrays


def read_segment(url: str) -> Iterator[Record]:
    """The records of a segment, in order. ValueError that names the place if one is damaged or missing."""
    if storage.is_local(url):
        with storage.open_read(f"{url}.log") as file:
            yield from _read_records(file, f"{url}.log")
        return
    names = storage.names_in(url)
    if not names or names != [f"{n:08d}.rec" for n in range(len(names))]:
        raise ValueError(f"{url} is damaged: of its records 0 to {len(names)} not all are there")
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for at in range(0, len(names), READ_THREADS):  # not all at once: a log may be larger than memory
            urls = [storage.join(url, name) for name in names[at : at + READ_THREADS]]
            for name, data in zip(urls, pool.map(storage.read_bytes, urls), strict=True):
                records = list(_read_records(io.BytesIO(data), name))
                if len(records) != 1 or records[0].num_bytes != len(data):
                    raise ValueError(f"{name} is damaged: it is not one whole record")
                yield records[0]


def _read_records(file: BinaryIO, name: str) -> Iterator[Record]:
    """The whole records of a file. A kill leaves a prefix of the last one, a power failure perhaps zeros in its place:
    both are cut off, for it was never acknowledged; anything else is damage."""
    at, size = 0, file.seek(0, os.SEEK_END)
    file.seek(0)
    while at < size:
        start = file.read(_FRAME.size)
        if len(start) == _FRAME.size:
            magic, length, body_crc, start_crc = _FRAME.unpack(start)
            if magic != _MAGIC or zlib.crc32(start[:-4]) != start_crc:
                if start.strip(b"\0") or any(block.strip(b"\0") for block in iter(lambda: file.read(1 << 20), b"")):
                    raise ValueError(f"{name} is damaged: no record begins at byte {at}")
                break
            end = at + len(start) + length
            body = file.read(length) if end <= size else b""
            if end <= size and zlib.crc32(body) == body_crc:
                yield Record(*_decode(body), num_bytes=end - at)
                at = end
                continue
            if end < size:
                raise ValueError(f"{name} is damaged: the record at byte {at} has another checksum than it says")
        break
    if at < size:
        logging.getLogger(__name__).warning("%s: bytes %d to %d were never acknowledged: cut off", name, at, size)
