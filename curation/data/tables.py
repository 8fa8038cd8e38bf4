"""Sample tables: one parquet file per shard, one row per sample that was begun, the dropped ones too.

A table is made from one shard alone, so its bytes do not depend on the rest of the pool. The pool's own json fields
become `json.NAME` columns typed by what this shard holds; where shards disagree, `unify` settles it on reading:
null with anything is that thing, integers with floats are floats, lists are settled by what is in them, everything else
that differs is text.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.columns import FORMAT_VERSION, JSON_PREFIX, sample_schema
from curation.data import storage
from curation.data.manifest import shard_name

FOLDER = "samples"
ROWS_PER_GROUP = 1024
"""Rows of a parquet row group: training reads some hundred neighbouring rows of a table, not all of it."""
INT64 = range(-(2**63), 2**63)
MAX_LIST_DEPTH = 4
"""Deeper lists are text: a parquet file with 33 levels or more can be written, and never be read again."""
TOO_DEEP = "(nested too deeply)"
SCALARS = frozenset({pa.null(), pa.bool_(), pa.int64(), pa.float64(), pa.string()})


def url_of(output: str, shard_number: int) -> str:
    """Where a shard's sample table lies."""
    return storage.join(output, FOLDER, f"{shard_name(shard_number)}.parquet")


def sample_table(columns: dict[str, Sequence[Any] | np.ndarray], fields: Sequence[dict[str, Any]]) -> pa.Table:
    """The table of one shard: our columns, then the pool's json fields (n dicts) in order of first appearance.

    `image_embedding` and `text_embedding` are (m, D) float16 for the m rows whose status is "ok", in row order.
    ValueError if the columns differ in length.
    """
    ok = np.asarray([status == "ok" for status in columns["status"]], dtype=bool)
    dim = np.shape(columns["image_embedding"])[1]
    schema = sample_schema(dim).with_metadata({"format_version": str(FORMAT_VERSION)})
    arrays = []
    for field in schema:
        value = columns[field.name]
        if pa.types.is_fixed_size_list(field.type):
            arrays.append(_spread(np.asarray(value, dtype=np.float16), ok))
        else:
            arrays.append(pa.array(value, type=field.type))
    names = list(dict.fromkeys(name for row in fields for name in row))
    json_arrays = [json_column([row.get(name) for row in fields]) for name in names]
    json_names = [JSON_PREFIX + name for name in names]
    table = pa.Table.from_arrays([*arrays, *json_arrays], names=[*schema.names, *json_names])
    return table.replace_schema_metadata(schema.metadata)


def _spread(embeddings_MD: np.ndarray, ok: np.ndarray) -> pa.FixedSizeListArray:
    """Embeddings of the rows that have one, null elsewhere."""
    dim = embeddings_MD.shape[1]
    if len(embeddings_MD) != ok.sum():  # numpy would spread one embedding over all rows
        raise ValueError(f"{len(embeddings_MD)} embeddings came for {ok.sum()} rows that are ok")
    whole = np.zeros((len(ok), dim), np.float16)
    whole[ok] = embeddings_MD
    return pa.FixedSizeListArray.from_arrays(pa.array(whole.ravel()), dim, mask=pa.array(~ok))


def json_column(values: Sequence[Any]) -> pa.Array:
    """One json field over the rows of a shard, as the narrowest of null, bool, int64, double, text and lists of these.

    Everything else (objects, mixed kinds, integers beyond 64 bits, lists deeper than MAX_LIST_DEPTH) is text as
    `text_of` has it.
    """
    present = [value for value in values if value is not None]
    kinds = {type(value) for value in present}
    if not present:
        return pa.nulls(len(values))
    if kinds == {bool}:
        return pa.array(values, pa.bool_())
    if kinds == {int} and all(value in INT64 for value in present):
        return pa.array(values, pa.int64())
    if kinds <= {int, float} and all(isinstance(value, float) or abs(value) <= 2**53 for value in present):
        return pa.array(values, pa.float64())
    if kinds == {list}:
        typed = _list_column(values)
        if typed is not None:
            return typed
    return pa.array([None if value is None else text_of(value) for value in values], pa.string())


def _list_column(values: Sequence[list[Any] | None]) -> pa.Array | None:
    """Lists (of lists) of one kind of scalar as an Arrow list; None if Arrow cannot hold them without a change."""
    kinds, level = set[type](), values
    for _ in range(MAX_LIST_DEPTH):
        items = [item for value in level if value is not None for item in value]
        kinds = {type(item) for item in items if item is not None}
        if kinds != {list}:
            break
        level = items
    if kinds not in (set(), {bool}, {int}, {float}, {int, float}, {str}):
        return None  # too deep, objects, or mixed: Arrow would make [1.5, true] into [1.5, 1.0]
    try:
        array = pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError, UnicodeEncodeError):
        return None
    scalar = array.type
    while pa.types.is_list(scalar):
        scalar = scalar.value_type
    return array if scalar in SCALARS and array.to_pylist() == list(values) else None


def text_of(value: Any) -> str:
    """A json value as text that utf-8 can hold: strings as they are, anything else as JSON, TOO_DEEP if nobody can."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except RecursionError:  # it was parsed on a shorter stack
        text = TOO_DEEP
    return text.encode("utf-8", "replace").decode("utf-8")


def as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Any column as strings; null stays null."""
    if pa.types.is_string(column.type):
        return column
    texts = [None if value is None else text_of(value) for value in column.to_pylist()]
    return pa.chunked_array([pa.array(texts, pa.string())])


def as_numbers(column: pa.ChunkedArray, *, name: str) -> np.ndarray:
    """A column as float64 (n,), null as NaN. ValueError if it holds text that is no number."""
    try:
        # Not `safe`, which refuses integers above 2**53 because they are rounded, as they must be to be compared.
        return column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"column {name!r} of type {column.type} holds no numbers: {error}") from error


def as_array(column: pa.ChunkedArray, *, name: str) -> np.ndarray:
    """A column as float64 (n,), or an embedding column as float16 (n, D). ValueError if a row has no embedding."""
    if not pa.types.is_fixed_size_list(column.type):
        return as_numbers(column, name=name)
    if column.null_count:
        raise ValueError(f"column {name!r} is null in {column.null_count} rows: choose those whose status is 'ok'")
    return column.combine_chunks().flatten().to_numpy().reshape(len(column), column.type.list_size)


def write(output: str, shard_number: int, table: pa.Table) -> None:
    """Write a shard's sample table, whole. Embeddings are stored plain: float16 noise does not compress."""
    packed = [_leaf(field) for field in table.schema if not pa.types.is_fixed_size_list(field.type)]
    with storage.write_atomic(url_of(output, shard_number)) as file:
        settings: dict[str, Any] = {"compression": dict.fromkeys(packed, "zstd"), "use_dictionary": packed}
        pq.write_table(table, file, row_group_size=ROWS_PER_GROUP, **settings)


def _leaf(field: pa.Field) -> str:
    """The name by which parquet knows the values of a column: that of a list has the path to its elements."""
    path, dtype = field.name, field.type
    while pa.types.is_list(dtype):
        path, dtype = f"{path}.list.element", dtype.value_type
    return path


@contextlib.contextmanager
def _opened(output: str, shard_number: int) -> Iterator[pq.ParquetFile]:
    """A shard's table, opened. ValueError if its format is newer than this code."""
    with storage.open_read(url_of(output, shard_number)) as file:
        parquet = pq.ParquetFile(file)
        version = int((parquet.schema_arrow.metadata or {}).get(b"format_version", b"0"))
        if version > FORMAT_VERSION:
            raise ValueError(
                f"{url_of(output, shard_number)} has format_version {version}, "
                f"this code reads up to {FORMAT_VERSION}: update curation"
            )
        yield parquet


def column_names(output: str, shard_number: int) -> list[str]:
    """The columns of one shard's table."""
    with _opened(output, shard_number) as parquet:
        return parquet.schema_arrow.names


def read(
    output: str, shard_number: int, columns: Iterable[str] | None = None, *, rows: range | None = None
) -> pa.Table:
    """Columns of one shard's table (all, if none are named); a named json column that the shard lacks is null.

    With `rows` (step 1), only those that the table has, and of the file only the row groups which hold them.
    """
    with _opened(output, shard_number) as parquet:
        if columns is None:
            return _rows_of(parquet, None, rows)
        wanted = list(columns)
        known = set(parquet.schema_arrow.names)
        unknown = [name for name in wanted if name not in known and not name.startswith(JSON_PREFIX)]
        if unknown:
            raise ValueError(f"{url_of(output, shard_number)} has no column {unknown[0]!r}, it has {sorted(known)}")
        table = _rows_of(parquet, [name for name in wanted if name in known], rows)
        for name in wanted:
            if name not in known:
                table = table.append_column(name, pa.nulls(table.num_rows))
        return table.select(wanted)


def _rows_of(parquet: pq.ParquetFile, columns: list[str] | None, rows: range | None) -> pa.Table:
    if rows is None:
        return parquet.read(columns)
    ends = np.cumsum([parquet.metadata.row_group(index).num_rows for index in range(parquet.num_row_groups)])
    starts = ends - np.diff(ends, prepend=0)
    groups = np.flatnonzero((starts < rows.stop) & (ends > rows.start)).tolist()
    if not groups:
        return parquet.schema_arrow.empty_table().select(columns or parquet.schema_arrow.names)
    table = parquet.read_row_groups(groups, columns)
    return table.slice(rows.start - starts[groups[0]], len(rows))


class Rechunk:
    """Tables of any length in, tables of `num_rows` rows out, and a last one of what is left."""

    def __init__(self, num_rows: int):
        if num_rows < 1:
            raise ValueError(f"num_rows must be at least 1, got {num_rows}")
        self._num_rows = num_rows
        self._waiting: list[pa.Table] = []

    def add(self, table: pa.Table) -> Iterator[pa.Table]:
        """The whole tables that `table` completes. It is taken in at once, also if nobody iterates."""
        self._waiting.append(table)
        num_whole = sum(part.num_rows for part in self._waiting) // self._num_rows
        if not num_whole:
            return iter([])
        rows = pa.concat_tables(self._waiting)
        self._waiting = [rows.slice(num_whole * self._num_rows)]
        return iter([rows.slice(index * self._num_rows, self._num_rows) for index in range(num_whole)])

    def rest(self) -> Iterator[pa.Table]:
        """What is left, if anything is."""
        rest = [part for part in self._waiting if part.num_rows]
        self._waiting = []
        return iter([pa.concat_tables(rest)] if rest else [])


def rechunked(parts: Iterable[pa.Table], num_rows: int) -> Iterator[pa.Table]:
    """The rows of `parts` in tables of `num_rows`, the last one shorter."""
    chunks = Rechunk(num_rows)
    for part in parts:
        yield from chunks.add(part)
    yield from chunks.rest()


def unify(schemas: Iterable[pa.Schema]) -> pa.Schema:
    """One schema that all the tables can be cast to by `conform`. ValueError if a column of ours has two types."""
    merged: dict[str, pa.DataType] = {}
    for schema in schemas:
        for field in schema:
            known = merged.get(field.name, field.type)
            if field.type != known and not field.name.startswith(JSON_PREFIX):
                raise ValueError(f"column {field.name!r} is {known} in one table and {field.type} in another")
            merged[field.name] = _common_type(known, field.type)
    return pa.schema(list(merged.items()))


def _common_type(a: pa.DataType, b: pa.DataType) -> pa.DataType:
    if a == b or pa.types.is_null(b):
        return a
    if pa.types.is_null(a):
        return b
    if {a, b} == {pa.int64(), pa.float64()}:
        return pa.float64()
    if pa.types.is_list(a) and pa.types.is_list(b):
        inner = _common_type(a.value_type, b.value_type)
        if inner != pa.string() or {a.value_type, b.value_type} <= {pa.string(), pa.null()}:
            return pa.list_(inner)
    return pa.string()


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with the columns and types of a unified schema; columns that it lacks are null.

    Integers above 2**53 are rounded where another shard made floats of their column.
    """
    arrays = []
    for field in schema:
        column = table[field.name] if field.name in table.column_names else pa.nulls(table.num_rows)
        if column.type == field.type:
            arrays.append(column)
        elif pa.types.is_string(field.type):
            arrays.append(as_text(column))
        else:
            arrays.append(column.cast(field.type, safe=False))
    return pa.Table.from_arrays(arrays, schema=schema)


def read_unified(output: str, shard_numbers: Sequence[int], columns: Iterable[str] | None = None) -> pa.Table:
    """Several shards' tables as one, in memory; json columns whose types differ between shards are settled."""
    names = None if columns is None else list(columns)
    parts = [read(output, number, names) for number in shard_numbers]
    schema = unify(part.schema for part in parts)
    return pa.concat_tables([schema.empty_table(), *(conform(part, schema) for part in parts)])
