"""A sample of a rated run: percentiles of the rating, the images' bytes, and what of an image a rating may go with.

The rows of the lowest hash of the uid, so the same ones for any order of shards. For pictures and tables, whose rows
are thousands; N of them.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from curation.addresses import row_of, shard_of
from curation.data import manifest, shard_list, tables
from curation.data.images import ImageError, pixels
from curation.data.read_rules import ReadRules
from curation.data.rows import read_rows
from curation.numerics.picture import edge_density
from curation.numerics.sampling import tie_hash, uid_words

FACTS = ("file_bytes", "png_bytes", "edge_density", "luminance")
FACT_SIDE = 128
"""Pixels to which a longer side is shrunk before edges, luminance and the size as a PNG are taken."""


class RatedImages(NamedTuple):
    """Percentiles (N,), 0 for the highest rating; facts (N, 4) as in FACTS; small images (N, S, S, 3) uint8."""

    addresses: np.ndarray
    percentile: np.ndarray
    facts: np.ndarray
    images: np.ndarray
    num_dropped: int
    """Rows of the sample whose image could no longer be decoded."""


def rated_images(run: str, column: str, *, limit: int, side: int, rules: ReadRules, max_pixels: int) -> RatedImages:
    """At most `limit` rows that have a percentile. ValueError if there is none."""
    embedded = manifest.committed(run, "embed")
    shards = {s.number: s.url for s in shard_list.load(run) if s.number in embedded and not s.retired}
    whole = _lowest(run, list(shards), column, limit)
    if not len(whole):
        raise ValueError(f"run: {run} has no row with a value in {column!r}")
    where = whole["address"].to_numpy()
    found: list[tuple[int, float, np.ndarray, np.ndarray]] = []
    for number in np.unique(shard_of(where)).tolist():
        here = whole.filter(pa.array(shard_of(where) == number)).sort_by("address")
        rows = row_of(here["address"].to_numpy())
        for row, (address, percentile) in zip(rows, _pairs(here, column), strict=True):
            # One at a time: the sample is thin, and neighbouring rows would be read for nothing.
            [read] = read_rows(run, number, shards[number], np.array([row]), [], rules=rules).images
            try:
                image = pixels(read.image, max_pixels=max_pixels, resize=lambda opened: _square(opened, side)).pixels
                facts = pixels(read.image, max_pixels=max_pixels, resize=_facts_of).pixels
            except ImageError:
                continue
            found.append((address, percentile, np.array([len(read.image), *facts]), image))
    if not found:
        raise ValueError(f"run: {run}: no image of the sample can be decoded any more")
    address, percentile, facts, images = zip(*found, strict=True)
    return RatedImages(
        np.array(address), np.array(percentile), np.stack(facts), np.stack(images), len(whole) - len(found)
    )


def _pairs(table: pa.Table, column: str) -> Iterator[tuple[int, float]]:
    return zip(table["address"].to_pylist(), table[column].to_pylist(), strict=True)


def _lowest(run: str, numbers: list[int], column: str, limit: int) -> pa.Table:
    whole, ties = pa.table({"address": pa.array([], pa.int64()), column: pa.array([], pa.float32())}), np.zeros(0, "u8")
    for number in numbers:
        table = tables.read(run, number, ["address", "uid", "status", column])
        table = table.filter((pc.field("status") == "ok") & pc.field(column).is_valid())
        ties = np.append(ties, tie_hash(uid_words(table["uid"].to_pylist())))
        whole = pa.concat_tables([whole, table.select(["address", column]).cast(whole.schema)])
        order = np.argsort(ties, kind="stable")[:limit]
        whole, ties = whole.take(pa.array(order)), ties[order]
    return whole


def _square(image: Image.Image, side: int) -> np.ndarray:
    """The whole image on a grey square."""
    image = image.convert("RGB")
    image.thumbnail((side, side))
    sheet = Image.new("RGB", (side, side), (128, 128, 128))
    sheet.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(sheet)


def _facts_of(image: Image.Image) -> np.ndarray:
    """Bytes as a PNG, edge density and mean luminance in [0, 1], of the image shrunk to 128 pixels."""
    small = image.convert("RGB")
    small.thumbnail((FACT_SIDE, FACT_SIDE))
    out = io.BytesIO()
    small.save(out, "PNG")
    grey = np.asarray(small.convert("L"))
    return np.array([out.tell(), edge_density(grey), grey.mean() / 255])
