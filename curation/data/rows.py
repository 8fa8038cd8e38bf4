"""Rows of a curated shard, side by side: image bytes from its tar, columns from its table, joined by key and content.

A run of neighbouring rows is one byte range of the tar and some row groups of the table. What does not belong together
is never paired: a sample whose key or image is not what the table says is an error that names the shard.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from curation.data import storage, tables
from curation.data.shards import ReadRules, ShardReader


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
    offsets = table["offset"].to_numpy()
    stop = int(offsets[last + 1 - first]) if len(offsets) > last + 1 - first else None
    start = int(offsets[0])
    chosen = table.take(pa.array(row_numbers - first))
    data = storage.read_range(url, start, stop)
    return RowRange(_images(data, start, url, chosen, rules), chosen.select(columns))


def _images(data: bytes, start: int, url: str, chosen: pa.Table, rules: ReadRules) -> Iterator[ReadRow]:
    wanted = chosen.select(["offset", "key", "sha256"]).to_pylist()
    place = 0
    for sample in ShardReader(io.BytesIO(data), url=url, rules=rules, start=start):
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
