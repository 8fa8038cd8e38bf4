"""Held-out pairs, small enough to stay in memory: the first so many of a pool or of a curated run."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.data import shard_list, storage, tables
from curation.data.images import ImageError, pixels
from curation.data.open_shard import open_shard
from curation.data.shards import ReadRules, Sample
from curation.models.resize import Resize

READ_THREADS = 2
ROWS_AT_A_TIME = 256


class HeldOut(NamedTuple):
    """N pairs: images (N, S, S, 3) uint8 or features (N, F), captions, labels (None where there is none), uids."""

    images: np.ndarray
    captions: list[str]
    labels: list[str | None]
    uids: list[str]
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
        num_dropped,
    )


def held_out_of_run(run: str, *, max_samples: int, features: str, label: str | None) -> HeldOut:
    """The first `max_samples` embedded samples of a curated run, by their features. ValueError if there is none."""
    columns = ["status", "caption", "uid", features, *([label] if label else [])]
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
        num_dropped,
    )


def _label(sample: Sample, field: str | None) -> str | None:
    value = None if field is None else sample.fields.get(field)
    return None if value is None else str(value)
