"""A shard of any kind, opened: what reads shards need not know whether they are tars or parquet files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from curation.data import parquet_shards, storage
from curation.data.parquet_shards import ParquetReader
from curation.data.shards import ReadRules, ShardReader


@contextlib.contextmanager
def open_shard(url: str, rules: ReadRules) -> Iterator[ShardReader | ParquetReader]:
    """A reader of the shard's samples. OSError as the store raises it."""
    file = file_of(url)
    with storage.open_read(file) as raw:
        is_parquet = parquet_shards.is_parquet(url)
        yield (ParquetReader if is_parquet else ShardReader)(raw, url=url, rules=rules)


def file_of(url: str) -> str:
    """The URL of the file that holds the shard, which may be one of several in it."""
    return parquet_shards.row_range(url).file if parquet_shards.is_parquet(url) else url


def fingerprint(url: str) -> str:
    """The fingerprint of the shard's file. FileNotFoundError if there is no such file."""
    return storage.fingerprint(file_of(url))


def content_digest(url: str, rules: ReadRules) -> str:
    """What an embedded shard's record calls its sha256, by reading the shard anew."""
    if not parquet_shards.is_parquet(url):
        return storage.sha256_of(url)
    with open_shard(url, rules) as reader:
        for _ in reader:
            pass
        return reader.sha256
