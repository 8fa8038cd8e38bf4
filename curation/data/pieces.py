"""The records of a stage's committed pieces, held flat, and the index that spares a run from opening every manifest.

A pool of 600,000 shards has as many manifests. As dicts their records take 4 kB each; here a record is its JSON text
(0.4 kB) and what made it, which is the same for all, is held once; a record becomes a dict when it is asked for.

The index is `manifest/STAGE.index/NNNNNN.parquet`: segments that are only ever added, each with records as they stood
in their manifests, and with the fingerprint that the manifest's file had. An entry counts only while a manifest with
that fingerprint is there, so the manifest stays the commit: the index can be stale or be deleted, and is never wrong.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curation.columns import FORMAT_VERSION
from curation.data import storage

Record = dict[str, Any]

RUN_FIELDS = ("key", "made_by")
"""What the records of one run have in common."""
ROWS_AT_A_TIME = 10_000
SCHEMA = pa.schema(
    [
        ("number", pa.int64()),
        ("fingerprint", pa.string()),
        ("run", pa.dictionary(pa.int32(), pa.string())),
        ("record", pa.large_string()),
    ],
    metadata={"format_version": str(FORMAT_VERSION)},
)


class Pieces(Mapping[int, Record]):
    """Shard number -> record. `loose`: those that the index lacks, with the fingerprint of the manifest if known."""

    def __init__(self, other: Pieces | None = None):
        self._texts: dict[int, tuple[str, str]] = dict(other._texts) if other else {}
        self.loose: dict[int, str | None] = dict(other.loose) if other else {}
        self._runs: dict[str, Record] = {}

    def __getitem__(self, number: int) -> Record:
        run, text = self._texts[number]
        if run not in self._runs:
            self._runs[run] = json.loads(run)
        return {**self._runs[run], **json.loads(text)}

    def __contains__(self, number: object) -> bool:
        return number in self._texts

    def __iter__(self) -> Iterator[int]:
        return iter(self._texts)

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, number: int, record: Mapping[str, Any], *, fingerprint: str | None = None) -> None:
        """Take in a record as its manifest has it, or replace the one that was there."""
        run = {name: record[name] for name in RUN_FIELDS if name in record}
        rest = {name: value for name, value in record.items() if name not in run}
        self._texts[number] = sys.intern(_text(run)), _text(rest)
        self.loose[number] = fingerprint

    def one_of_each_run(self) -> dict[int, Record]:
        """A record of each run that made pieces here, by shard number."""
        firsts: dict[str, int] = {}
        for number, (run, _) in self._texts.items():
            firsts.setdefault(run, number)
        return {number: self[number] for number in firsts.values()}

    def read_index(self, output: str, stage: str, *, fingerprints: Mapping[int, str]) -> None:
        """Take in what the index knows of manifests with these fingerprints. ValueError if it is damaged or newer."""
        folder = _folder(output, stage)
        for name in storage.names_in(folder):
            for number, fingerprint, run, text in _entries(storage.join(folder, name)):
                if fingerprints.get(number) == fingerprint:
                    self._texts[number] = sys.intern(run), text

    def write_index(self, output: str, stage: str, fingerprints: Mapping[int, str]) -> None:
        """Add a segment with the records of these shards, whose manifests have these fingerprints."""
        folder = _folder(output, stage)
        last = max((int(name.partition(".")[0]) for name in storage.names_in(folder)), default=-1)
        with (
            storage.write_atomic(storage.join(folder, f"{last + 1:06d}.parquet")) as file,
            pq.ParquetWriter(file, SCHEMA, compression="zstd") as out,
        ):
            numbers = sorted(fingerprints)
            for at in range(0, len(numbers), ROWS_AT_A_TIME):
                some = numbers[at : at + ROWS_AT_A_TIME]
                runs, texts = zip(*(self._texts[number] for number in some), strict=True)
                columns = [pa.array(some), pa.array([fingerprints[number] for number in some])]
                columns += [pa.array(runs).dictionary_encode(), pa.array(texts, pa.large_string())]
                out.write_table(pa.table(columns, schema=SCHEMA))
        for number in fingerprints:
            self.loose.pop(number, None)


def _folder(output: str, stage: str) -> str:
    return storage.join(output, "manifest", f"{stage}.index")


def _entries(url: str) -> Iterable[tuple[int, str, str, str]]:
    try:
        with storage.open_read(url) as file:
            parquet = pq.ParquetFile(file)
            version = int((parquet.schema_arrow.metadata or {}).get(b"format_version", b"0"))
            if version > FORMAT_VERSION:
                raise ValueError(
                    f"{url} has format_version {version}, this code reads up to {FORMAT_VERSION}: update curation"
                )
            if parquet.schema_arrow.names != SCHEMA.names:
                raise pa.ArrowInvalid(f"its columns are {parquet.schema_arrow.names}, not {SCHEMA.names}")
            for batch in parquet.iter_batches(ROWS_AT_A_TIME, columns=SCHEMA.names):
                yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)
    except pa.ArrowException as error:
        raise ValueError(f"{url} is damaged; delete it, it is made again from the manifests: {error}") from error


def _text(value: Mapping[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"))
