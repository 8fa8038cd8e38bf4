"""The feed of a training worker: its share of each super-batch, read, decoded and tokenised ahead by Ray Data.

Each worker has a Ray Data pipeline of its own, over one row for each step: which pieces of which shards are its share.
A pool of actors turns such a row into a block of exactly B/W rows; blocks come in order. What a step gets follows from
the pool, the seed and the step alone, so a worker that starts again at step t gets what it would have got.

Pixels travel as uint8, embeddings as float16. A sample that cannot be decoded any more is a row with ok = False. For a
learner on features no tar is opened: their column is read instead. Where candidates are scored on smaller images, those
are decoded, a JPEG at a part of its size, and the files come along for whoever trains on some of them in full.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray.data
from ray.data import ActorPoolStrategy, DataContext

from curation import addresses
from curation.data import tables
from curation.data.images import ImageError, fast_pixels, pixels
from curation.data.offered import Offering, Rounds
from curation.data.read_rules import ReadRules
from curation.data.rows import StaleTable, read_rows
from curation.models.clip import load_tokenizer
from curation.models.resize import load_fast_resize, load_resize
from curation.numerics.sampling import uid_words

STEPS_PER_WAVE = 1000
"""Steps that are planned at a time, so that a run of millions of steps holds no list of them."""

LOW_PIXELS, ENCODED, DECODE_SECONDS = "low_pixels", "encoded", "decode_seconds"

Block = dict[str, np.ndarray]
"""Columns of n rows: `address` int64, `uid` (n, 2) int64, `ok` bool, the learner's `pixels` uint8 (n, S, S, 3) or
`features` (n, F), `tokens` int64 (n, L) or `label` int64, and what FeedSpec.columns names. In place of `pixels` there
may be `low_pixels` (n, s, s, 3) and `encoded`, bytes. With either, `decode_seconds` float32: a thread's time."""


@dataclass(frozen=True)
class FeedSpec:
    """What is read for a row, and how: small values only."""

    run: str
    model: str
    pretrained: str | None
    features: str | None
    """The column that is read as `features`, in place of pixels."""
    label: str | None
    """The column that is read as `label`, in place of captions; `classes` says which number a value is."""
    classes: tuple[str, ...]
    columns: tuple[tuple[str, str], ...]
    """Columns of the run's tables that come along: each one's name there, and in the block."""
    max_pixels: int
    rules: ReadRules
    decode_threads: int
    low_size: int | None = None
    """Side of the images that candidates are scored on, if they are not the learner's own."""


class Share(NamedTuple):
    """One worker's share of a super-batch of `super_batch` rows: rank `rank` of `world_size`."""

    super_batch: int
    rank: int
    world_size: int

    def rows(self, step: int) -> tuple[int, int]:
        """The range of the stream that this share holds at `step`."""
        size = self.super_batch // self.world_size
        first = step * self.super_batch + self.rank * size
        return first, first + size


def blocks(
    spec: FeedSpec,
    shards: Sequence[Offering],
    rounds: Rounds,
    share: Share,
    *,
    steps: range,
    actors: int,
    prefetch: int,
    reader: type | None = None,
) -> Iterator[Block]:
    """The share's block of each step, in order. OSError if storage fails for good, StaleTable if a shard changed.

    `reader(spec)` reads a planned share: ReadShare, unless a benchmark puts something else in its place.
    """
    for wave in (steps[at : at + STEPS_PER_WAVE] for at in range(0, len(steps), STEPS_PER_WAVE)):
        plan = [plan_step(step, shards, rounds, share) for step in wave]
        yield from _read_wave(spec, plan, share, actors=actors, prefetch=prefetch, reader=reader or ReadShare)


def plan_step(step: int, shards: Sequence[Offering], rounds: Rounds, share: Share) -> pa.Table:
    """One row for ReadShare: which rows of which shards the share holds at a step."""
    numbers, urls, rows = [], [], []
    for piece in rounds.pieces(*share.rows(step)):
        shard = shards[piece.place]
        numbers.append(shard.number)
        urls.append(shard.url)
        rows.append(shard.row_numbers(piece.first, piece.count))
    return pa.table({"step": [step], "number": [numbers], "url": [urls], "rows": [rows]})


def _read_wave(
    spec: FeedSpec, plan: list[pa.Table], share: Share, *, actors: int, prefetch: int, reader: type
) -> Iterator[Block]:
    size = share.super_batch // share.world_size
    context = DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.target_max_block_size = None  # a block is a share, whatever its size
    with DataContext.current(context):
        data = ray.data.from_arrow(plan).map_batches(
            reader,
            fn_constructor_args=(spec,),
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=min(actors, len(plan))),
            num_cpus=1,
        )
    read: Iterator[Any] = iter(data.iter_batches(batch_size=size, batch_format="numpy", prefetch_batches=prefetch))
    for row in plan:
        step = row["step"][0].as_py()
        block = next(read, None)
        if block is None or len(block["step"]) != size or (block["step"] != step).any():
            got = "nothing" if block is None else f"{len(block['step'])} rows of step {block['step'][0]}"
            raise RuntimeError(f"the feed of rank {share.rank} gave {got} at step {step}, {size} rows were planned")
        del block["step"]
        yield block


class ReadShare:
    """Reads one planned share a call. Called by Ray Data; needs no Ray itself."""

    def __init__(self, spec: FeedSpec):
        self._spec = spec
        self._decode = None if spec.features else Decode(spec)
        self._tokenize = None if spec.label else load_tokenizer(spec.model)
        self._classes = {name: number for number, name in enumerate(spec.classes)}
        self._pool = ThreadPoolExecutor(spec.decode_threads, "decode")

    def __call__(self, planned: pa.Table) -> dict[str, np.ndarray]:
        """One planned row in, the rows of the share out."""
        [row] = planned.to_pylist()
        pieces = [
            self._read(number, url, np.asarray(rows))
            for number, url, rows in zip(row["number"], row["url"], row["rows"], strict=True)
        ]
        block = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
        return {**block, "step": np.full(len(block["address"]), row["step"])}

    def _read(self, number: int, url: str, rows: np.ndarray) -> Block:
        spec = self._spec
        text = spec.label or "caption"
        needed = list(dict.fromkeys(["uid", text, *(name for name, _ in spec.columns)]))
        if spec.features:
            columns, images = self._features(number, rows, needed)
        else:
            columns, images = self._pixels(number, url, rows, needed)
        return {
            "address": addresses.pack(number, rows),
            "uid": uid_words(columns["uid"].to_pylist()).view(np.int64),
            **images,
            **self._targets(columns[text].to_pylist()),
            **{name: tables.as_array(columns[stored], name=stored) for stored, name in spec.columns},
        }

    def _features(self, number: int, rows: np.ndarray, needed: list[str]) -> tuple[pa.Table, Block]:
        features = str(self._spec.features)
        first, last = int(rows[0]), int(rows[-1])
        names = list(dict.fromkeys([*needed, features]))
        table = tables.read(self._spec.run, number, names, rows=range(first, last + 1)).take(pa.array(rows - first))
        values = tables.as_array(table[features], name=features)
        return table, {"features": values, "ok": np.ones(len(rows), bool)}

    def _pixels(self, number: int, url: str, rows: np.ndarray, needed: list[str]) -> tuple[pa.Table, Block]:
        read = read_rows(self._spec.run, number, url, rows, needed, rules=self._spec.rules)
        assert self._decode is not None
        files = []  # those of a share are held only where they travel on

        def images() -> Iterator[bytes]:
            for row in read.images:
                if self._spec.low_size is not None:
                    files.append(row.image)
                yield row.image

        decoded = list(self._pool.map(self._decode, images()))
        block = {
            "ok": np.array([image.is_ok for image in decoded]),
            DECODE_SECONDS: np.array([image.seconds for image in decoded], np.float32),
            "pixels" if self._spec.low_size is None else LOW_PIXELS: np.stack([image.pixels for image in decoded]),
        }
        if self._spec.low_size is not None:
            block[ENCODED] = np.array(files, object)
        return read.columns, block

    def _targets(self, values: list[Any]) -> Block:
        """Labels as numbers, or captions as tokens."""
        if self._tokenize is None:
            return {"label": np.array([self._classes[str(value)] for value in values])}
        return {"tokens": self._tokenize(values).numpy()}


class Decoded(NamedTuple):
    """An image, blank if it could not be decoded, and the seconds that it took."""

    pixels: np.ndarray
    is_ok: bool
    seconds: float


class Decode:
    """From a file's bytes to pixels of the size that candidates are scored on. Safe to call from many threads."""

    def __init__(self, spec: FeedSpec):
        self._max_pixels = spec.max_pixels
        self._exact = load_resize(spec.model, pretrained=spec.pretrained, image_size=spec.low_size)
        # Only what is scored on small images may be a little off: what is trained on in full is decoded exactly.
        is_low = spec.low_size is not None
        self._fast = (
            load_fast_resize(spec.model, pretrained=spec.pretrained, image_size=spec.low_size) if is_low else None
        )

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of what comes out."""
        return self._exact.image_size

    def __call__(self, data: bytes) -> Decoded:
        begun = time.perf_counter()
        try:
            if self._fast is None:
                made = pixels(data, max_pixels=self._max_pixels, resize=self._exact)
            else:
                made = fast_pixels(data, max_pixels=self._max_pixels, fast=self._fast, exact=self._exact)
        except ImageError:
            blank = np.zeros((*self.image_size, 3), np.uint8)
            return Decoded(blank, False, time.perf_counter() - begun)
        return Decoded(made.pixels, True, time.perf_counter() - begun)


__all__ = ["Block", "Decode", "FeedSpec", "ReadShare", "Share", "StaleTable", "blocks"]
