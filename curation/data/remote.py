"""Calls to a store that fails now and then: made again with back-off, and half an answer is never taken for a whole.

What a store's client raises (503, time-outs, expired credentials, a connection that was cut, XML that ends in the
middle) is as a rule worth another attempt, and is an OSError here in the end, whatever its class was: callers leave a
shard pending on OSError. Clients retry by themselves too, for seconds; these attempts come on top, a file's range at a
time, so an outage costs a pause and not the shard.

A file is read in ranges whose length is checked against the size it had when it was opened. Who reads on gets ever
larger ranges, up to AHEAD_BYTES; who jumps, as readers of parquet do, gets what was asked for and no more.
"""

from __future__ import annotations

import io
import os
import random
import time
from collections.abc import Callable
from typing import Any, BinaryIO, TypeVar, cast

from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem

T = TypeVar("T")

ATTEMPTS = 4
FIRST_PAUSE_S = 1.0
AHEAD_BYTES = 8 << 20
"""Largest range that is fetched unasked; what an open file holds at most, beside what its reader asked for."""


class StoreError(OSError):
    """The store failed with an error that is no OSError, or gave less than it was asked for."""


class ChangedWhileRead(StoreError):
    """A file was replaced between two of the requests that read it."""


_FINAL = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, ChangedWhileRead)
_DEFECTS = (ValueError, TypeError, AttributeError, LookupError, AssertionError, NotImplementedError, MemoryError)
"""A wrong URL or a defect in code: another attempt would end as the first one did."""


def attempt(call: Callable[[], T]) -> T:
    """What `call` returns, after at most ATTEMPTS attempts with pauses that double.

    OSError if the last one fails, at once if the file is not there; what is no failure of the store is raised as it is.
    """
    pause_s = FIRST_PAUSE_S
    for is_last in [False] * (ATTEMPTS - 1) + [True]:
        try:
            return call()
        except (*_FINAL, *_DEFECTS):
            raise
        except Exception as error:  # the clients of stores have exceptions of their own, which nobody can list
            if is_last:
                if isinstance(error, OSError):
                    raise
                raise StoreError(f"{type(error).__name__}: {error}") from error
        # Of a thousand actors that were throttled at once, each comes back at another moment.
        time.sleep(pause_s * random.uniform(0.5, 1.0))
        pause_s *= 2
    raise AssertionError("the last attempt returns or raises")


def open_remote(fs: AbstractFileSystem, path: str) -> BinaryIO:
    """A file of a store for reading. Servers that give no ranges stream it, without further attempts."""
    info = attempt(lambda: fs.info(path))
    if info["type"] == "directory":
        raise IsADirectoryError(f"{path} is a folder")
    if info.get("size") is None or info.get("partial") is False:
        return cast(BinaryIO, attempt(lambda: fs.open(path, "rb")))
    return cast(BinaryIO, _RangedFile(fs, path))


def read_range(fs: AbstractFileSystem, path: str, start: int, stop: int | None) -> bytes:
    """Bytes [start, stop) of a file, or to its end. OSError if fewer come than the file has."""

    def read() -> bytes:
        data = cast(bytes, fs.cat_file(path, start=start, end=stop))
        if stop is None or len(data) != stop - start:
            size = fs.info(path)["size"]
            wanted = max(0, min(size if stop is None else stop, size) - start)
            if len(data) != wanted:
                raise StoreError(f"{path}: {len(data)} of {wanted} bytes came from offset {start} on")
        return data

    return attempt(read)


def upload(fs: AbstractFileSystem, source: str, path: str) -> None:
    """Put a local file under its final name. OSError if it does not have the file's size there."""

    def put() -> None:
        # Not fs.open(): closing such a file after an error in the middle would make what was sent visible.
        fs.put_file(source, path)
        size, there = os.path.getsize(source), fs.info(path)["size"]
        if there != size:
            raise StoreError(f"{path} has {there} bytes after an upload of {size}")

    attempt(put)


class _RangedFile(io.RawIOBase):
    """Reads a file of a store range by range. read(n) gives n bytes, fewer only at the end of the file."""

    def __init__(self, fs: AbstractFileSystem, path: str):
        self._fs, self._path = fs, path
        self._info: dict[str, Any] = {}
        self._file: Any = attempt(self._open)
        self._size = int(self._info["size"])
        self._position = 0
        self._held, self._held_at = b"", 0
        self._ahead = 0

    def _open(self) -> Any:
        # Caches of the client's own would fetch what nobody asked for; plain file systems have none.
        options = {"cache_type": "none"} if isinstance(self._fs, AsyncFileSystem) else {}
        file = self._fs.open(self._path, "rb", **options)
        # S3 files carry what they were opened as, and give no byte of what replaced it since.
        info = getattr(file, "details", None) or self._fs.info(self._path)
        marks = [(now.get("size"), now.get("ETag") or now.get("etag")) for now in (self._info or info, info)]
        if marks[0] != marks[1]:
            raise ChangedWhileRead(f"{self._path} changed while it was read")
        self._info = info
        return file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"{self._path}: cannot seek to {base + offset}")
        self._position = base + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        stop = self._size if size is None or size < 0 else min(self._position + size, self._size)
        if self._position >= stop:
            return b""
        if self._position < self._held_at or stop > self._held_at + len(self._held):
            self._fetch(self._position, stop)
        start, self._position = self._position, stop
        return self._held[start - self._held_at : stop - self._held_at]

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _fetch(self, start: int, stop: int) -> None:
        """Hold bytes [start, stop) and, if the reader goes on from what is held, some ahead."""
        end = self._held_at + len(self._held)
        kept = self._held[start - self._held_at :] if self._held_at <= start < end else b""
        reads_on = bool(self._held) and self._held_at <= start <= end + self._ahead
        self._ahead = min(max(2 * self._ahead, stop - start), AHEAD_BYTES) if reads_on else 0
        first = start + len(kept)
        last = min(max(stop, first + self._ahead), self._size)
        self._held = b""  # or what is held and what comes would be in memory together
        self._held = kept + attempt(lambda: self._range(first, last))
        self._held_at = start

    def _range(self, start: int, stop: int) -> bytes:
        file, self._file = self._file or self._open(), None  # after a failure it is opened anew
        file.seek(start)
        data = file.read(stop - start)
        if len(data) != stop - start:
            raise StoreError(f"{self._path}: {len(data)} of {stop - start} bytes came from offset {start} on")
        self._file = file
        return data
