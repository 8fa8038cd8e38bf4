"""Parquet files as shards: the same samples, reasons and uids as a tar's, addressed by row.

A file is a shard, named by its URL. One of more than ROWS_PER_SHARD rows is several, named URL#rows=FIRST:STOP (ten
digits each, so that they sort as the rows do), which end where a row group does if they can, so that none is read
twice. A sample's `offset` is its row in the file, and its uid does not depend on how the file was cut.

A damaged part of a file costs its rows, each by name: pyarrow tells damage and a failing store by the same OSError, so
the file that it reads from remembers which of them it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.addresses import MAX_ROWS_PER_SHARD
from curation.data import storage
from curation.data.parquet_columns import Layout, check_layout, contents, layout_of
from curation.data.read_rules import ReadRules
from curation.data.samples import Content, Sample, sample_of, shard_name
from curation.data.shard_list import Shard
from curation.data.storage import ListedShard

ROWS_PER_SHARD = 1 << 17
"""A piece's table and embeddings are held in memory until it is committed: 131,072 rows are about 0.5 GB of them."""
MAX_FILE_ROWS = 1 << 31
"""A footer that tells of more is not believed."""
BATCH_BYTES = 16 << 20
BATCH_ROWS = 1024
READ_BYTES = 4 << 20
FOOTER_THREADS = 32
_URL = re.compile(r"(?P<file>.*\.(parquet|parq|pq)(\?[^#]*)?)(#rows=(?P<first>\d+):(?P<stop>\d+))?", re.I | re.S)


class RowRange(NamedTuple):
    """A parquet shard's URL, apart: its file, and the rows of it; `stop` is None if it is the whole file."""

    file: str
    first: int
    stop: int | None


def is_parquet(url: str) -> bool:
    """True if a shard's URL names a parquet file or some of its rows."""
    return _URL.fullmatch(url) is not None


def row_range(url: str) -> RowRange:
    """The file and rows that a parquet shard's URL names. ValueError if it names none."""
    match = _URL.fullmatch(url)
    if match is None:
        raise ValueError(f"{url!r} names no parquet file")
    if match["first"] is None:
        return RowRange(match["file"], 0, None)
    return RowRange(match["file"], int(match["first"]), int(match["stop"]))


def cut(
    listed: Iterable[ListedShard], known: Iterable[Shard], *, rules: ReadRules | None, max_rows: int = ROWS_PER_SHARD
) -> list[ListedShard]:
    """The listing, with parquet files of more than `max_rows` rows as row ranges; anything else as it was.

    A file that is `known` with the same fingerprint stays as it was cut; of others the footer is read. One without a
    readable footer stays whole: reading it accounts for it. ValueError if the first file that is read lacks a column
    which `rules` name, or any that could be an image.
    """
    listed = list(listed)
    if not any(is_parquet(shard.url) for shard in listed):
        return listed
    before: dict[ListedShard, list[str]] = {}
    for shard in known:
        if not shard.retired and is_parquet(shard.url):
            before.setdefault(ListedShard(row_range(shard.url).file, shard.fingerprint), []).append(shard.url)
    new = [s.url for s in listed if is_parquet(s.url) and s.fingerprint and s not in before]
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        ranges = dict(zip(new, pool.map(lambda url: _ranges(url, max_rows), new), strict=True))
    if new and rules is not None:
        _check_first(new[0], rules)
    urls = {**before, **{ListedShard(s.url, s.fingerprint): ranges[s.url] for s in listed if s.url in ranges}}
    return [ListedShard(url, shard.fingerprint) for shard in listed for url in urls.get(shard, [shard.url])]


class ParquetReader:
    """Iterate once over the samples of a parquet shard; after that `sha256`, `num_bytes` and `warnings` describe it.

    Storage errors propagate. ValueError if the shard has more rows than an address can hold.
    """

    def __init__(self, raw: BinaryIO, *, url: str, rules: ReadRules) -> None:
        self._raw, self._url, self._rules = _Remembering(raw), url, rules
        self._range = row_range(url)
        self._shard = shard_name(self._range.file).encode("utf-8", "backslashreplace")
        self._digest = hashlib.sha256()
        self._num_bytes = 0
        self._ended = False
        self.file_rows: int | None = None
        """Rows of the whole file, known once reading has begun; None if its footer cannot be read."""
        self.warnings: Counter[str] = Counter()

    @property
    def sha256(self) -> str:
        """Of what was read: each row's key, uid, image, caption and fields; 64 hex digits. RuntimeError before the end.

        Not of the file, which would be read a second time, once for each of its ranges.
        """
        self._check_ended()
        return self._digest.hexdigest()

    @property
    def num_bytes(self) -> int:
        """Size of the images and captions that were read. RuntimeError before the end."""
        self._check_ended()
        return self._num_bytes

    def __iter__(self) -> Iterator[Sample]:
        for row, content in enumerate(self._contents()):
            if row >= MAX_ROWS_PER_SHARD:
                raise ValueError(f"shard {self._url} has more than {MAX_ROWS_PER_SHARD} rows, and names no range")
            sample = sample_of(content, row=row, shard=self._shard)
            self._note(sample)
            yield sample
        self._ended = True

    def _contents(self) -> Iterator[Content]:
        parquet = _opened(self._raw)
        if parquet is None:
            yield _damaged(0, "parquet:unreadable")
            return
        self.file_rows = file_rows = int(parquet.metadata.num_rows)
        layout = layout_of(parquet.schema_arrow, self._rules)
        if layout.left_out:
            self.warnings["parquet:column_left_out"] += len(layout.left_out)
        first, stop = self._range.first, self._range.stop
        wanted = range(first, file_rows if stop is None else min(stop, file_rows))
        yield from _read(self._raw, parquet, layout, wanted, rules=self._rules, warnings=self.warnings)

    def _note(self, sample: Sample) -> None:
        self._num_bytes += len(sample.image or b"") + len((sample.caption or "").encode())
        told = [sample.key, sample.uid, sample.sha256, sample.reason, sample.caption, sample.fields]
        self._digest.update(json.dumps(told).encode() + b"\n")

    def _check_ended(self) -> None:
        if not self._ended:
            raise RuntimeError(f"{self._url} is not read to its end yet")


def read_rows(raw: BinaryIO, rows: Sequence[int], *, url: str, rules: ReadRules) -> Iterator[Sample]:
    """The samples at `rows` (ascending) of a parquet file, in that order; their `row` is their place among them.

    Only the row groups that hold them are read. Storage errors propagate. ValueError if the file has no such row.
    """
    remembering = _Remembering(raw)
    parquet = _opened(remembering)
    if parquet is None or (len(rows) and rows[-1] >= parquet.metadata.num_rows):
        raise ValueError(f"{url} is not the parquet file that was read: it has not all of the rows {rows}")
    layout, shard = layout_of(parquet.schema_arrow, rules), shard_name(row_range(url).file)
    name = shard.encode("utf-8", "backslashreplace")
    wanted, place = np.asarray(rows, np.int64), 0
    group_of = np.searchsorted(np.cumsum(_group_sizes(parquet)), wanted, side="right")
    for group in np.unique(group_of):
        here = wanted[group_of == group].tolist()
        rows_read, chosen = range(here[0], here[-1] + 1), set(here)
        for content in _read(remembering, parquet, layout, rows_read, rules=rules, warnings=Counter()):
            if content.offset in chosen:
                yield sample_of(content, row=place, shard=name)
                place += 1


@contextlib.contextmanager
def opened_file(url: str) -> Iterator[pq.ParquetFile]:
    """A parquet file that is no shard. ValueError if it is none or damaged; OSError only if the store fails."""
    with storage.open_read(url) as raw:
        remembering = _Remembering(raw)
        parquet = _opened(remembering)
        if parquet is None:
            raise ValueError(f"{url} is no parquet file, or its footer is damaged")
        try:
            yield parquet
        except (pa.ArrowException, OSError) as error:
            if remembering.error is not None:
                raise remembering.error from None
            raise ValueError(f"{url} is damaged: {error}") from error


def num_rows_of(parquet: pq.ParquetFile) -> int:
    """Rows of an opened file."""
    return int(parquet.metadata.num_rows)


class _Remembering:
    """A file for pyarrow that remembers the storage error under which a read failed; a read cut short is one too."""

    def __init__(self, raw: BinaryIO):
        self._raw = raw
        self._size = raw.seek(0, 2)
        raw.seek(0)
        self.error: OSError | None = None
        self.closed = False

    def read(self, n: int = -1) -> bytes:
        try:
            at = self._raw.tell()
            data = self._raw.read(n)
            wanted = self._size - at if n < 0 else min(n, max(0, self._size - at))
            if len(data) < wanted:
                raise OSError(f"a read of {wanted} bytes at {at} gave {len(data)}")
        except OSError as error:
            self.error = error
            raise
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._raw.seek(offset, whence)

    def tell(self) -> int:
        return self._raw.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def flush(self) -> None:
        """There is nothing to write."""

    def close(self) -> None:
        """The file belongs to the caller, who closes it."""


def _opened(raw: _Remembering) -> pq.ParquetFile | None:
    """The file, its footer read; None if it is no parquet file. OSError if the store fails."""
    try:
        # Buffered: otherwise a whole column of a row group, which may be gigabytes of images, is read at once.
        parquet = pq.ParquetFile(cast(Any, raw), buffer_size=READ_BYTES, pre_buffer=False)
    except (pa.ArrowException, OSError, ValueError):
        if raw.error is not None:
            raise raw.error from None
        return None
    sizes = _group_sizes(parquet)
    is_sound = min(sizes, default=0) >= 0 and sum(sizes) == parquet.metadata.num_rows <= MAX_FILE_ROWS
    return parquet if is_sound else None


def _read(
    raw: _Remembering,
    parquet: pq.ParquetFile,
    layout: Layout,
    wanted: range,
    *,
    rules: ReadRules,
    warnings: Counter[str],
) -> Iterator[Content]:
    """The samples at the rows `wanted` of the file; from where a row group is damaged, its rows are."""
    start = 0
    for group, size in enumerate(_group_sizes(parquet)):
        stop = start + size
        here = range(max(start, wanted.start), min(stop, wanted.stop))
        if len(here):
            at = start
            for batch in _batches(raw, parquet, layout, group):
                skip, keep = max(0, here.start - at), min(batch.num_rows, here.stop - at)
                if skip < keep:
                    rows = batch.slice(skip, keep - skip)
                    yield from contents(rows, layout, rules, first=at + skip, warnings=warnings)
                at += batch.num_rows
                if at >= here.stop:
                    break
            yield from (_damaged(row, "parquet:damaged") for row in range(max(at, here.start), here.stop))
        start = stop


def _batches(raw: _Remembering, parquet: pq.ParquetFile, layout: Layout, group: int) -> Iterator[pa.RecordBatch]:
    """A row group in batches of about BATCH_BYTES, up to where it is damaged. OSError if the store fails."""
    about = parquet.metadata.row_group(group)
    bytes_per_row = max(1, about.total_byte_size // max(1, about.num_rows))
    rows = max(1, min(BATCH_ROWS, BATCH_BYTES // bytes_per_row))
    try:
        yield from parquet.iter_batches(rows, row_groups=[group], columns=layout.read or None, use_threads=False)
    except (pa.ArrowException, OSError, ValueError):
        if raw.error is not None:
            raise raw.error from None


def _damaged(row: int, reason: str) -> Content:
    return Content(f"@{row}", row, None, None, {}, None, reason)


def _group_sizes(parquet: pq.ParquetFile) -> list[int]:
    return [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]


def _ranges(url: str, max_rows: int) -> list[str]:
    """The shards' URLs of one file."""
    with storage.open_read(url) as raw:
        parquet = _opened(_Remembering(raw))
        if parquet is None or parquet.metadata.num_rows <= max_rows:
            return [url]
        cuts = row_cuts(_group_sizes(parquet), max_rows)
    return [f"{url}#rows={first:010d}:{stop:010d}" for first, stop in pairwise(cuts)]


def row_cuts(group_sizes: Sequence[int], max_rows: int) -> list[int]:
    """Where to cut a file into ranges of at most `max_rows` rows: [0, ..., its rows].

    At ends of row groups, as late as can be; a row group that alone is larger is cut by itself, every `max_rows` rows.
    """
    cuts, end = [0], 0
    for size in group_sizes:
        if end + size - cuts[-1] > max_rows and end > cuts[-1]:
            cuts.append(end)
        end += size
        while end - cuts[-1] > max_rows:
            cuts.append(cuts[-1] + max_rows)
    return [*cuts, end] if end > cuts[-1] else cuts


def _check_first(url: str, rules: ReadRules) -> None:
    with storage.open_read(url) as raw:
        parquet = _opened(_Remembering(raw))
    if parquet is not None:
        check_layout(parquet.schema_arrow, rules, url=url)
