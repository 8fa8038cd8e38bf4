"""The append-only shard list of a pool: a shard's number is given once and means the same bytes for ever.

New shards get the next numbers, in the order of their URLs; a shard that vanished from the listing keeps its number; an
edited one is retired and comes back under a new number. So no address ever shifts, whatever is added, removed or
reordered. Whether a shard was edited is told by its fingerprint, or, with `content_of`, by the sha256 of its bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from curation.columns import FORMAT_VERSION
from curation.data import storage
from curation.data.storage import ListedShard

SCHEMA = pa.schema(
    [
        ("number", pa.int64()),
        ("url", pa.string()),
        ("fingerprint", pa.string()),
        ("sha256", pa.string()),
        ("rows", pa.int64()),
        ("retired", pa.bool_()),
    ],
    metadata={"format_version": str(FORMAT_VERSION)},
)


class Shard(NamedTuple):
    """One numbered shard; `sha256` (of its bytes) and `rows` are null until it has been read once."""

    number: int
    url: str
    fingerprint: str
    sha256: str | None = None
    rows: int | None = None
    retired: bool = False


def extend(
    shards: Sequence[Shard], listed: Iterable[ListedShard], *, content_of: Callable[[str], str] | None = None
) -> list[Shard]:
    """The list after a new listing of the pool; numbers only ever grow.

    `content_of(url)` hashes a shard that was read before: then the bytes decide, not the fingerprint.
    """
    result = list(shards)
    live = {shard.url: shard for shard in shards if not shard.retired}
    for url, fingerprint in sorted(listed):
        known = live.get(url)
        if not fingerprint or (known and known.fingerprint == fingerprint and not (content_of and known.sha256)):
            continue
        if known and content_of and known.sha256 and content_of(url) == known.sha256:
            result[known.number] = known._replace(fingerprint=fingerprint)
            continue
        if known:
            result[known.number] = known._replace(retired=True)
        result.append(Shard(len(result), url, fingerprint))
    return result


def present(shards: Iterable[Shard], listed: Iterable[ListedShard]) -> list[Shard]:
    """The shards of this run's pool: listed, there, and not retired; in order of their numbers."""
    urls = {url for url, fingerprint in listed if fingerprint}
    return [shard for shard in shards if not shard.retired and shard.url in urls]


def load(output: str) -> list[Shard]:
    """The saved list of a run's folder; empty if there is none. ValueError on a newer format or a damaged file."""
    url = storage.join(output, "shards.parquet")
    # Only "no such file" means a new pool: after any other error, numbers would be given a second time.
    if not storage.exists(url):
        return []
    try:
        with storage.open_read(url) as file:
            table = pq.read_table(file)
    except pa.ArrowException as error:
        raise ValueError(f"{url} is damaged: {error}") from error
    version = int((table.schema.metadata or {}).get(b"format_version", b"0"))
    if version > FORMAT_VERSION:
        raise ValueError(f"{url} has format_version {version}, this code reads up to {FORMAT_VERSION}: update curation")
    if table.schema.names != SCHEMA.names:
        raise ValueError(f"{url} is damaged: its columns are {table.schema.names}, not {SCHEMA.names}")
    shards = list(map(Shard, *(table[name].to_pylist() for name in Shard._fields)))
    if [shard.number for shard in shards] != list(range(len(shards))):
        raise ValueError(f"{url} is damaged: its shard numbers are not 0 to {len(shards) - 1}")
    return shards


def save(output: str, shards: Sequence[Shard]) -> None:
    """Write the list, whole, into the run's folder."""
    columns = [[getattr(shard, name) for shard in shards] for name in SCHEMA.names]
    table = pa.table(columns, schema=SCHEMA)
    with storage.write_atomic(storage.join(output, "shards.parquet")) as file:
        pq.write_table(table, file)
