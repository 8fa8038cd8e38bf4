"""Later columns that are made of stored ones: no image is read or decoded, no model of images is loaded.

Each is a piece beside the sample tables, as those of `jobs.fit` are: one shard in, one committed piece out, kept until
what it is made of changes. A selection makes those that it needs before it begins, in tasks on any CPU.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from curation.data import manifest, tables
from curation.data.pieces import Record
from curation.distributed.tasks import in_groups, ordered


class ColumnMaker(Protocol):
    """Makes one piece's columns. It is sent to tasks, so it is small; what is large it opens there."""

    @property
    def piece(self) -> str:
        """The piece's name."""
        ...

    @property
    def needs(self) -> frozenset[str]:
        """Columns that it reads."""
        ...

    @property
    def made_by(self) -> Mapping[str, Any]:
        """All that can change the columns, besides those that it reads."""
        ...

    def make(self, table: pa.Table) -> dict[str, pa.Array]:
        """PART -> a value for each row of the table, which holds rows that were embedded; "" for a column called as the
        piece is."""
        ...


def make(output: str, samples: Mapping[int, Record], numbers: Sequence[int], maker: ColumnMaker) -> int:
    """Make a piece for each of the shards `numbers` that has none; how many were made now.

    `samples` are the records of the sample tables.

    OtherRun if the piece is there, made otherwise.
    """
    stage = tables.piece_stage(maker.piece)
    tables.check_piece_name(maker.piece)
    made = manifest.committed(output, stage)
    for number in filter(made.__contains__, numbers):
        as_now = {**maker.made_by, "samples": samples[number]["key"]}
        manifest.check_same(made[number]["made_by"], as_now, what=f"the column {maker.piece!r} of shard {number}")
    todo = in_groups([number for number in numbers if number not in made])
    inputs = ((output, [(n, samples[n]["url"], samples[n]["key"]) for n in group], maker) for group in todo)
    for records in ordered(_make, inputs):
        for record in records:
            made.add(record["shard"], record)
    if todo:
        manifest.index(output, stage, made)
    return sum(map(len, todo))


def vectors_of(table: pa.Table, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Vectors (m, D) float16 of the rows that have one, and which rows these are, (n,) bool."""
    has_value = table[column].is_valid().to_numpy()
    return tables.as_array(table[column].filter(pa.array(has_value)), name=column), has_value


def aligned(values_M: pa.Array, has_value: np.ndarray) -> pa.Array:
    """Values (m,) of the rows that have one, null elsewhere; has_value (n,) bool, m of them true."""
    places = pa.array(np.cumsum(has_value) - 1, mask=~has_value)
    return values_M.take(places)


# What runs in a task.


def _make(output: str, shards: Sequence[tuple[int, str, str]], maker: ColumnMaker) -> list[dict[str, Any]]:
    return [_make_piece(output, number, url, key, maker) for number, url, key in shards]


def _make_piece(output: str, number: int, url: str, key: str, maker: ColumnMaker) -> dict[str, Any]:
    begun = time.perf_counter()
    table = tables.read(output, number, sorted(maker.needs | {"status"}))
    is_ok = np.asarray([status == "ok" for status in table["status"].to_pylist()], bool)
    columns = maker.make(table.filter(pa.array(is_ok)))
    whole = {
        f"{maker.piece}.{part}" if part else maker.piece: aligned(values, is_ok) for part, values in columns.items()
    }
    tables.write_piece(output, maker.piece, number, whole)
    record = {
        "shard": number,
        "url": url,
        "samples": key,
        "rows": table.num_rows,
        "made": int(is_ok.sum()),
        "missing": 0,
        "run_values": {},
        "seconds": round(time.perf_counter() - begun, 4),
    }
    how = {**maker.made_by, "samples": key}
    manifest.commit(output, tables.piece_stage(maker.piece), number, record, made_by=how)
    return {**record, "made_by": how, "key": manifest.digest(how)}
