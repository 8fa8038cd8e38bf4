"""Held-out pairs, small enough to stay in memory: the first so many of a pool that can be read."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np

from curation.data import storage
from curation.data.images import ImageError, pixels
from curation.data.shards import ReadRules, Sample, ShardReader
from curation.models.clip import Resize

READ_THREADS = 2
ROWS_AT_A_TIME = 256


class HeldOut(NamedTuple):
    """N pairs: pixels uint8 (N, S, S, 3), captions, labels (None where there is none), and the uids that they bear."""

    pixels: np.ndarray
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
            with storage.open_read(url) as raw:
                reader = iter(ShardReader(raw, url=url, rules=rules))
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


def _label(sample: Sample, field: str | None) -> str | None:
    value = None if field is None else sample.fields.get(field)
    return None if value is None else str(value)
