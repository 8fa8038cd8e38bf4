"""Which rows of a curated run training may be offered, and in which order.

A shard offers its rows that were embedded, in the order of the tar. Neighbouring offered rows form segments, one byte
range each; a round visits all segments of the pool in a seeded random order. So the stream of rows is a pure function
of the pool and the seed, a position in it is one number, and a round offers each row exactly once, to any number of
workers: super-batch t is the stream's rows [t * B, (t + 1) * B). Rows that do not fill a super-batch at a round's end
begin the next one (there a sample may stand twice in one super-batch).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.columns import FORMAT_VERSION
from curation.data import shard_list, storage, tables

SCHEMA = pa.schema(
    [
        ("number", pa.int64()),
        ("url", pa.string()),
        ("fingerprint", pa.string()),
        ("rows", pa.int64()),
        ("dropped", pa.list_(pa.int32())),
    ],
    metadata={"format_version": str(FORMAT_VERSION)},
)


class Offering(Protocol):
    """A shard and those of its rows that may be trained on."""

    @property
    def number(self) -> int:
        """The shard's number."""
        ...

    @property
    def url(self) -> str:
        """Where it lies."""
        ...

    def row_numbers(self, first: int, count: int) -> np.ndarray:
        """Rows (count,) int64 of the shard's table that are its offered rows [first, first + count)."""
        ...


class OfferedShard(NamedTuple):
    """A shard's rows, and those of them that were dropped, (k,) int32 ascending."""

    number: int
    url: str
    fingerprint: str
    rows: int
    dropped: np.ndarray

    @property
    def offered(self) -> int:
        """How many rows it offers."""
        return self.rows - len(self.dropped)

    def row_numbers(self, first: int, count: int) -> np.ndarray:
        """Rows (count,) int64 of the shard's table that are its offered rows [first, first + count)."""
        # Row r is preceded by as many dropped rows as have at most (row - own place) offered rows before them.
        offered = np.arange(first, first + count, dtype=np.int64)
        return offered + np.searchsorted(self.dropped - np.arange(len(self.dropped)), offered, side="right")


def offered_shards(run: str, records: Mapping[int, dict]) -> list[OfferedShard]:
    """What the committed, not retired shards of a run offer; `records` are its embedding stage's manifests.

    Reads a column of the tables of those shards that dropped something. ValueError if nothing is offered.
    """
    shards = []
    for shard in shard_list.load(run):
        record = records.get(shard.number)
        if record is None or shard.retired or not record["embedded"]:
            continue
        dropped = np.zeros(0, np.int32)
        if record["dropped"]:
            status = tables.read(run, shard.number, ["status"])["status"].to_numpy()
            dropped = np.flatnonzero(status != "ok").astype(np.int32)
        shards.append(OfferedShard(shard.number, shard.url, record["fingerprint"], record["read"], dropped))
    if not shards:
        raise ValueError(f"data.run: {run} has no embedded sample to train on; make it with `python -m jobs.curate`")
    return shards


def save(url: str, shards: list[OfferedShard]) -> None:
    """Write what is offered, so that a run's positions keep their meaning while its pool grows."""
    with storage.write_atomic(url) as file:
        pq.write_table(pa.Table.from_pylist([shard._asdict() for shard in shards], schema=SCHEMA), file)


def load(url: str) -> list[OfferedShard]:
    """What `save` wrote. ValueError on a newer format."""
    with storage.open_read(url) as file:
        table = pq.read_table(file)
    version = int((table.schema.metadata or {}).get(b"format_version", b"0"))
    if version > FORMAT_VERSION:
        raise ValueError(f"{url} has format_version {version}, this code reads up to {FORMAT_VERSION}: update curation")
    rows = table.to_pylist()
    return [OfferedShard(**{**row, "dropped": np.asarray(row["dropped"], np.int32)}) for row in rows]


class Piece(NamedTuple):
    """Offered rows [first, first + count) of the shard at `place` in the list of shards."""

    place: int
    first: int
    count: int


class Rounds:
    """The endless stream of offered rows: round after round, each in its own order."""

    def __init__(self, offered: np.ndarray, *, segment_rows: int, seed: int):
        """`offered` (S,): rows that each shard offers. ValueError if they are none, or segment_rows < 1."""
        offered = np.asarray(offered, dtype=np.int64)
        if segment_rows < 1 or not offered.sum() or (offered < 0).any():
            raise ValueError(f"segment_rows must be at least 1, and shards offer rows, got {segment_rows}, {offered}")
        segments = -(-offered // segment_rows)
        self._place = np.repeat(np.arange(len(offered)), segments)
        starts = np.cumsum(segments) - segments
        self._first = (np.arange(segments.sum()) - np.repeat(starts, segments)) * segment_rows
        self._count = np.minimum(offered[self._place] - self._first, segment_rows)
        self._seed = seed
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.rows = int(offered.sum())
        """Rows of a round."""

    def pieces(self, start: int, stop: int) -> list[Piece]:
        """The stream's rows [start, stop), counted from the beginning of round 0."""
        if not 0 <= start <= stop:
            raise ValueError(f"rows must be a range from 0 on, got [{start}, {stop})")
        found: list[Piece] = []
        while start < stop:
            this_round, at = divmod(start, self.rows)
            end = min(stop - this_round * self.rows, self.rows)
            found.extend(self._of_round(this_round, at, end))
            start = this_round * self.rows + end
        return found

    def _of_round(self, this_round: int, start: int, stop: int) -> Iterator[Piece]:
        order, ends = self._order(this_round)
        at = int(np.searchsorted(ends, start, side="right"))
        while start < stop:
            segment = order[at]
            skip = start - (int(ends[at]) - int(self._count[segment]))
            count = min(int(ends[at]), stop) - start
            yield Piece(int(self._place[segment]), int(self._first[segment]) + skip, count)
            start, at = start + count, at + 1

    def _order(self, this_round: int) -> tuple[np.ndarray, np.ndarray]:
        """The round's segments in order, and where each ends; those of two rounds at most are kept."""
        if this_round not in self._orders:
            self._orders = {number: order for number, order in self._orders.items() if number == this_round - 1}
            order = np.random.default_rng([self._seed, this_round]).permutation(len(self._count))
            self._orders[this_round] = order, np.cumsum(self._count[order])
        return self._orders[this_round]
