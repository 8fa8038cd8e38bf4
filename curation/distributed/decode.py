"""What is done to a sample before the model: read, decoded, tokenised, in threads that run ahead of whoever takes it.

The embedding actor does it for itself (fused mode), a CPU task does it for the actor (staged mode).
"""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, NamedTuple

import numpy as np
import torch

from curation.data.images import ImageError, Pixels, fast_pixels, pixels
from curation.data.samples import Sample
from curation.models.resize import FastResize, Resize

FELL_BACK = "image:not_plain_jpeg"


class Decoded(NamedTuple):
    """A sample without its image bytes: pixels (H, W, 3) uint8 and tokens (M, L) of its captions, unless it is dropped
    for `reason`. M is 1, or as many as its choices."""

    sample: Sample
    reason: str | None
    pixels: np.ndarray | None = None
    tokens: torch.Tensor | None = None
    width: int | None = None
    height: int | None = None
    seconds: float = 0.0
    decoded: bool = False
    """True if its image was decoded, or an attempt was made."""
    fell_back: bool = False
    """True if it was no plain JPEG, and so had to be resized exactly where fast was wanted."""


class SampleDecoder:
    """Decodes and tokenises samples, one a call; safe to call from threads.

    ValueError if `how` is fast and the model's transform is none that the fast resize knows.
    """

    def __init__(
        self,
        resize: Resize,
        tokenize: Callable[[list[str]], torch.Tensor],
        *,
        how: Literal["exact", "fast"],
        max_pixels: int,
    ) -> None:
        self._exact, self._tokenize, self._max_pixels = resize, tokenize, max_pixels
        self._fast = FastResize(resize.preprocess) if how == "fast" else None

    def __call__(self, sample: Sample) -> Decoded:
        begun = time.perf_counter()
        bare = dataclasses.replace(sample, image=None)
        if sample.reason is not None or sample.image is None or sample.caption is None:
            return Decoded(bare, sample.reason)
        try:
            image = self._pixels(sample.image)
        except ImageError as error:
            size = error.width, error.height
            return Decoded(bare, error.reason, None, None, *size, time.perf_counter() - begun, decoded=True)
        tokens = self._tokenize([choice.text for choice in sample.choices] or [sample.caption])
        seconds = time.perf_counter() - begun
        return Decoded(bare, None, image.pixels, tokens, image.width, image.height, seconds, True, image.fell_back)

    def _pixels(self, data: bytes) -> Pixels:
        if self._fast is None:
            return pixels(data, max_pixels=self._max_pixels, resize=self._exact)
        return fast_pixels(data, max_pixels=self._max_pixels, fast=self._fast, exact=self._exact)


class ReadAhead:
    """Iterates over a reader's samples, decoded and in order; at most `ahead` are read, decoded and waiting at a time.

    Reading runs in a thread of its own from entering the `with` block on; its error is raised from the iteration.
    """

    def __init__(
        self, reader: Iterable[Sample], pool: ThreadPoolExecutor, decode: Callable[[Sample], Decoded], *, ahead: int
    ):
        self._reader, self._pool, self._decode = reader, pool, decode
        self._waiting: queue.Queue[Future[Decoded] | BaseException | None] = queue.Queue(maxsize=ahead)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._read, name="read", daemon=True)

    def __enter__(self) -> ReadAhead:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def __iter__(self) -> Iterator[Decoded]:
        while (item := self._waiting.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item.result()

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
