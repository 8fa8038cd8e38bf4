"""Sample tables: one parquet file per shard, one row per sample that was begun, the dropped ones too.

A table is made from one shard alone, so its bytes do not depend on the rest of the pool. The pool's own json fields
become `json.NAME` columns typed by what this shard holds; where shards disagree, `unify` settles it on reading:
null with anything is that thing, integers with floats are floats, lists are settled by what is in them, everything else
that differs is text.

Columns that come later (features, another model's embeddings, new scores) are pieces beside the sample tables, which
never change: `columns/PIECE/SHARD.parquet` has a row for each row of `samples/SHARD.parquet`, and columns called PIECE
or PIECE.PART. `read` takes both side by side.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curation.columns import CAPTION_FROM, FORMAT_VERSION, JSON_PREFIX, sample_schema
from curation.data import storage
from curation.data.json_columns import as_text, json_column
from curation.data.manifest import shard_name

FOLDER = "samples"
MAX_JSON_COLUMNS = 4096
"""Names of json fields that a table has columns for, by first appearance in the shard."""
ROWS_PER_GROUP = 1024
"""Rows of a parquet row group: training reads some hundred neighbouring rows of a table, not all of it."""


PIECES = "columns"
PIECE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
NUMBER = r"^[+-]?(([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|(?i:inf|infinity|nan))$"
"""Text that Arrow casts to a number."""


def url_of(output: str, shard_number: int) -> str:
    """Where a shard's sample table lies."""
    return storage.join(output, FOLDER, f"{shard_name(shard_number)}.parquet")


def piece_url(output: str, piece: str, shard_number: int) -> str:
    """Where a shard's later columns of one piece lie."""
    return storage.join(output, PIECES, piece, f"{shard_name(shard_number)}.parquet")


def piece_stage(piece: str) -> str:
    """The stage under which a piece's manifests lie."""
    return f"{PIECES}.{piece}"


def piece_of(column: str) -> str:
    """The piece whose column this is, if it is none of the sample table's."""
    return column.partition(".")[0]


def check_piece_name(piece: str, *, known: Iterable[str] = ()) -> str:
    """The name itself. ValueError if it is none, or would hide a column that the sample tables have."""
    if not PIECE_NAME.fullmatch(piece) or piece in {*known, piece_of(JSON_PREFIX)}:
        raise ValueError(f"a piece's name is letters, digits, - and _, and no sample table's column, got {piece!r}")
    return piece


def sample_table(columns: dict[str, Sequence[Any] | np.ndarray], fields: Sequence[dict[str, Any]]) -> pa.Table:
    """The table of one shard: our columns, then the pool's json fields (n dicts) in order of first appearance, at most
    MAX_JSON_COLUMNS of them.

    `image_embedding` and `text_embedding` are (m, D) float16 for the m rows whose status is "ok", in row order.
    ValueError if the columns differ in length.
    """
    ok = np.asarray([status == "ok" for status in columns["status"]], dtype=bool)
    dim = np.shape(columns["image_embedding"])[1]
    schema = sample_schema(dim).with_metadata({"format_version": str(FORMAT_VERSION)})
    if CAPTION_FROM in columns:
        schema = schema.append(pa.field(CAPTION_FROM, pa.string()))
    arrays = []
    for field in schema:
        value = columns[field.name]
        if pa.types.is_fixed_size_list(field.type):
            arrays.append(spread(np.asarray(value, dtype=np.float16), ok))
        else:
            arrays.append(pa.array(value, type=field.type))
    by_name, _ = _by_name(fields)
    json_arrays = [json_column([values.get(row) for row in range(len(fields))]) for values in by_name.values()]
    json_names = [JSON_PREFIX + name for name in by_name]
    table = pa.Table.from_arrays([*arrays, *json_arrays], names=[*schema.names, *json_names])
    return table.replace_schema_metadata(schema.metadata)


def too_many_columns(fields: Sequence[dict[str, Any]]) -> dict[str, int]:
    """The warning that rows' fields are beyond the columns that a table has for them; empty if there are none."""
    _, num_rows = _by_name(fields)
    return {"json:too_many_columns": num_rows} if num_rows else {}


def _by_name(fields: Sequence[dict[str, Any]]) -> tuple[dict[str, dict[int, Any]], int]:
    """Name -> row -> value, of the first MAX_JSON_COLUMNS names, and how many rows have others. One pass: jsons with
    names of their own would make a table that grows with the square of its rows."""
    by_name: dict[str, dict[int, Any]] = {}
    num_rows = 0
    for row, given in enumerate(fields):
        for name, value in given.items():
            if name in by_name or len(by_name) < MAX_JSON_COLUMNS:
                by_name.setdefault(name, {})[row] = value
        num_rows += not given.keys() <= by_name.keys()
    return by_name, num_rows


def spread(values_M: np.ndarray, has_value: np.ndarray) -> pa.Array:
    """Values (M,) or (M, D) of the rows that have one, null elsewhere; has_value (n,) bool, M of them true."""
    if len(values_M) != has_value.sum():  # numpy would spread one value over all rows
        raise ValueError(f"{len(values_M)} values came for {has_value.sum()} rows that have one")
    whole = np.zeros((len(has_value), *values_M.shape[1:]), values_M.dtype)
    whole[has_value] = values_M
    if values_M.ndim == 1:
        return pa.array(whole, mask=~has_value)
    return pa.FixedSizeListArray.from_arrays(pa.array(whole.ravel()), values_M.shape[1], mask=pa.array(~has_value))


def as_numbers(column: pa.ChunkedArray, *, name: str) -> np.ndarray:
    """A column as float64 (n,), null and text that is no number as NaN. ValueError if all its values are no numbers."""
    numbers = _parsed(column)
    if numbers.null_count == len(column) > column.null_count:
        raise ValueError(f"column {name!r} of type {column.type} holds no numbers")
    return numbers.to_numpy(zero_copy_only=False)


def numbers_in(column: pa.ChunkedArray) -> np.ndarray:
    """A column as float64 (n,), null and all that is no number as NaN: that of one shard, where others hold numbers."""
    return _parsed(column).to_numpy(zero_copy_only=False)


def _parsed(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column as doubles, null where a value is no number. One odd value of a pool's own must not cost the others."""
    of = pa.types
    if of.is_string(column.type):
        is_number = pc.call_function("match_substring_regex", [column], pc.MatchSubstringOptions(NUMBER))
        column = pc.call_function("if_else", [is_number, column, pa.scalar(None, pa.string())])
    elif not any(is_kind(column.type) for is_kind in (of.is_integer, of.is_floating, of.is_boolean, of.is_null)):
        return pa.chunked_array([pa.nulls(len(column), pa.float64())])
    # Not `safe`, which refuses integers above 2**53 because they are rounded, as they must be to be compared.
    return column.cast(pa.float64(), safe=False)


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


def write_piece(output: str, piece: str, shard_number: int, columns: Mapping[str, pa.Array]) -> None:
    """Write a shard's later columns, a value for each row of its sample table. ValueError if a name is not PIECE's."""
    for name in columns:
        if piece_of(name) != piece:
            raise ValueError(f"columns of the piece {piece!r} are called {piece} or {piece}.PART, got {name!r}")
    table = pa.table(dict(columns)).replace_schema_metadata({"format_version": str(FORMAT_VERSION)})
    with storage.write_atomic(piece_url(output, piece, shard_number)) as file:
        pq.write_table(table, file, row_group_size=ROWS_PER_GROUP, compression="none", use_dictionary=False)


def _leaf(field: pa.Field) -> str:
    """The name by which parquet knows the values of a column: that of a list has the path to its elements."""
    path, dtype = field.name, field.type
    while pa.types.is_list(dtype):
        path, dtype = f"{path}.list.element", dtype.value_type
    return path


@contextlib.contextmanager
def _opened(url: str) -> Iterator[pq.ParquetFile]:
    """A table, opened. ValueError if its format is newer than this code."""
    with storage.open_read(url) as file:
        parquet = pq.ParquetFile(file)
        version = int((parquet.schema_arrow.metadata or {}).get(b"format_version", b"0"))
        if version > FORMAT_VERSION:
            raise ValueError(
                f"{url} has format_version {version}, this code reads up to {FORMAT_VERSION}: update curation"
            )
        yield parquet


def own_column_names(output: str, shard_number: int) -> list[str]:
    """The columns of one shard's sample table."""
    with _opened(url_of(output, shard_number)) as parquet:
        return list(parquet.schema_arrow.names)


def vector_width(output: str, shard_number: int, column: str) -> int:
    """Width F of a column of vectors. ValueError if there is no such column."""
    dtype = read(output, shard_number, [column], rows=range(1))[column].type
    if not pa.types.is_fixed_size_list(dtype):
        raise ValueError(f"column {column!r} is {dtype}, no column of vectors")
    return dtype.list_size


def column_names(output: str, shard_number: int) -> list[str]:
    """The columns of one shard's sample table, and of the pieces beside it."""
    names = own_column_names(output, shard_number)
    for piece in storage.folders_in(storage.join(output, PIECES)):
        url = piece_url(output, piece, shard_number)
        if storage.exists(url):
            with _opened(url) as parquet:
                names += parquet.schema_arrow.names
    return names


def read(
    output: str, shard_number: int, columns: Iterable[str] | None = None, *, rows: range | None = None
) -> pa.Table:
    """Columns of one shard's table (all of its own, if none are named) and of the pieces beside it.

    A named json column that the shard lacks is null. With `rows` (step 1), only those that the table has, and of the
    files only the row groups which hold them. ValueError if nobody has a column, or a piece is not of this table.
    """
    url = url_of(output, shard_number)
    with _opened(url) as parquet:
        if columns is None:
            return _rows_of(parquet, None, rows)
        wanted = list(columns)
        known = set(parquet.schema_arrow.names)
        num_rows = parquet.metadata.num_rows
        # A table without a column does not know how many rows it has.
        table = _rows_of(parquet, [name for name in wanted if name in known] or ["address"], rows)
    later = [name for name in wanted if name not in known and not name.startswith(JSON_PREFIX)]
    for piece in dict.fromkeys(map(piece_of, later)):
        names = [name for name in later if piece_of(name) == piece]
        beside = _read_piece(output, piece, shard_number, names, rows=rows, num_rows=num_rows, known=known)
        for name in names:
            table = table.append_column(name, beside[name])
    for name in wanted:
        if name not in known and name.startswith(JSON_PREFIX):
            table = table.append_column(name, pa.nulls(table.num_rows))
    return table.select(wanted)


def _read_piece(
    output: str,
    piece: str,
    shard_number: int,
    names: list[str],
    *,
    rows: range | None,
    num_rows: int,
    known: set[str],
) -> pa.Table:
    """Columns of one piece. ValueError if it lacks one of them, or does not have the sample table's rows."""
    url = piece_url(output, piece, shard_number)
    if not storage.exists(url):
        raise ValueError(f"{url_of(output, shard_number)} has no column {names[0]!r}, it has {sorted(known)}")
    with _opened(url) as parquet:
        missing = [name for name in names if name not in parquet.schema_arrow.names]
        if missing:
            raise ValueError(f"{url} has no column {missing[0]!r}, it has {parquet.schema_arrow.names}")
        if parquet.metadata.num_rows != num_rows:
            raise ValueError(f"{url} has {parquet.metadata.num_rows} rows, its sample table {num_rows}: make it anew")
        return _rows_of(parquet, names, rows)


def _rows_of(parquet: pq.ParquetFile, columns: list[str] | None, rows: range | None) -> pa.Table:
    if rows is None:
        return parquet.read(columns)
    ends = np.cumsum([parquet.metadata.row_group(index).num_rows for index in range(parquet.num_row_groups)])
    starts = ends - np.diff(ends, prepend=0)
    groups = np.flatnonzero((starts < rows.stop) & (ends > rows.start)).tolist()
    if not groups:
        return parquet.schema_arrow.empty_table().select(parquet.schema_arrow.names if columns is None else columns)
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
