"""Held-out pairs, small enough to stay in memory: the first so many of a pool or of a curated run.

And how many of them the pool that is trained on holds itself: a figure on those says what was learnt by heart.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.data import shard_list, storage, tables
from curation.data.images import ImageError, pixels
from curation.data.open_shard import open_shard
from curation.data.read_rules import ReadRules
from curation.data.samples import Sample
from curation.models.resize import Resize

READ_THREADS = 2
TABLE_THREADS = 8
"""Tables that are looked through at a time: two columns of each, so a few MiB."""
ROWS_AT_A_TIME = 256


class HeldOut(NamedTuple):
    """N pairs: images (N, S, S, 3) uint8 or features (N, F), captions, labels (None where there is none), uids and
    the images' sha256 (64 hex digits)."""

    images: np.ndarray
    captions: list[str]
    labels: list[str | None]
    uids: list[str]
    sha256s: list[str]
    num_dropped: int


def read_held_out(
    patterns: str, *, max_samples: int, resize: Resize, rules: ReadRules, max_pixels: int, label_field: str | None
) -> HeldOut:
    """The first `max_samples` pairs that decode, in the order of the listing. ValueError if there is none."""

    def decode(sample: Sample) -> np.ndarray | None:
        if sample.reason is not None or sample.image is None:
            return None
        try:
            return pixels(sample.image, max_pixels=max_pixels, resize=resize).pixels
        except ImageError:
            return None

    images: list[np.ndarray] = []
    samples: list[Sample] = []
    num_dropped = 0
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for url, _ in storage.list_shards(patterns):
            with open_shard(url, rules) as shard:
                reader = iter(shard)
                while len(samples) < max_samples and (rows := list(islice(reader, ROWS_AT_A_TIME))):
                    for sample, image in zip(rows, pool.map(decode, rows), strict=True):
                        if image is None or sample.caption is None:
                            num_dropped += 1
                        elif len(samples) < max_samples:
                            images.append(image)
                            samples.append(sample)
            if len(samples) >= max_samples:
                break
    if not samples:
        raise ValueError(f"evaluate.shards: {patterns!r} holds no pair that can be read ({num_dropped} cannot)")
    return HeldOut(
        np.stack(images),
        [sample.caption or "" for sample in samples],
        [_label(sample, label_field) for sample in samples],
        [sample.uid for sample in samples],
        [sample.sha256 or "" for sample in samples],
        num_dropped,
    )


def held_out_of_run(run: str, *, max_samples: int, features: str, label: str | None) -> HeldOut:
    """The first `max_samples` embedded samples of a curated run, by their features. ValueError if there is none."""
    columns = ["status", "caption", "uid", "sha256", features, *([label] if label else [])]
    parts: list[pa.Table] = []
    num_rows = num_dropped = 0
    for shard in shard_list.load(run):
        if shard.retired or num_rows >= max_samples:
            continue
        table = tables.read(run, shard.number, columns)
        ok = table.filter(pc.field("status") == "ok")
        num_rows, num_dropped = num_rows + len(ok), num_dropped + len(table) - len(ok)
        parts.append(ok.select(columns[1:]))
    if not num_rows:
        raise ValueError(f"evaluate.run: {run} holds no embedded sample")
    pairs = pa.concat_tables(parts, promote_options="permissive").slice(0, max_samples)
    labels = pairs[label].to_pylist() if label else [None] * len(pairs)
    return HeldOut(
        tables.as_array(pairs[features], name=features),
        pairs["caption"].to_pylist(),
        [None if value is None else str(value) for value in labels],
        pairs["uid"].to_pylist(),
        [sha256 or "" for sha256 in pairs["sha256"].to_pylist()],
        num_dropped,
    )


def held_by_pool(
    uids: Sequence[str], sha256s: Sequence[str], run: str, shards: Sequence[int], *, among: Sequence[str] | None = None
) -> int:
    """How many samples are among the embedded ones of a curated run's shards: by uid, or by equal bytes.

    `among`: only those of the run with one of these uids count. An empty sha256 equals none. Streamed, a table a
    thread: memory does not grow with the pool, and no image is read.
    """
    wanted = {
        "uid": pa.array(sorted(set(uids)), pa.string()),
        "sha256": pa.array(sorted(set(sha256s) - {""}), pa.string()),
    }
    selected = None if among is None else pa.array(among, pa.string())

    def found_in(number: int) -> dict[str, set[str]]:
        table = tables.read(run, number, ["status", *wanted])
        table = table.filter(pc.field("status") == "ok")
        if selected is not None:
            table = table.filter(_is_in(table["uid"], selected))
        return {name: set(table[name].filter(_is_in(table[name], wanted[name])).to_pylist()) for name in wanted}

    found: dict[str, set[str]] = {name: set() for name in wanted}
    with ThreadPoolExecutor(TABLE_THREADS) as pool:
        for part in pool.map(found_in, shards):
            for name, values in part.items():
                found[name] |= values
    return sum(uid in found["uid"] or sha256 in found["sha256"] for uid, sha256 in zip(uids, sha256s, strict=True))


def _is_in(column: pa.ChunkedArray, values: pa.Array) -> pa.ChunkedArray:
    return pc.call_function("is_in", [column], pc.SetLookupOptions(value_set=values, skip_nulls=True))


def _label(sample: Sample, field: str | None) -> str | None:
    value = None if field is None else sample.fields.get(field)
    return None if value is None else str(value)
