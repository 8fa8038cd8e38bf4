"""A shard of any kind, opened: what reads shards need not know whether they are tars or parquet files."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from curation.data import hash_lists, metadata, parquet_shards, storage
from curation.data.labels import URL_FIELDS
from curation.data.metadata import Index
from curation.data.parquet_shards import ParquetReader
from curation.data.read_rules import ListKind, ReadRules
from curation.data.samples import Sample
from curation.data.shards import ShardReader


@contextlib.contextmanager
def open_shard(url: str, rules: ReadRules) -> Iterator[ShardReader | ParquetReader | Joined | Excluding]:
    """A reader of the shard's samples. OSError as the store raises it."""
    file = file_of(url)
    with storage.open_read(file) as raw:
        is_parquet = parquet_shards.is_parquet(url)
        reader = (ParquetReader if is_parquet else ShardReader)(raw, url=url, rules=rules)
        joined = reader if rules.metadata is None else Joined(reader, metadata.opened(rules.metadata))
        yield joined if not rules.exclude else Excluding(joined, rules.exclude)


def absent(urls: Sequence[str]) -> list[str]:
    """Those shards whose file is not there. One of which the store does not say is taken to be: who reads it tells."""

    def is_there(url: str) -> bool:
        try:
            return storage.exists(file_of(url))
        except OSError:
            return True

    with ThreadPoolExecutor(storage.LIST_THREADS) as pool:
        return [url for url, there in zip(urls, pool.map(is_there, urls), strict=True) if not there]


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


class Excluding:
    """A reader that drops the samples which a list names, before they are decoded, and forgets what they hold."""

    def __init__(self, reader: ShardReader | ParquetReader | Joined, lists: Sequence[tuple[str, ListKind]]) -> None:
        self._reader = reader
        self._lists: list[tuple[np.ndarray, ListKind]] = [(hash_lists.opened(url), kind) for url, kind in lists]
        self.warnings = reader.warnings

    @property
    def sha256(self) -> str:
        """As the reader has it."""
        return self._reader.sha256

    @property
    def num_bytes(self) -> int:
        """As the reader has it."""
        return self._reader.num_bytes

    def __iter__(self) -> Iterator[Sample]:
        for sample in self._reader:
            if any(self._names(list_M, kind, sample) for list_M, kind in self._lists):
                yield dataclasses.replace(
                    sample, reason="sample:excluded", image=None, caption=None, fields={}, sha256=None
                )
            else:
                yield sample

    def _names(self, list_M: np.ndarray, kind: ListKind, sample: Sample) -> bool:
        if kind == "url":
            values = [sample.fields.get(name) for name in URL_FIELDS]
        else:
            values = [sample.uid if kind == "uid" else sample.sha256]
        entries = hash_lists.entries_of([value for value in values if isinstance(value, str)], kind)
        return bool(hash_lists.contains(list_M, entries).any())


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
