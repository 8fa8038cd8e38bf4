"""The pool's own json fields as Arrow columns: typed by what a shard holds, and text where nothing narrower fits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

INT64 = range(-(2**63), 2**63)
MAX_LIST_DEPTH = 4
"""Deeper lists are text: a parquet file with 33 levels or more can be written, and never be read again."""
TOO_DEEP = "(nested too deeply)"
SCALARS = frozenset({pa.null(), pa.bool_(), pa.int64(), pa.float64(), pa.string()})


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
