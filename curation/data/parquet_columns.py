"""Which columns of a parquet file make a sample, and its cells as the bytes, captions and fields that a tar would hold.

Names are found exactly, else in any case (LAION writes URL and TEXT). The image is a column of bytes, or a struct of
them, {"bytes", "path"}, as Hugging Face's data sets have it. Every other column becomes a field of the sample, unless
no json could hold it (bytes, tensors): then it is left out, and counted.
"""

from __future__ import annotations

import datetime
import decimal
import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from curation.data.captions import Choice, choices_of
from curation.data.read_rules import ReadRules
from curation.data.samples import Content, caption_of, is_uid, no_image_reason

CAPTION_NAMES = ("txt", "caption", "text")
KEY_NAMES = ("key", "__key__", "image_path")
"""`image_path` is what clip-retrieval calls a tar's key."""
UID_BYTES = 16


@dataclass(frozen=True)
class Layout:
    """The columns of a file by their part: names as in the file, None where there is none."""

    image: str | None
    caption: str | None
    uid: str | None
    key: str | None
    fields: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def read(self) -> list[str]:
        """The columns that are read, each once."""
        named = (self.image, self.caption, self.uid, self.key, *self.fields)
        return list(dict.fromkeys(name for name in named if name is not None))


def layout_of(schema: pa.Schema, rules: ReadRules) -> Layout:
    """The layout of a file with this schema."""
    types = {field.name: field.type for field in reversed(list(schema))}  # of two columns with one name, the first
    names = list(dict.fromkeys(schema.names))
    usual_images = ("image", *rules.image_fields, "image_bytes")
    members = tuple(name for name in rules.caption_fields if not name.startswith("json."))
    usual_captions = (rules.json_caption,) if rules.json_caption else (*members, *CAPTION_NAMES)
    found = [find_name(names, name) for name in usual_images]
    image = next((name for name in found if name is not None and _holds_bytes(types[name])), None)
    if rules.image_column is not None:
        image = find_name(names, rules.image_column)
    captions = (rules.caption_column,) if rules.caption_column is not None else usual_captions
    fields = tuple(name for name in names if name != image and _is_plain(types[name]))
    uid = find_name(names, "uid")
    return Layout(
        image=image,
        caption=_first(names, captions),
        uid=uid,
        key=_first([name for name in names if _is_text(types[name]) or pa.types.is_integer(types[name])], KEY_NAMES),
        fields=fields,
        left_out=tuple(name for name in names if name not in (image, uid, *fields)),
    )


def check_layout(schema: pa.Schema, rules: ReadRules, *, url: str) -> None:
    """ValueError if the file lacks a column that the recipe names, or has nothing that could be an image or its URL."""
    for field, name in (("caption_column", rules.caption_column), ("image_column", rules.image_column)):
        if name is not None and find_name(schema.names, name) is None:
            nearest = difflib.get_close_matches(name, schema.names, n=1, cutoff=0.0)
            hint = f", did you mean {nearest[0]!r}?" if nearest else "."
            raise ValueError(f"pool.{field}: {url} has no column {name!r}{hint} It has {schema.names}")
    layout = layout_of(schema, rules)
    if layout.image is not None and not _holds_bytes(schema.field(schema.names.index(layout.image)).type):
        dtype = schema.field(schema.names.index(layout.image)).type
        raise ValueError(
            f"pool.image_column: the column {layout.image!r} of {url} is {dtype}; wanted are encoded images as binary, "
            "or as a struct with a binary `bytes`"
        )
    if layout.image is None and find_name(schema.names, "url") is None:
        raise ValueError(
            f"{url} has no column of image bytes that is named as usual: name it with pool.image_column. "
            f"It has {schema.names}"
        )


def contents(
    batch: pa.RecordBatch, layout: Layout, rules: ReadRules, *, first: int, warnings: Counter[str]
) -> list[Content]:
    """The samples of a batch whose first row is row `first` of the file; what is odd is counted in `warnings`."""
    n = batch.num_rows
    cells = {
        name: _plain_values(_column(batch, name), rules=rules, warnings=warnings)
        for name in dict.fromkeys([*layout.fields, *filter(None, [layout.key])])
    }
    images, images_reason = _images(None if layout.image is None else _column(batch, layout.image), n)
    captions = _captions(None if layout.caption is None else _column(batch, layout.caption), n)
    uids = [None] * n if layout.uid is None else _uids(_column(batch, layout.uid), warnings=warnings)
    result = []
    for row in range(n):
        key = None if layout.key is None else cells[layout.key][row]
        fields = {name: cells[name][row] for name in layout.fields}
        image, image_reason = _checked_image(images[row], images_reason, fields, rules)
        if rules.best_caption_of:
            choices, caption_reason = _choices(fields, captions[row], rules, warnings)
            caption = choices[0].text if choices else None
        else:
            choices, (caption, caption_reason) = (), _checked_caption(captions[row], rules)
        result.append(
            Content(
                key=f"{first + row:09d}" if key is None or key == "" else str(key),
                offset=first + row,
                image=image,
                caption=caption,
                fields=_limited(fields, rules, warnings),
                uid=uids[row],
                reason=image_reason or caption_reason,
                choices=choices,
            )
        )
    return result


def find_name(names: Sequence[str], wanted: str) -> str | None:
    """The name that is `wanted`, else the first that is in another case."""
    if wanted in names:
        return wanted
    return next((name for name in names if name.lower() == wanted.lower()), None)


def _first(names: Sequence[str], wanted: Sequence[str]) -> str | None:
    found = (find_name(names, name) for name in wanted)
    return next((name for name in found if name is not None), None)


def _holds_bytes(dtype: pa.DataType) -> bool:
    if pa.types.is_dictionary(dtype):
        return _holds_bytes(dtype.value_type)
    if pa.types.is_struct(dtype):
        return dtype.get_field_index("bytes") >= 0 and _is_binary(dtype.field("bytes").type)
    return _is_binary(dtype)


def _is_binary(dtype: pa.DataType) -> bool:
    return (
        pa.types.is_binary(dtype)
        or pa.types.is_large_binary(dtype)
        or pa.types.is_binary_view(dtype)
        or pa.types.is_fixed_size_binary(dtype)
    )


def _is_text(dtype: pa.DataType) -> bool:
    return pa.types.is_string(dtype) or pa.types.is_large_string(dtype) or pa.types.is_string_view(dtype)


def _is_plain(dtype: pa.DataType) -> bool:
    """True if a json can hold the type's values. Lists of a fixed size are tensors, which are no fields."""
    if pa.types.is_dictionary(dtype) or pa.types.is_list(dtype) or pa.types.is_large_list(dtype):
        return _is_plain(dtype.value_type)
    if pa.types.is_struct(dtype):
        return all(_is_plain(field.type) for field in dtype)
    return (
        _is_text(dtype)
        or pa.types.is_null(dtype)
        or pa.types.is_boolean(dtype)
        or pa.types.is_integer(dtype)
        or pa.types.is_floating(dtype)
        or pa.types.is_decimal(dtype)
        or pa.types.is_temporal(dtype)
    )


def _column(batch: pa.RecordBatch, name: str) -> pa.Array:
    column = batch.column(batch.schema.names.index(name))
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _images(column: Any, n: int) -> tuple[list[bytes | None], str | None]:
    """Image bytes by row; and the reason why none of the column's values can be one."""
    if column is None or pa.types.is_null(column.type):
        return [None] * n, None
    if not _holds_bytes(column.type):
        return [None] * n, "image:not_bytes"
    if pa.types.is_struct(column.type):
        column = column.flatten()[column.type.get_field_index("bytes")]  # null where the struct is
    return list(column.to_pylist()), None


def _checked_image(
    image: bytes | None, columns_reason: str | None, fields: dict[str, Any], rules: ReadRules
) -> tuple[bytes | None, str | None]:
    if image is None:
        return None, columns_reason or no_image_reason(fields)
    if not image:
        return image, "image:empty"
    return (None, "image:too_large") if len(image) > rules.max_image_bytes else (image, None)


def _captions(column: pa.Array | None, n: int) -> list[bytes | bool]:
    """Captions as bytes, which need not be UTF-8; False where there is none, True where it is of another type."""
    if column is None:
        return [False] * n
    if not _is_text(column.type):
        return column.is_valid().to_pylist()
    return [False if caption is None else caption for caption in column.cast(pa.large_binary()).to_pylist()]


def _checked_caption(cell: bytes | bool, rules: ReadRules) -> tuple[str | None, str | None]:
    if isinstance(cell, bytes):
        return caption_of(cell, rules)
    return None, "caption:not_text" if cell else "caption:missing"


def _choices(
    fields: dict[str, Any], cell: bytes | bool, rules: ReadRules, warnings: Counter[str]
) -> tuple[tuple[Choice, ...], str | None]:
    """All captions of a row: json.NAME is the column NAME, any other field the caption column."""
    offered = [
        (name, fields.get(name[5:]) if name.startswith("json.") else (cell if cell is not False else None))
        for name in rules.best_caption_of
    ]
    return choices_of(offered, max_bytes=rules.max_caption_bytes, most=rules.max_captions, warnings=warnings)


def _uids(column: pa.Array, *, warnings: Counter[str]) -> list[str | None]:
    """Uids of 32 hex digits, from text or 16 bytes; None where there is none, or another thing."""
    values = [as_uid(value) for value in _values(column)]
    if malformed := sum(value is None for value in values) - column.null_count:
        warnings["uid:malformed"] += malformed
    return values


def as_uid(value: Any) -> str | None:
    """A cell as a uid, from 32 hex digits or 16 bytes; None if it is none."""
    if isinstance(value, bytes) and len(value) == UID_BYTES:
        return value.hex()
    return value.lower() if is_uid(value) else None


def _plain_values(column: pa.Array, *, rules: ReadRules, warnings: Counter[str]) -> list[Any]:
    """A column's values as a json has them; one that cannot be, or is too long a text, is None, and counted."""
    values = [_plain(value, rules.max_json_bytes) for value in _values(column)]
    lost = sum(value is None for value in values) - column.null_count
    if lost:
        warnings["parquet:value_left_out"] += lost
    return values


def _values(column: pa.Array) -> list[Any]:
    """Python values; None also for what Python cannot hold: text that is not UTF-8, a date before year 1."""
    try:
        return column.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException):
        return [_value(cell) for cell in column]


def _value(cell: pa.Scalar) -> Any:
    try:
        return cell.as_py()
    except (ValueError, OverflowError, pa.ArrowException):
        return None


def _plain(value: Any, max_bytes: int) -> Any:
    if isinstance(value, str):
        return value if len(value) <= max_bytes else None
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, list):
        return [_plain(item, max_bytes) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item, max_bytes) for name, item in value.items()}
    if isinstance(value, datetime.date | datetime.time):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    return float(value) if isinstance(value, float | decimal.Decimal) else str(value)


def _limited(fields: dict[str, Any], rules: ReadRules, warnings: Counter[str]) -> dict[str, Any]:
    if len(fields) <= rules.max_json_fields:
        return fields
    warnings["json:too_many_fields"] += 1
    return dict(list(fields.items())[: rules.max_json_fields])
