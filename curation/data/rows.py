"""Rows of a curated shard, side by side: its image bytes, and columns from its table, joined by key and content.

A run of neighbouring rows is one byte range of a tar (or some row groups of a parquet file), and some row groups of the
table. What does not belong together
is never paired: a sample whose key or image is not what the table says is an error that names the shard.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from curation.data import open_shard, parquet_shards, storage, tables
from curation.data.read_rules import ReadRules
from curation.data.samples import Sample
from curation.data.shards import ShardReader


class StaleTable(ValueError):
    """A shard is not the one that its table was made from."""


class ReadRow(NamedTuple):
    """One row's image bytes, and its place in the columns that were read beside it."""

    place: int
    image: bytes


class RowRange(NamedTuple):
    """Rows of one shard: their images, one at a time, and their columns."""

    images: Iterator[ReadRow]
    columns: pa.Table


def read_rows(
    run: str, shard_number: int, url: str, row_numbers: np.ndarray, columns: Sequence[str], *, rules: ReadRules
) -> RowRange:
    """Rows (n,) ascending of a shard of the curated run: the table's `columns` for them, and their images in order.

    OSError if tar or table cannot be read. StaleTable, while reading the images, if the tar holds something else than
    the table says.
    """
    first, last = int(row_numbers[0]), int(row_numbers[-1])
    needed = list(dict.fromkeys([*columns, "key", "offset", "sha256"]))
    # One row more: where the next sample begins, this range ends.
    table = tables.read(run, shard_number, needed, rows=range(first, last + 2))
    if parquet_shards.is_parquet(url):
        chosen = table.take(pa.array(row_numbers - first))
        samples = _from_parquet(url, chosen["offset"].to_pylist(), rules)
        return RowRange(_checked(samples, url, chosen), chosen.select(columns))
    offsets = table["offset"].to_numpy()
    stop = int(offsets[last + 1 - first]) if len(offsets) > last + 1 - first else None
    start = int(offsets[0])
    chosen = table.take(pa.array(row_numbers - first))
    data = storage.read_range(url, start, stop)
    samples = iter(ShardReader(io.BytesIO(data), url=url, rules=rules, start=start))
    return RowRange(_checked(samples, url, chosen), chosen.select(columns))


def _from_parquet(url: str, rows: list[int], rules: ReadRules) -> Iterator[Sample]:
    file = open_shard.file_of(url)
    with storage.open_read(file) as raw:
        yield from parquet_shards.read_rows(raw, rows, url=file, rules=rules)


def _checked(samples: Iterator[Sample], url: str, chosen: pa.Table) -> Iterator[ReadRow]:
    """The images of the chosen rows among the samples. StaleTable if one is not there as its table says."""
    wanted = chosen.select(["offset", "key", "sha256"]).to_pylist()
    place = 0
    for sample in samples:
        if place == len(wanted):
            break
        if sample.offset < wanted[place]["offset"]:
            continue  # a dropped sample in between
        found = {"offset": sample.offset, "key": sample.key, "sha256": sample.sha256}
        if found != wanted[place] or sample.image is None:
            break
        yield ReadRow(place, sample.image)
        place += 1
    if place < len(wanted):
        raise StaleTable(
            f"{url} does not hold the sample {wanted[place]['key']!r} at offset {wanted[place]['offset']} as its table "
            "says: the shard changed after it was curated. Curate it again, with the same command."
        )
