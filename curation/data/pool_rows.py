"""A curated pool in memory: the rows that were embedded, their pixels, and which of them a selection holds.

For studies, whose pools are thousands of images; N rows, S pixels a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from curation.data import manifest, shard_list, storage, tables
from curation.data.images import pixels
from curation.data.read_rules import ReadRules
from curation.data.rows import read_rows
from curation.data.shard_list import Shard

DECODE_THREADS = 2
ROWS_AT_A_TIME = 512


def read_pool(run: str, columns: Sequence[str]) -> pa.Table:
    """Columns of all rows that were embedded, in order of address. ValueError if there is no such row.

    Where shards disagree on the type of one of the pool's own fields, it is settled as `tables.unify` does.
    """
    parts = []
    for shard in embedded_shards(run):
        table = tables.read(run, shard.number, list(dict.fromkeys([*columns, "status"])))
        parts.append(table.filter(pc.field("status") == "ok").select(list(columns)))
    if not any(map(len, parts)):
        raise ValueError(f"run: {run} holds no embedded sample")
    schema = tables.unify(part.schema for part in parts)
    return pa.concat_tables([tables.conform(part, schema) for part in parts])


def read_pixels(run: str, *, side: int, rules: ReadRules, max_pixels: int) -> np.ndarray:
    """The middle squares (N, S, S, 3) uint8 of the images of all rows that were embedded, in order of address.

    OSError, StaleTable or ImageError if an image that was embedded can no longer be read.
    """

    def decode(image: bytes) -> np.ndarray:
        return pixels(image, max_pixels=max_pixels, resize=lambda opened: middle_square(opened, side)).pixels

    parts: list[np.ndarray] = []
    with ThreadPoolExecutor(DECODE_THREADS) as pool:
        for shard in embedded_shards(run):
            wanted = np.flatnonzero(tables.read(run, shard.number, ["status"])["status"].to_numpy() == "ok")
            for at in range(0, len(wanted), ROWS_AT_A_TIME):
                read = read_rows(run, shard.number, shard.url, wanted[at : at + ROWS_AT_A_TIME], [], rules=rules)
                parts.append(np.stack(list(pool.map(decode, [row.image for row in read.images]))))
    return np.concatenate(parts)


def middle_square(image: Image.Image, side: int) -> np.ndarray:
    """The middle of an image (S, S, 3) uint8: the shorter side is resized to S, bicubic, and the longer one cut."""
    image = image.convert("RGB")
    scale = side / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.array(resized.crop((left, top, left + side, top + side)), dtype=np.uint8)


def selected_uids(source: str) -> list[str]:
    """The uids of a selection: a run of `jobs.curate`, its subset.npy, or a parquet file with a column `uid`.

    ValueError if it is none of these.
    """
    is_file = source.endswith((".npy", ".parquet"))
    url = source if is_file else storage.join(source, "selection", "selected.parquet")
    if not storage.exists(url):
        raise ValueError(f"{source!r} is no method, no run with a selection, and no .npy or .parquet file of uids")
    with storage.open_read(url) as file:
        if url.endswith(".npy"):
            words = np.load(file, allow_pickle=False)
            return [f"{high:016x}{low:016x}" for high, low in words.tolist()]
        return pq.read_table(file, columns=["uid"])["uid"].to_pylist()


def embedded_shards(run: str) -> list[Shard]:
    """The shards that are embedded and not retired."""
    embedded = manifest.committed(run, "embed")
    return [shard for shard in shard_list.load(run) if shard.number in embedded and not shard.retired]
