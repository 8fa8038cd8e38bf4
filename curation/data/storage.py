"""Files on a disk or in a bucket, named by fsspec URLs, written so that a reader never sees half of one.

A local file is written under a temporary name in its own folder, fsynced and renamed. An object store makes an object
visible only when its upload is complete, so there the upload goes to the final name. Either way a file exists whole or
not at all, and writing it again replaces it whole. A plain path and a file:// URL mean the local disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple, cast

import fsspec
from braceexpand import braceexpand
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

SHARD_SUFFIX = ".tar"
GLOB_CHARACTERS = frozenset("*?[")
BLOCK_BYTES = 8 << 20


class ListedShard(NamedTuple):
    """A shard as a listing shows it; `fingerprint` is its size and mtime (or etag), "" if it is not there."""

    url: str
    fingerprint: str


def join(folder: str, *parts: str) -> str:
    """The URL of a file below a folder."""
    return "/".join([folder.rstrip("/"), *parts])


def absolute(url: str) -> str:
    """The URL by which every node may open it: an absolute path on the local disk, else protocol://path."""
    fs, path = url_to_fs(url)
    return path if isinstance(fs, LocalFileSystem) else str(fs.unstrip_protocol(path))


def is_local(url: str) -> bool:
    """True if the URL is on the local disk."""
    return isinstance(url_to_fs(url)[0], LocalFileSystem)


def open_read(url: str) -> BinaryIO:
    """The file, opened for reading in binary. OSError as the store raises it."""
    if is_local(url):
        return open(absolute(url), "rb")  # noqa: SIM115 - the caller closes it
    return cast(BinaryIO, fsspec.open(url, "rb").open())


def read_bytes(url: str) -> bytes:
    """The whole file. FileNotFoundError if there is none."""
    with open_read(url) as file:
        return file.read()


def exists(url: str) -> bool:
    """True if the file is there."""
    fs, path = url_to_fs(url)
    return bool(fs.exists(path))


def names_in(folder: str) -> list[str]:
    """Sorted names of the files in a folder; empty if there is no such folder."""
    fs, path = url_to_fs(folder)
    with contextlib.suppress(FileNotFoundError):
        return sorted(info["name"].rsplit("/", 1)[-1] for info in fs.ls(path, detail=True) if info["type"] == "file")
    return []


def delete(url: str) -> None:
    """Remove one file; nothing happens if it is not there."""
    fs, path = url_to_fs(url)
    with contextlib.suppress(FileNotFoundError):
        fs.rm_file(path)


@contextlib.contextmanager
def write_atomic(url: str) -> Iterator[IO[bytes]]:
    """A binary file to write to, which appears under `url` when the block ends well, and not at all otherwise."""
    if is_local(url):
        target = Path(absolute(url))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        return
    with tempfile.TemporaryFile() as spool:
        yield spool
        spool.seek(0)
        fs, path = url_to_fs(url)
        fs.makedirs(fs._parent(path), exist_ok=True)
        with fs.open(path, "wb") as remote:
            shutil.copyfileobj(spool, remote, BLOCK_BYTES)


def write_bytes(url: str, data: bytes) -> None:
    """Write the whole file at once, atomically."""
    with write_atomic(url) as file:
        file.write(data)


def copy(source: str, target: str) -> None:
    """Copy a file, atomically, in memory that does not grow with it."""
    with open_read(source) as file, write_atomic(target) as out:
        shutil.copyfileobj(file, out, BLOCK_BYTES)


def sha256_of(url: str) -> str:
    """sha256 of the file's bytes, 64 hex digits. FileNotFoundError if there is no such file."""
    with open_read(url) as file:
        return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()


def fingerprint(url: str) -> str:
    """A cheap mark that changes when the file does: its size, and its mtime, etag or time of change.

    FileNotFoundError if there is no such file.
    """
    if is_local(url):
        stat = os.stat(absolute(url))
        return f"{stat.st_size}:{stat.st_mtime_ns}"
    fs, path = url_to_fs(url)
    return _fingerprint_of(fs.info(path))


def list_shards(patterns: str) -> list[ListedShard]:
    """The shards that `patterns` name, sorted by URL, each once; a shard that is named but absent has no fingerprint.

    Patterns are joined by `::`; each is a path or URL with brace lists ({00000..00041}, {a,b}) and globs, or a folder,
    which means all its *.tar. ValueError if a glob or folder matches nothing, or nothing at all is there.
    """
    found: dict[str, str] = {}
    for pattern in filter(None, patterns.split("::")):
        for expanded in braceexpand(pattern):
            found.update(_match(expanded))
    if not any(found.values()):
        raise ValueError(f"pool.shards: no shard matches {patterns!r}")
    return [ListedShard(url, found[url]) for url in sorted(found)]


def _match(pattern: str) -> dict[str, str]:
    """URL -> fingerprint of what one brace-free pattern names."""
    fs, path = url_to_fs(pattern)
    local = isinstance(fs, LocalFileSystem)
    if not GLOB_CHARACTERS & set(path):
        if not fs.isdir(path):
            url = path if local else str(fs.unstrip_protocol(path))
            return {url: fingerprint(url) if fs.exists(path) else ""}
        path = join(path, "*" + SHARD_SUFFIX)
    # A listing carries sizes and etags already, so a bucket of many shards costs pages, not one request per shard.
    infos = cast(dict[str, dict[str, Any]], fs.glob(path, detail=True))
    files = {name: info for name, info in infos.items() if info["type"] == "file"}
    if not files:
        raise ValueError(f"pool.shards: no shard matches {pattern!r}")
    if local:
        return {name: fingerprint(name) for name in files}
    return {str(fs.unstrip_protocol(name)): _fingerprint_of(info) for name, info in files.items()}


def _fingerprint_of(info: dict[str, Any]) -> str:
    marks = ("etag", "ETag", "content_md5", "mtime", "LastModified", "last_modified", "updated", "created")
    mark = next((info[name] for name in marks if info.get(name) is not None), "")
    return f"{info['size']}:{str(mark).strip(chr(34))}"
