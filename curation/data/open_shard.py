"""A shard of any kind, opened: what reads shards need not know whether they are tars or parquet files."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

from curation.data import metadata, parquet_shards, storage
from curation.data.metadata import Index
from curation.data.parquet_shards import ParquetReader
from curation.data.shards import ReadRules, Sample, ShardReader


@contextlib.contextmanager
def open_shard(url: str, rules: ReadRules) -> Iterator[ShardReader | ParquetReader | Joined]:
    """A reader of the shard's samples. OSError as the store raises it."""
    file = file_of(url)
    with storage.open_read(file) as raw:
        is_parquet = parquet_shards.is_parquet(url)
        reader = (ParquetReader if is_parquet else ShardReader)(raw, url=url, rules=rules)
        yield reader if rules.metadata is None else Joined(reader, metadata.opened(rules.metadata))


class Joined:
    """A reader whose samples have the numbers of an index among their fields, where they have no value of their own."""

    def __init__(self, reader: ShardReader | ParquetReader, index: Index) -> None:
        self._reader, self._index = reader, index
        self.warnings = reader.warnings

    @property
    def sha256(self) -> str:
        """As the reader has it: the metadata are no part of the shard."""
        return self._reader.sha256

    @property
    def num_bytes(self) -> int:
        """As the reader has it."""
        return self._reader.num_bytes

    def __iter__(self) -> Iterator[Sample]:
        for sample in self._reader:
            numbers = self._index.find(sample.uid)
            if numbers is None:
                self.warnings["metadata:no_row"] += 1
            own = {name: value for name, value in sample.fields.items() if value is not None}
            yield dataclasses.replace(sample, fields={**sample.fields, **(numbers or {}), **own})


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
