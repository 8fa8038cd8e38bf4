"""The fused stage: one shard in, one committed piece out. Bytes, pixels and embeddings never leave the actor.

A reader thread streams the tar, a few threads decode and tokenise ahead, the model embeds fixed-size batches, the
shard's table is written and its manifest commits it. A batch never crosses a shard and the last one is padded, so a
piece's bytes depend on the shard alone, whatever else runs, dies or is retried.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from curation import addresses
from curation.columns import CAPTION_FROM
from curation.data import manifest, storage, tables
from curation.data.attempts import CRASHES_WORKER
from curation.data.open_shard import file_of, open_shard
from curation.data.open_shard import fingerprint as fingerprint_of
from curation.data.read_rules import ReadRules
from curation.data.samples import Sample, content_uid, shard_name
from curation.distributed.decode import FELL_BACK, Decoded, ReadAhead, SampleDecoder
from curation.distributed.energy import EnergyMeter
from curation.distributed.roster import Attempt, bench
from curation.models.clip import Precision, Towers, load_towers
from curation.numerics.contrastive import cosine

STAGE = "embed"
CALLS_AT_A_TIME = 2
AHEAD_BATCHES = 2


@dataclass(frozen=True)
class EmbedSpec:
    """What an embedding actor is told: small values only; it loads the weights itself."""

    output: str
    model: str
    pretrained: str | None
    checkpoint: str | None
    seed: int
    precision: Precision
    device: str
    resize: Literal["exact", "fast"]
    batch_size: int
    decode_threads: int
    torch_threads: int
    max_pixels: int
    staged: bool
    rules: ReadRules
    made_by: Mapping[str, Any]
    run: str = ""
    """The name under which the roster keeps this run's attempts at shards; "": nobody does."""


class Embedded(NamedTuple):
    """Of n rows: image and text embeddings (n, D) float16, scores (n,) float32, and which of its captions each row's
    text is of (n,)."""

    image_ND: np.ndarray
    text_ND: np.ndarray
    scores: np.ndarray
    choices: list[int]


class Chosen(NamedTuple):
    """Of n rows the best caption: its place among all captions (n,) and among the row's own (n,)."""

    places: torch.Tensor
    choices: list[int]


def best_captions(image_ND: torch.Tensor, text_MD: torch.Tensor, counts: Sequence[int]) -> Chosen:
    """Of each image's captions, `counts` many in a row, the one with the highest cosine; the first among equals."""
    row_of_caption = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    # A caption for which the model gave NaN is no better than any other.
    scores_M = cosine(image_ND[row_of_caption], text_MD).nan_to_num(nan=-torch.inf)
    choices = [int(own.argmax()) for own in scores_M.split(list(counts))]
    starts = torch.tensor(counts).cumsum(0) - torch.tensor(counts)
    return Chosen(starts + torch.tensor(choices), choices)


class BatchEmbedder:
    """A model that embeds rows in batches of one shape; one caller at a time."""

    def __init__(self, spec: EmbedSpec, *, towers: Towers | None = None):
        torch.set_num_threads(spec.torch_threads)
        self.towers = towers or load_towers(
            spec.model,
            pretrained=spec.pretrained,
            checkpoint=spec.checkpoint,
            seed=spec.seed,
            precision=spec.precision,
            device=spec.device,
        )
        self._meter = EnergyMeter(spec.device)
        self.batch_size = self._wanted_batch_size = spec.batch_size
        """Halved for good when the GPU runs out of memory: rows are never lost, only slower."""

    def embed(self, piece: Piece, rows: Iterator[Decoded], attempt: Attempt) -> None:
        """Take the rows into the piece, and embed those that are not dropped."""
        for batch in _batches(piece.received(rows), self._wanted_batch_size):
            begun = time.perf_counter()
            with attempt.forward():
                embedded = self._embedded(batch)
            piece.embedded(batch, embedded)
            piece.seconds["forward"] += time.perf_counter() - begun
            piece.batch_ends.append((time.time(), len(batch)))
        piece.joules = self._meter.used()

    def facts(self) -> dict[str, Any]:
        """What a piece's record says of the model."""
        return {
            "batch_size": self.batch_size,
            "logit_scale": self.towers.logit_scale,
            "logit_bias": self.towers.logit_bias,
        }

    def warnings(self) -> dict[str, int]:
        """By what factor the batches are smaller than they should be, if they are."""
        is_halved = self.batch_size < self._wanted_batch_size
        return {"gpu:batch_halved": self._wanted_batch_size // self.batch_size} if is_halved else {}

    def _embedded(self, rows: list[Decoded]) -> Embedded:
        """What the model makes of at most a batch of rows."""
        pixels = torch.from_numpy(np.stack([row.pixels for row in rows if row.pixels is not None]))
        tokens = [row.tokens for row in rows if row.tokens is not None]
        while True:
            try:
                image_ND = self._forward(self.towers.embed_images, pixels)
                text_MD = self._forward(self.towers.embed_texts, torch.cat(tokens))
                break
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
                self.batch_size = -(-self.batch_size // 2)
                torch.cuda.empty_cache()
        chosen = best_captions(image_ND, text_MD, [len(captions) for captions in tokens])
        text_ND = text_MD[chosen.places]
        scores = cosine(image_ND, text_ND).numpy()
        return Embedded(image_ND.half().numpy(), text_ND.half().numpy(), scores, chosen.choices)

    def _forward(self, tower: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
        """(n, D) float32 of inputs (n, ...), in batches of one shape."""
        size = self.batch_size
        parts = [inputs[at : at + size] for at in range(0, len(inputs), size)]
        return torch.cat([tower(_padded(part, size))[: len(part)].float().cpu() for part in parts])


class ShardEmbed:
    """Embeds and commits shards, one a call. Called by Ray Data with batches of one shard; needs no Ray itself.

    Two calls may run at a time: the model serves one shard after the other, and while it does, the next shard is read
    and decoded ahead and the last one is written, so that it never waits between shards.
    """

    def __init__(self, spec: EmbedSpec, *, towers: Towers | None = None):
        self._spec = spec
        self._embedder = BatchEmbedder(spec, towers=towers)
        towers = self._embedder.towers
        self._decode = SampleDecoder(towers.resize, towers.tokenize, how=spec.resize, max_pixels=spec.max_pixels)
        self._model = threading.Lock()
        self._bench = bench(spec.run)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        """One row (number, url, fingerprint) in, one row (record) out: the piece's account as JSON.

        A shard that the store does not give whole is not committed: its record says "pending" and why.
        """
        number, url = int(batch["number"][0]), str(batch["url"][0])
        try:
            # A worker that died between its commit and its answer is retried: what it committed is not done again.
            record = manifest.find(self._spec.output, STAGE, number, made_by=self._spec.made_by)
            record = record or self._attempt(number, url, str(batch["fingerprint"][0]))
        except OSError as error:
            record = {"shard": number, "url": url, "pending": f"{type(error).__name__}: {error}"}
        return {"record": [json.dumps(record)]}

    def _attempt(self, number: int, url: str, fingerprint: str) -> dict[str, Any]:
        with self._bench.attempt("shard", number) as attempt:
            if attempt.is_set_aside:
                return set_aside(self._spec, number, url, self._embedder)
            return self._commit(number, url, fingerprint, attempt)

    def _commit(self, number: int, url: str, fingerprint: str, attempt: Attempt) -> dict[str, Any]:
        """Embed one shard, write its table and its manifest. OSError if it cannot be read, or changed meanwhile."""
        spec = self._spec
        piece = Piece(self._embedder.towers.embedding_dim, chooses=bool(spec.rules.best_caption_of))
        ahead = AHEAD_BATCHES * spec.batch_size + spec.decode_threads
        with (
            open_shard(url, spec.rules) as reader,
            ThreadPoolExecutor(spec.decode_threads, "decode") as pool,
            ReadAhead(attempt.reading(reader), pool, noted(attempt, self._decode), ahead=ahead) as decoded,
            self._model,
        ):
            self._embedder.embed(piece, iter(decoded), attempt)
        if fingerprint_of(url) != fingerprint:
            raise OSError(f"{url} changed while it was read")

        write_begun = time.perf_counter()
        with attempt.write():
            tables.write(spec.output, number, piece.table(number, url))
        piece.seconds["write"] = time.perf_counter() - write_begun
        warnings = reader.warnings + piece.warnings() + Counter(tables.too_many_columns(piece.fields()))
        record = {
            "shard": number,
            "url": url,
            "fingerprint": fingerprint,
            "sha256": reader.sha256,
            "bytes": reader.num_bytes,
            **piece.account(),
            "warnings": dict(sorted(warnings.items())) | self._embedder.warnings(),
            **self._embedder.facts(),
            "seconds": {name: round(value, 4) for name, value in piece.seconds.items()},
            "joules": piece.joules,
        }
        manifest.commit(spec.output, STAGE, number, record, made_by=spec.made_by)
        return {**record, "batch_ends": piece.batch_ends}


def noted(attempt: Attempt, decode: Callable[[Sample], Decoded]) -> Callable[[Sample], Decoded]:
    """The decoder, each sample noted while it is decoded."""

    def decode_noted(sample: Sample) -> Decoded:
        if sample.reason is not None:  # nothing of it is decoded
            return decode(sample)
        with attempt.decode(sample.offset):
            return decode(sample)

    return decode_noted


def set_aside(spec: EmbedSpec, number: int, url: str, embedder: BatchEmbedder) -> dict[str, Any]:
    """Commit a shard that crashes workers at no known sample: one row, dropped; its record."""
    uid = content_uid(shard_name(url).encode("utf-8", "backslashreplace"), "@0", image=b"", caption="")
    sample = Sample(
        row=0, offset=0, key="@0", uid=uid, image=None, caption=None, fields={}, sha256=None, reason=CRASHES_WORKER
    )
    piece = Piece(embedder.towers.embedding_dim, chooses=bool(spec.rules.best_caption_of))
    assert next(piece.received(iter([Decoded(sample, CRASHES_WORKER)])), None) is None
    tables.write(spec.output, number, piece.table(number, url))
    record = {
        "shard": number,
        "url": url,
        "fingerprint": fingerprint_of(url),
        "sha256": storage.sha256_of(file_of(url)),
        "bytes": int(fingerprint_of(url).partition(":")[0]),
        **piece.account(),
        "warnings": {"shard:set_aside": 1},
        **embedder.facts(),
        "seconds": piece.seconds,
        "joules": piece.joules,
    }
    manifest.commit(spec.output, STAGE, number, record, made_by=spec.made_by)
    return {**record, "batch_ends": []}


class Piece:
    """A shard's table, or a part of it, in the making: a row per sample, and the embeddings of those not dropped."""

    def __init__(self, embedding_dim: int, *, chooses: bool):
        """`chooses`: samples may have several captions, and the table says where the best of them stood."""
        self._chooses = chooses
        self._rows: list[Decoded] = []
        self._reasons: list[str | None] = []
        self._captions_from: dict[int, str] = {}
        empty = np.zeros((0, embedding_dim), np.float16)
        self._images, self._texts, self._scores = [empty], [empty], [np.zeros(0, np.float32)]
        self.seconds = {"wait": 0.0, "decode": 0.0, "forward": 0.0, "write": 0.0}
        self.joules: float | None = None
        """Of the model's GPU since the piece before, waiting included; None where nothing counts them."""
        self.batch_ends: list[tuple[float, int]] = []

    def received(self, rows: Iterator[Decoded]) -> Iterator[Decoded]:
        """The rows to embed, in order; every row is noted."""
        while True:
            waited = time.perf_counter()
            row = next(rows, None)
            self.seconds["wait"] += time.perf_counter() - waited
            if row is None:
                return
            self.seconds["decode"] += row.seconds
            self._rows.append(row._replace(pixels=None, tokens=None))
            self._reasons.append(row.reason)
            if row.reason is None:
                yield row

    def embedded(self, rows: list[Decoded], made: Embedded) -> None:
        """Take the rows' embeddings, scores and captions; one for which the model gave NaN or infinity is dropped."""
        image_ND, text_ND, scores, choices = made
        finite = np.isfinite(scores) & np.isfinite(image_ND).all(1) & np.isfinite(text_ND).all(1)
        for row, is_finite, choice in zip(rows, finite, choices, strict=True):
            place = row.sample.row - self._rows[0].sample.row
            if not is_finite:
                self._reasons[place] = "embedding:not_finite"
            elif row.sample.choices:
                where, text = row.sample.choices[choice]
                self._captions_from[place] = where
                sample = dataclasses.replace(row.sample, caption=text)
                self._rows[place] = self._rows[place]._replace(sample=sample)
        self._images.append(image_ND[finite])
        self._texts.append(text_ND[finite])
        self._scores.append(scores[finite])

    def account(self) -> dict[str, Any]:
        """read = embedded + dropped(reason), checked."""
        dropped = Counter(reason for reason in self._reasons if reason is not None)
        embedded = sum(map(len, self._scores))
        if len(self._rows) != embedded + dropped.total():
            raise AssertionError(f"{len(self._rows)} rows read, {embedded} embedded, {dropped.total()} dropped")
        return {
            "read": len(self._rows),
            "embedded": embedded,
            "dropped": dict(sorted(dropped.items())),
            "decoded": sum(row.decoded for row in self._rows),
        }

    def warnings(self) -> Counter[str]:
        """What is counted of the rows besides drops."""
        return Counter({FELL_BACK: sum(row.fell_back for row in self._rows)})

    def table(self, number: int, url: str) -> pa.Table:
        """The shard's sample table."""
        return tables.sample_table(self._columns(number, url), self.fields())

    def fields(self) -> list[dict[str, Any]]:
        """The rows' json fields."""
        return [row.sample.fields for row in self._rows]

    def _chosen_from(self) -> dict[str, list[str | None]]:
        """Where each caption stood, if they are chosen: of a row that was not embedded, where its first one does."""
        if not self._chooses:
            return {}
        firsts = [row.sample.choices[0].where if row.sample.choices else None for row in self._rows]
        return {CAPTION_FROM: [self._captions_from.get(place, first) for place, first in enumerate(firsts)]}

    def part_table(self, number: int, url: str, *, fields_column: str) -> pa.Table:
        """The rows' part of the shard's sample table, with their json fields as JSON in a column of their own."""
        table = tables.sample_table(self._columns(number, url), [{}] * len(self._rows))
        texts = [json.dumps(row.sample.fields) for row in self._rows]
        return table.append_column(fields_column, pa.array(texts, pa.string()))

    def _columns(self, number: int, url: str) -> dict[str, Any]:
        scores = iter(np.concatenate(self._scores).tolist())
        rows = self._rows
        return {
            "address": addresses.pack(number, np.array([row.sample.row for row in rows], np.int64)),
            "uid": [row.sample.uid for row in rows],
            "key": [row.sample.key for row in rows],
            "shard": [url] * len(rows),
            "offset": [row.sample.offset for row in rows],
            "status": ["ok" if reason is None else "dropped" for reason in self._reasons],
            "reason": self._reasons,
            "caption": [row.sample.caption for row in rows],
            **self._chosen_from(),
            "width": [row.width for row in rows],
            "height": [row.height for row in rows],
            "sha256": [row.sample.sha256 for row in rows],
            "image_embedding": np.concatenate(self._images),
            "text_embedding": np.concatenate(self._texts),
            "clip_score": [next(scores) if reason is None else None for reason in self._reasons],
        }


def _batches(rows: Iterator[Decoded], batch_size: int) -> Iterator[list[Decoded]]:
    batch: list[Decoded] = []
    for row in rows:
        batch.append(row)
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def _padded(rows: torch.Tensor, batch_size: int) -> torch.Tensor:
    """The rows, with zero rows up to the batch size: one shape for every forward pass."""
    if len(rows) == batch_size:
        return rows
    return torch.cat([rows, rows.new_zeros(batch_size - len(rows), *rows.shape[1:])])
