"""Files on a disk or in a bucket, named by fsspec URLs, written so that a reader never sees half of one.

A local file is written under a temporary name in its own folder, fsynced and renamed. An object store makes an object
visible only when its upload is complete, so there the upload goes to the final name. Either way a file exists whole or
not at all, and writing it again replaces it whole. (File servers such as sftp:// promise no such thing.) What fails
at a store is tried again, as remote.py has it, and is an OSError in the end. A plain path and a file:// URL mean the
local disk, and every character of them is literal: nothing is percent-decoded.
"""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import hashlib
import os
import re
import secrets
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple, cast

import pyarrow.fs
from braceexpand import braceexpand
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from curation.data import remote
from curation.data.redact import PASSWORD, redacted

SHARD_SUFFIXES = (".tar", ".parquet")
"""What a folder means: all its files with the first suffix that one of them has (parquet beside tars is metadata)."""
GLOB_CHARACTERS = frozenset("*?[")
BLOCK_BYTES = 8 << 20
LIST_THREADS = 32
NAMES_ASKED_SINGLY = 200
"""Of more names in one folder than this the folder is listed: a page of a bucket's listing tells of 1,000."""
CHANGE_MARKS = (
    "etag",
    "ETag",
    "content_md5",
    "mtime",
    "LastModified",
    "last_modified",
    "Last-Modified",
    "updated",
    "created",
)
"""What stores call that which changes with a file, the most telling first."""
_DISK = LocalFileSystem()
_ROOT = re.compile(r"[A-Za-z0-9+.-]+://+")


class ListedShard(NamedTuple):
    """A shard as a listing shows it; `fingerprint` is its size and mtime (or etag), "" if it is not there."""

    url: str
    fingerprint: str


def join(folder: str, *parts: str) -> str:
    """The URL of a file below a folder."""
    # memory:// and s3:// are folders too, and must not lose the slashes that make them one.
    root = folder.rstrip("/") + "/" if _ROOT.fullmatch(folder) else folder.rstrip("/")
    return "/".join([root, *parts])


def absolute(url: str) -> str:
    """The URL by which every node may open it: an absolute path on the local disk, else protocol://path.

    Two spellings of a place (relative, file://, with "..", with doubled slashes) have one such URL. ValueError if the
    protocol is unknown or its package is missing, or if it is a chain of them ("::").
    """
    fs, path = _resolve(url)
    return path if isinstance(fs, LocalFileSystem) else str(fs.unstrip_protocol(path))


def absolute_patterns(patterns: str) -> str:
    """Patterns of shards, joined by "::", that mean the same in any working folder; URLs stay as they are."""
    parts = patterns.split("::") if patterns else []
    return "::".join(part if "://" in part else os.path.abspath(part) for part in parts)


def is_local(url: str) -> bool:
    """True if the URL is on the local disk."""
    return isinstance(_resolve(url)[0], LocalFileSystem)


def arrow_filesystem(url: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The store of a URL as pyarrow knows it, with the credentials and options that fsspec has, and the path on it."""
    fs, path = _resolve(url)
    if isinstance(fs, LocalFileSystem):
        return pyarrow.fs.LocalFileSystem(), path
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs)), path


def open_read(url: str) -> BinaryIO:
    """The file, opened for reading in binary. OSError if the store fails, now or while it is read."""
    fs, path = _resolve(url)
    return open(path, "rb") if isinstance(fs, LocalFileSystem) else remote.open_remote(fs, path)


def read_bytes(url: str) -> bytes:
    """The whole file; one that is replaced meanwhile is read anew. FileNotFoundError if there is none."""
    for is_last in [False] * (remote.ATTEMPTS - 1) + [True]:
        try:
            with open_read(url) as file:
                return file.read()
        except remote.ChangedWhileRead:
            if is_last:
                raise
    raise AssertionError("the last attempt returns or raises")


def read_range(url: str, start: int, stop: int | None) -> bytes:
    """Bytes [start, stop) of a file, or from `start` to its end: one request to a remote store. OSError if it fails."""
    fs, path = _resolve(url)
    if isinstance(fs, LocalFileSystem):
        return cast(bytes, fs.cat_file(path, start=start, end=stop))
    return remote.read_range(fs, path, start, stop)


def exists(url: str) -> bool:
    """True if the file is there. OSError if the store does not say: no answer is not "no"."""
    return _info(url) is not None


def names_in(folder: str) -> list[str]:
    """Sorted names of the files in a folder; empty if there is no such folder."""
    fs, path = _resolve(folder)
    if not isinstance(fs, LocalFileSystem):
        return sorted(_name(info["name"]) for info in _ls(fs, path) if info["type"] == "file")
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(path) as entries:
        return sorted(entry.name for entry in entries if entry.is_file())
    return []


def folders_in(folder: str) -> list[str]:
    """Sorted names of the folders in a folder; empty if there is no such folder."""
    fs, path = _resolve(folder)
    return sorted(_name(info["name"]) for info in _ls(fs, path) if info["type"] == "directory")


def fingerprints_in(folder: str) -> dict[str, str]:
    """Name -> fingerprint of the files in a folder, empty if there is none: one listing, not a request for each."""
    fs, path = _resolve(folder)
    if not isinstance(fs, LocalFileSystem):
        return {_name(info["name"]): _fingerprint_of(info) for info in _ls(fs, path) if info["type"] == "file"}
    with contextlib.suppress(FileNotFoundError), os.scandir(path) as entries:
        return {entry.name: _fingerprint_of_stat(entry.stat()) for entry in entries if entry.is_file()}
    return {}


def delete(url: str) -> None:
    """Remove one file; nothing happens if it is not there."""
    fs, path = _resolve(url)
    with contextlib.suppress(FileNotFoundError):
        if isinstance(fs, LocalFileSystem):
            os.remove(path)
        else:
            remote.attempt(lambda: fs.rm_file(path))


@contextlib.contextmanager
def write_atomic(url: str) -> Iterator[IO[bytes]]:
    """A binary file to write to, which appears under `url` when the block ends well, and not at all otherwise."""
    fs, path = _resolve(url)
    if isinstance(fs, LocalFileSystem):
        target = Path(path)
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
    with tempfile.NamedTemporaryFile() as spool:
        yield cast(IO[bytes], spool)
        spool.flush()
        remote.upload(fs, spool.name, path)


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
    """A cheap mark that changes when the file does: its size, and its etag, mtime or time of creation if there is one.

    FileNotFoundError if there is no such file.
    """
    fs, path = _resolve(url)
    if isinstance(fs, LocalFileSystem):
        return _fingerprint_of_stat(os.stat(path))
    return _fingerprint_of(remote.attempt(lambda: fs.info(path)))


def list_shards(patterns: str) -> list[ListedShard]:
    """The shards that `patterns` name, sorted by URL, each once; a shard that is named but absent has no fingerprint.

    Patterns are joined by `::`; each is a path or URL with brace lists ({00000..00041}, {a,b}) and globs, or a folder,
    which means all its *.tar, or if it has none, all its *.parquet. As in a shell, a name that begins with a dot is
    matched only by a pattern that has the dot; unlike there, a pattern that is itself the name of a file or folder
    means that. ValueError if a glob or folder matches nothing, nothing at all is there, or a name is not UTF-8.
    """
    expanded = [path for pattern in patterns.split("::") if pattern for path in _braces(pattern)]
    folders: dict[str, list[str]] = defaultdict(list)
    for pattern in expanded:
        if pattern.endswith(SHARD_SUFFIXES) and "/" in pattern and not GLOB_CHARACTERS & set(pattern):
            folders[pattern.rpartition("/")[0]].append(pattern)
    many = {folder: names for folder, names in folders.items() if len(names) > NAMES_ASKED_SINGLY}
    listed = {name for names in many.values() for name in names}
    found: dict[str, str] = {}
    with ThreadPoolExecutor(LIST_THREADS) as pool:
        for matched in pool.map(_match, [pattern for pattern in expanded if pattern not in listed]):
            found.update(matched)
        for matched in pool.map(_match_in, many, many.values()):
            found.update(matched)
    if not any(found.values()):
        raise ValueError(f"pool.shards: no shard matches {patterns!r}")
    urls = sorted(found)
    for url in urls:
        _check_utf8(url)
    return [ListedShard(url, found[url]) for url in urls]


def _resolve(url: str) -> tuple[AbstractFileSystem, str]:
    """The store that a URL names, and the path there. ValueError as `absolute` has it."""
    if url.startswith("/"):  # "::" or "://" in a local name must not send fsspec elsewhere
        return _DISK, os.path.abspath("/" + url.lstrip("/"))
    if "::" in url:
        raise ValueError(f"{url!r} holds '::', which joins the patterns of a pool; a single URL cannot have it")
    if PASSWORD.search(url):  # a shard's URL is in its table, in logs, in the shard list
        raise ValueError(f"{redacted(url)!r} holds a password: give it in the store's own configuration or environment")
    try:
        # A cached listing would hide what other processes have committed since.
        fs, path = url_to_fs(url, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise ValueError(f"cannot open {url!r}: {error}") from error
    return fs, os.path.abspath(path) if isinstance(fs, LocalFileSystem) else path


def _info(url: str) -> dict[str, Any] | None:
    """What the store says of a file or folder; None if it is not there. (fsspec's `exists` takes any error for no.)"""
    return _told(*_resolve(url))


def _told(fs: AbstractFileSystem, path: str) -> dict[str, Any] | None:
    """What the store says of a path; None if it is not there."""
    try:
        return fs.info(path) if isinstance(fs, LocalFileSystem) else remote.attempt(lambda: fs.info(path))
    except (FileNotFoundError, NotADirectoryError):
        return None


def _ls(fs: AbstractFileSystem, path: str) -> list[dict[str, Any]]:
    """What a store's folder holds; nothing if it is not there."""
    try:
        return remote.attempt(lambda: fs.ls(path, detail=True))
    except FileNotFoundError:
        return []


def _check_utf8(url: str) -> None:
    """ValueError if a file's name is not UTF-8: no table, and no JSON, could hold it."""
    try:
        url.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"pool.shards: the name of {url!r} is not UTF-8: rename the file, or name the others"
        ) from error


def _braces(pattern: str) -> list[str]:
    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise ValueError(f"pool.shards: {pattern!r} is no brace list: {error}") from error


def _match(pattern: str) -> dict[str, str]:
    """URL -> fingerprint of what one brace-free pattern names."""
    fs, path = _resolve(pattern)
    found = _match_local(path) if isinstance(fs, LocalFileSystem) else _match_remote(fs, path)
    if not found:
        raise ValueError(f"pool.shards: no shard matches {pattern!r}")
    return found


def _match_in(folder: str, names: Sequence[str]) -> dict[str, str]:
    """URL -> fingerprint of shards that are named one by one, `names`, in one folder."""
    there = fingerprints_in(folder)
    root = absolute(folder)
    return {join(root, _name(name)): there.get(_name(name), "") for name in names}


def _match_local(path: str) -> dict[str, str]:
    # The standard library's glob, because fsspec's passes over symbolic links, of which many a pool is made.
    if os.path.isdir(path):
        found = (glob.glob(join(glob.escape(path), "*" + suffix)) for suffix in SHARD_SUFFIXES)
        names = next(filter(None, found), [])
    elif GLOB_CHARACTERS & set(path) and not os.path.exists(path):
        names = glob.glob(path, recursive=True)
    else:
        names = [path]
    return {name: fingerprint(name) if os.path.isfile(name) else "" for name in names if not os.path.isdir(name)}


def _match_remote(fs: AbstractFileSystem, path: str) -> dict[str, str]:
    url = str(fs.unstrip_protocol(path))
    info = _info(url)
    # A listing carries sizes and etags already, so a bucket of many shards costs pages, not one request per shard.
    if info is not None and info["type"] == "directory":
        inside = list(_ls(fs, path))
        found = ([info for info in inside if info["name"].endswith(suffix)] for suffix in SHARD_SUFFIXES)
        infos = next(filter(None, found), [])
    elif info is None and GLOB_CHARACTERS & set(path):
        infos = list(_glob(fs, path))
    else:
        return {url: "" if info is None else _fingerprint_of(info)}
    shows_hidden = _name(path).startswith(".")
    files = [info for info in infos if info["type"] == "file" and (shows_hidden or _name(info["name"])[:1] != ".")]
    # A listing over http tells nothing but names.
    whole = (info if _mark(info) else remote.attempt(lambda info=info: fs.info(info["name"])) for info in files)
    return {str(fs.unstrip_protocol(info["name"])): _fingerprint_of(info) for info in whole}


def _glob(fs: AbstractFileSystem, path: str) -> Iterator[dict[str, Any]]:
    """What a glob names. fsspec's own passes over a folder whose listing fails, as if it held nothing."""
    parts = path.split("/")
    fixed = next(place for place, part in enumerate(parts) if GLOB_CHARACTERS & set(part))
    return _below(fs, "/".join(parts[:fixed]), parts[fixed:])


def _below(fs: AbstractFileSystem, folder: str, parts: Sequence[str]) -> Iterator[dict[str, Any]]:
    part, *rest = parts
    if not GLOB_CHARACTERS & set(part):
        if rest:
            yield from _below(fs, f"{folder}/{part}", rest)
        elif info := _told(fs, f"{folder}/{part}"):
            yield info
        return
    if part == "**" and rest:
        yield from _below(fs, folder, rest)
    for info in _ls(fs, folder):
        path = info["name"].rstrip("/")
        is_named = fnmatch.fnmatchcase(_name(path), part) and (_name(path)[:1] != "." or part[:1] == ".")
        if is_named and rest and info["type"] == "directory":
            yield from _below(fs, path, parts if part == "**" else rest)
        elif is_named and not rest:
            yield info


def _name(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def _fingerprint_of_stat(stat: os.stat_result) -> str:
    return f"{stat.st_size}:{stat.st_mtime_ns}"


def _fingerprint_of(info: dict[str, Any]) -> str:
    mark = _mark(info)
    if isinstance(mark, datetime):  # memory:// lists a time as a number and tells it as a datetime
        mark = mark.timestamp()
    return f"{info['size']}:{str(mark).strip(chr(34))}"


def _mark(info: dict[str, Any]) -> Any:
    return next((info[name] for name in CHANGE_MARKS if info.get(name) is not None), "")
