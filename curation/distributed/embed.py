"""The fused stage: one shard in, one committed piece out. Bytes, pixels and embeddings never leave the actor.

A reader thread streams the tar, a few threads decode and tokenise ahead, the model embeds fixed-size batches, the
shard's table is written and its manifest commits it. A batch never crosses a shard and the last one is padded, so a
piece's bytes depend on the shard alone, whatever else runs, dies or is retried.
"""

from __future__ import annotations

import dataclasses
import json
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from curation import addresses
from curation.data import manifest, tables
from curation.data.images import ImageError, pixels
from curation.data.open_shard import fingerprint as fingerprint_of
from curation.data.open_shard import open_shard
from curation.data.shards import ReadRules, Sample
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
    batch_size: int
    decode_threads: int
    torch_threads: int
    max_pixels: int
    rules: ReadRules
    made_by: Mapping[str, Any]


class Decoded(NamedTuple):
    """A sample without its image bytes: pixels (H, W, 3) uint8 and tokens (L,), unless it is dropped for `reason`."""

    sample: Sample
    reason: str | None
    pixels: np.ndarray | None = None
    tokens: torch.Tensor | None = None
    width: int | None = None
    height: int | None = None
    seconds: float = 0.0
    decoded: bool = False
    """True if its image was decoded, or an attempt was made."""


class ShardEmbed:
    """Embeds and commits shards, one a call. Called by Ray Data with batches of one shard; needs no Ray itself.

    Two calls may run at a time: the model serves one shard after the other, and while it does, the next shard is read
    and decoded ahead and the last one is written, so that it never waits between shards.
    """

    def __init__(self, spec: EmbedSpec, *, towers: Towers | None = None):
        torch.set_num_threads(spec.torch_threads)
        self._spec = spec
        self._towers = towers or load_towers(
            spec.model,
            pretrained=spec.pretrained,
            checkpoint=spec.checkpoint,
            seed=spec.seed,
            precision=spec.precision,
            device=spec.device,
        )
        self._batch_size = spec.batch_size
        self._model = threading.Lock()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        """One row (number, url, fingerprint) in, one row (record) out: the piece's account as JSON.

        A shard that the store does not give whole is not committed: its record says "pending" and why.
        """
        number, url = int(batch["number"][0]), str(batch["url"][0])
        try:
            # A worker that died between its commit and its answer is retried: what it committed is not done again.
            record = manifest.find(self._spec.output, STAGE, number, made_by=self._spec.made_by)
            record = record or self.commit(number, url, str(batch["fingerprint"][0]))
        except OSError as error:
            record = {"shard": number, "url": url, "pending": f"{type(error).__name__}: {error}"}
        return {"record": [json.dumps(record)]}

    def commit(self, number: int, url: str, fingerprint: str) -> dict[str, Any]:
        """Embed one shard, write its table and its manifest. OSError if it cannot be read, or changed meanwhile."""
        spec = self._spec
        piece = _Piece(self._towers.embedding_dim)
        ahead = AHEAD_BATCHES * spec.batch_size + spec.decode_threads
        with (
            open_shard(url, spec.rules) as reader,
            ThreadPoolExecutor(spec.decode_threads, "decode") as pool,
            _ReadAhead(reader, pool, self._decode, ahead=ahead) as decoded,
            self._model,
        ):
            for rows in _batches(piece.received(iter(decoded)), spec.batch_size):
                forward_begun = time.perf_counter()
                piece.embedded(rows, *self._embed(rows))
                piece.seconds["forward"] += time.perf_counter() - forward_begun
                piece.batch_ends.append((time.time(), len(rows)))
        if fingerprint_of(url) != fingerprint:
            raise OSError(f"{url} changed while it was read")

        write_begun = time.perf_counter()
        tables.write(spec.output, number, piece.table(number, url))
        piece.seconds["write"] = time.perf_counter() - write_begun
        record = {
            "shard": number,
            "url": url,
            "fingerprint": fingerprint,
            "sha256": reader.sha256,
            "bytes": reader.num_bytes,
            **piece.account(),
            "warnings": dict(sorted(reader.warnings.items())),
            "batch_size": self._batch_size,
            "logit_scale": self._towers.logit_scale,
            "logit_bias": self._towers.logit_bias,
            "seconds": {name: round(value, 4) for name, value in piece.seconds.items()},
        }
        if self._batch_size < spec.batch_size:
            record["warnings"]["gpu:batch_halved"] = spec.batch_size // self._batch_size
        manifest.commit(spec.output, STAGE, number, record, made_by=spec.made_by)
        return {**record, "batch_ends": piece.batch_ends}

    def _decode(self, sample: Sample) -> Decoded:
        begun = time.perf_counter()
        bare = dataclasses.replace(sample, image=None)
        if sample.reason is not None or sample.image is None or sample.caption is None:
            return Decoded(bare, sample.reason)
        try:
            decoded = pixels(sample.image, max_pixels=self._spec.max_pixels, resize=self._towers.resize)
        except ImageError as error:
            size = error.width, error.height
            return Decoded(bare, error.reason, None, None, *size, time.perf_counter() - begun, decoded=True)
        tokens = self._towers.tokenize([sample.caption])[0]
        return Decoded(
            bare, None, decoded.pixels, tokens, decoded.width, decoded.height, time.perf_counter() - begun, True
        )

    def _embed(self, rows: list[Decoded]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Image and text embeddings (n, D) float16 and scores (n,) float32 of at most `batch_size` rows.

        Out of GPU memory, the batch is halved for good: rows are never lost, only slower.
        """
        pixels = torch.from_numpy(np.stack([row.pixels for row in rows if row.pixels is not None]))
        tokens = torch.stack([row.tokens for row in rows if row.tokens is not None])
        while True:
            try:
                parts = [
                    self._forward(pixels[at : at + self._batch_size], tokens[at : at + self._batch_size])
                    for at in range(0, len(rows), self._batch_size)
                ]
                break
            except torch.OutOfMemoryError:
                if self._batch_size == 1:
                    raise
                self._batch_size = -(-self._batch_size // 2)
                torch.cuda.empty_cache()
        image_ND, text_ND = (torch.cat(column) for column in zip(*parts, strict=True))
        return image_ND.half().numpy(), text_ND.half().numpy(), cosine(image_ND, text_ND).numpy()

    def _forward(self, pixels: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        n = len(pixels)
        image_ND = self._towers.embed_images(_padded(pixels, self._batch_size))[:n]
        text_ND = self._towers.embed_texts(_padded(tokens, self._batch_size))[:n]
        return image_ND.float().cpu(), text_ND.float().cpu()


class _Piece:
    """A shard's table in the making: one row per sample, and the embeddings of those that were not dropped."""

    def __init__(self, embedding_dim: int):
        self._rows: list[Decoded] = []
        self._reasons: list[str | None] = []
        empty = np.zeros((0, embedding_dim), np.float16)
        self._images, self._texts, self._scores = [empty], [empty], [np.zeros(0, np.float32)]
        self.seconds = {"wait": 0.0, "decode": 0.0, "forward": 0.0, "write": 0.0}
        self.batch_ends: list[tuple[float, int]] = []

    def received(self, decoded: Iterator[Future[Decoded]]) -> Iterator[Decoded]:
        """The rows to embed, in order; every row is noted."""
        while True:
            waited = time.perf_counter()
            future = next(decoded, None)
            row = future.result() if future else None
            self.seconds["wait"] += time.perf_counter() - waited
            if row is None:
                return
            self.seconds["decode"] += row.seconds
            self._rows.append(row._replace(pixels=None, tokens=None))
            self._reasons.append(row.reason)
            if row.reason is None:
                yield row

    def embedded(self, rows: list[Decoded], image_ND: np.ndarray, text_ND: np.ndarray, scores: np.ndarray) -> None:
        """Take the rows' embeddings and scores; a row for which the model gave NaN or infinity is dropped."""
        finite = np.isfinite(scores) & np.isfinite(image_ND).all(1) & np.isfinite(text_ND).all(1)
        for row, is_finite in zip(rows, finite, strict=True):
            if not is_finite:
                self._reasons[row.sample.row] = "embedding:not_finite"
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

    def table(self, number: int, url: str) -> Any:
        """The shard's sample table."""
        scores = iter(np.concatenate(self._scores).tolist())
        rows = self._rows
        columns = {
            "address": addresses.pack(number, np.arange(len(rows))),
            "uid": [row.sample.uid for row in rows],
            "key": [row.sample.key for row in rows],
            "shard": [url] * len(rows),
            "offset": [row.sample.offset for row in rows],
            "status": ["ok" if reason is None else "dropped" for reason in self._reasons],
            "reason": self._reasons,
            "caption": [row.sample.caption for row in rows],
            "width": [row.width for row in rows],
            "height": [row.height for row in rows],
            "sha256": [row.sample.sha256 for row in rows],
            "image_embedding": np.concatenate(self._images),
            "text_embedding": np.concatenate(self._texts),
            "clip_score": [next(scores) if reason is None else None for reason in self._reasons],
        }
        return tables.sample_table(columns, [row.sample.fields for row in rows])


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


class _ReadAhead:
    """Iterates over futures of a reader's samples, in order; at most `ahead` are read, decoded and waiting at a time.

    Reading runs in a thread of its own from entering the `with` block on; its error is raised from the iteration.
    """

    def __init__(
        self, reader: Iterable[Sample], pool: ThreadPoolExecutor, decode: Callable[[Sample], Decoded], *, ahead: int
    ):
        self._reader, self._pool, self._decode = reader, pool, decode
        self._waiting: queue.Queue[Future[Decoded] | BaseException | None] = queue.Queue(maxsize=ahead)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._read, name="read", daemon=True)

    def __enter__(self) -> _ReadAhead:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def __iter__(self) -> Iterator[Future[Decoded]]:
        while (item := self._waiting.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def _read(self) -> None:
        try:
            for sample in self._reader:
                if not self._put(self._pool.submit(self._decode, sample)):
                    return
            self._put(None)
        except BaseException as error:  # handed over whole: the caller's thread raises it
            self._put(error)

    def _put(self, item: Future[Decoded] | BaseException | None) -> bool:
        while not self._stopped.is_set():
            try:
                self._waiting.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False
