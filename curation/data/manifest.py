"""Which pieces are committed. A piece is one shard at one stage; its manifest, written last, is its commit.

`OUTPUT/manifest/STAGE/NNNNNNNN.json` exists if and only if the piece is whole, so what was committed is never redone
and what was not is redone whole: a file without a manifest is garbage that the next attempt overwrites. A manifest
bears the digest of all that can change the piece's bytes (its key); a manifest with another key belongs to another run
and is an error that says what differs, never silently mixed in or overwritten. An index (pieces.py) spares a run from
opening them one by one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from curation.columns import FORMAT_VERSION
from curation.data import storage
from curation.data.pieces import Pieces

T = TypeVar("T")

READ_THREADS = 16
READ_AT_A_TIME = 10_000
ASKED_IN_A_ROW = 16
"""By one thread: on a disk, handing over each manifest singly would cost more than reading it."""
MIN_INDEXED = 1000
"""Fewer manifests than this are opened one by one: a segment of the index for each small run would cost more."""
TOLD = ("url", "read", "embedded", "dropped", "warnings", "seconds")
"""Of a record, what the log says."""
_LOG = logging.getLogger(__name__)
_NAME = re.compile(r"\d{8,}\.json")


class OtherRun(ValueError):
    """The output holds pieces which another recipe made."""


def shard_name(number: int) -> str:
    """The 8-digit name under which a shard's pieces are stored."""
    return f"{number:08d}"


def url_of(output: str, stage: str, number: int) -> str:
    """Where the manifest of a piece lies."""
    return storage.join(output, "manifest", stage, f"{shard_name(number)}.json")


def digest(value: Any) -> str:
    """64 hex digits that name a JSON value, whatever the order of its fields."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def commit(output: str, stage: str, number: int, record: Mapping[str, Any], *, made_by: Mapping[str, Any]) -> None:
    """Commit a piece: `record` is its account, `made_by` all that can change its bytes. Call it last."""
    whole = {"format_version": FORMAT_VERSION, "key": digest(made_by), "made_by": dict(made_by), **record}
    storage.write_bytes(url_of(output, stage, number), json.dumps(whole, indent=1).encode())
    told = {name: record[name] for name in TOLD if name in record}
    _LOG.debug("%s %d committed", stage, number, extra={"facts": {"stage": stage, "number": number, **told}})


def find(output: str, stage: str, number: int, *, made_by: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of a piece that is committed and was made by `made_by`; None otherwise."""
    try:
        record = read(url_of(output, stage, number))
    except FileNotFoundError:
        return None
    return record if record["key"] == digest(made_by) else None


def committed(output: str, stage: str) -> Pieces:
    """The records of all committed pieces of a stage, by shard number. ValueError on a newer format, or a damaged file.

    Names that no piece has, such as temporary ones of a killed writer, are not looked at.
    """
    folder = storage.join(output, "manifest", stage)
    listed = storage.fingerprints_in(folder)
    fingerprints = {int(name.removesuffix(".json")): mark for name, mark in listed.items() if _NAME.fullmatch(name)}
    pieces = Pieces()
    pieces.read_index(output, stage, fingerprints=fingerprints)
    loose = [number for number in sorted(fingerprints) if number not in pieces]
    for at in range(0, len(loose), READ_AT_A_TIME):
        some = loose[at : at + READ_AT_A_TIME]
        for number, record in zip(some, _each(lambda n: read(url_of(output, stage, n)), some), strict=True):
            pieces.add(number, record, fingerprint=fingerprints[number])
    return pieces


def index(output: str, stage: str, pieces: Pieces) -> None:
    """Note the loose records of `pieces` in the index, if they are many; call it under the lease of the output."""
    if len(pieces.loose) < MIN_INDEXED:
        return
    unknown = [number for number, mark in pieces.loose.items() if mark is None]
    told = _each(lambda number: storage.fingerprint(url_of(output, stage, number)), unknown)
    known = {number: mark for number, mark in pieces.loose.items() if mark is not None}
    pieces.write_index(output, stage, {**known, **dict(zip(unknown, told, strict=True))})


def _each(ask: Callable[[int], T], numbers: Sequence[int]) -> list[T]:
    """`ask` of each number, by threads: most of the time is spent waiting for the store."""
    runs = [numbers[at : at + ASKED_IN_A_ROW] for at in range(0, len(numbers), ASKED_IN_A_ROW)]
    with ThreadPoolExecutor(READ_THREADS) as pool:
        return [answer for answers in pool.map(lambda run: list(map(ask, run)), runs) for answer in answers]


def read(url: str) -> dict[str, Any]:
    """One JSON file of ours. ValueError if its format is newer than this code, or if it is none."""
    try:
        record = json.loads(storage.read_bytes(url))
        version = record.get("format_version", 0)
        is_newer = version > FORMAT_VERSION
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{url} is damaged, it is no JSON file of ours: {error}") from error
    if is_newer:
        raise ValueError(f"{url} has format_version {version}, this code reads up to {FORMAT_VERSION}: update curation")
    return record


def check_same_run(records: Mapping[int, Mapping[str, Any]], made_by: Mapping[str, Any]) -> None:
    """OtherRun, naming the fields that differ, if a committed piece was made by something else than `made_by`."""
    key = digest(made_by)
    for number, record in records.items():
        if record.get("key") != key:
            check_same(record.get("made_by", {}), made_by, what=f"shard {number}")


def check_same(old: Mapping[str, Any], new: Mapping[str, Any], *, what: str) -> None:
    """OtherRun, naming the fields that differ, if `what` the output holds was made by something else than `new`."""
    if changes := "; ".join(_differences(old, new)):
        raise OtherRun(
            f"the output already holds {what} made with another recipe ({changes}). "
            "What is committed is never overwritten: choose another output, or the former recipe."
        )


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """The fields whose JSON differs: null is not absent, and 1 is not 1.0, as in `digest`."""
    for name in sorted(old.keys() | new.keys()):
        before, now = (
            json.dumps(fields[name], sort_keys=True) if name in fields else "absent" for fields in (old, new)
        )
        if before != now:
            yield f"{name} was {before}, now {now}"
