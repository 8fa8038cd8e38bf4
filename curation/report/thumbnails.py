"""Samples to look at: their row of the sample table, and a thumbnail made from the bytes in their shard, by offset.

Bytes of a pool never reach the page: an image is decoded by `data/images.py`, which trusts nothing, and encoded anew.
What cannot be shown (a source that is gone or was edited, bytes that are no image) is a placeholder that says why.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from PIL import Image

from curation.addresses import row_of, shard_of
from curation.data import images, open_shard, parquet_shards, storage, tables
from curation.data.attempts import CRASHES_WORKER
from curation.data.images import ImageError
from curation.data.read_rules import ReadRules, split_name
from curation.data.shards import read_sample_members

SIDE = 144
"""Pixels of a thumbnail's longer side: sharp enough at the 130 CSS px at which it is shown, 3 to 4 kB."""
QUALITY = 60
PAGE_FULL = "left out: the page is full"
COLUMNS = ("address", "uid", "key", "shard", "offset", "status", "reason", "caption", "width", "height", "sha256")


@dataclass(frozen=True)
class Sample:
    """A row of the sample table, ready to be shown."""

    address: int
    uid: str | None
    key: str | None
    caption: str | None
    reason: str | None
    width: int | None
    height: int | None
    scores: Mapping[str, float | None]
    unsafe: bool
    image: str | None
    """A data: URI, or None."""
    why_none: str | None
    """Why there is no image."""


def samples(
    run: str,
    addresses: Iterable[int],
    *,
    rules: ReadRules,
    max_pixels: int,
    scores: Sequence[str],
    safety: Mapping[str, float],
    max_bytes: int,
) -> dict[int, Sample]:
    """The samples at these addresses. `safety`: column -> the value above which an image is veiled; one that says what
    is no number is veiled too.

    Thumbnails come to `max_bytes` at most, each as often as its address is named, for as often the page holds it; the
    rest are placeholders. An unreadable table is an error, an unreadable shard is not.
    """
    found: dict[int, Sample] = {}
    left = max_bytes
    times = Counter(addresses)
    wanted = np.unique(np.fromiter(times, np.int64))
    for number in np.unique(shard_of(wanted)).tolist():
        here = wanted[shard_of(wanted) == number]
        known = set(tables.column_names(run, number))
        extra = [name for name in dict.fromkeys([*scores, *safety]) if name in known and name not in COLUMNS]
        for row in row_of(here).tolist():
            table = tables.read(run, number, [*COLUMNS, *extra], rows=range(row, row + 1))
            read = table.to_pylist()[0]
            image, why = _thumbnail(read, rules, max_pixels) if left > 0 else (None, PAGE_FULL)
            if len(image or "") * times[read["address"]] > left:
                image, why = None, PAGE_FULL
            left -= len(image or "") * times[read["address"]]
            found[read["address"]] = Sample(
                address=read["address"],
                uid=read["uid"],
                key=read["key"],
                caption=read["caption"],
                reason=read["reason"],
                width=read["width"],
                height=read["height"],
                scores={name: _number(read.get(name)) for name in scores},
                unsafe=any(_is_unsafe(table[name], limit) for name, limit in safety.items() if name in known),
                image=image,
                why_none=why,
            )
    return found


def check_safety_column(run: str, numbers: Sequence[int], name: str) -> None:
    """ValueError unless some table has the column, and a number in it: otherwise nothing could ever be veiled by it."""
    is_there = False
    for number in numbers:
        if name in tables.column_names(run, number):
            is_there = True
            if np.isfinite(tables.numbers_in(tables.read(run, number, [name])[name])).any():
                return
    if is_there:
        raise ValueError(f"--safety-column {name!r} holds no number in any table of {run}")
    if numbers:
        known = sorted(tables.column_names(run, numbers[0]))
        raise ValueError(f"--safety-column {name!r}: no table of {run} has such a column, they have {known}")


def _is_unsafe(value: pa.ChunkedArray, limit: float) -> bool:
    """Whether the one value of a column is above the limit, as selection reads it, or is there and is no number."""
    number = tables.numbers_in(value)[0]
    if np.isnan(number):
        return value[0].as_py() is not None and not pa.types.is_floating(value.type)  # a float that is NaN is no value
    return bool(number > limit)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and np.isfinite(value) else None


def _thumbnail(row: Mapping[str, Any], rules: ReadRules, max_pixels: int) -> tuple[str | None, str | None]:
    """A data: URI, or why there is none."""
    if row["reason"] == CRASHES_WORKER:
        return None, "not decoded: it crashes whoever does"
    try:
        with storage.open_read(open_shard.file_of(row["shard"])) as raw:
            data = _image_of(raw, row, rules)
    except FileNotFoundError:
        return None, "the shard is gone"
    except OSError as error:
        return None, f"the shard cannot be read: {type(error).__name__}"
    except ValueError:  # no whole sample begins there
        return None, row["reason"] or "the shard was edited"
    if data is None:
        return None, row["reason"] or "the shard holds no image"
    if hashlib.sha256(data).hexdigest() != row["sha256"]:
        return None, row["reason"] or "the shard was edited"
    try:
        return encode(images.open_image(data, max_pixels=max_pixels)), None
    except ImageError as error:
        return None, row["reason"] or error.reason


def _image_of(raw: BinaryIO, row: Mapping[str, Any], rules: ReadRules) -> bytes | None:
    if parquet_shards.is_parquet(row["shard"]):
        url = open_shard.file_of(row["shard"])
        return next(iter(parquet_shards.read_rows(raw, [row["offset"]], url=url, rules=rules))).image
    members = {(split_name(name) or ("", ""))[1]: data for name, data in read_sample_members(raw, row["offset"])}
    return next((members[field] for field in rules.image_fields if field in members), None)


def encode(image: Image.Image) -> str:
    """A data: URI of the image, its longer side at most SIDE; transparency stays. Nothing else of the file does."""
    has_alpha = image.mode in ("RGBA", "LA")
    small = image.convert("RGBA" if has_alpha else "RGB")
    small.thumbnail((SIDE, SIDE), Image.Resampling.BOX if max(image.size) > 8 * SIDE else Image.Resampling.LANCZOS)
    out = io.BytesIO()
    small.save(out, "WEBP", quality=QUALITY, method=4)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()
