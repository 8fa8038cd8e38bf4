"""Select before you decode: images of the chosen rows in full, decoded once it is known which rows those are."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from curation.distributed.feed import Decode, FeedSpec
from curation.training.picking import InFull


class LateDecode:
    """Decodes some of a block's files at the learner's own size, and keeps the account of what that saved."""

    def __init__(self, spec: FeedSpec):
        self._decode = Decode(dataclasses.replace(spec, low_size=None))
        self._pool = ThreadPoolExecutor(spec.decode_threads, "late-decode")
        self.seconds = 0.0
        """Threads' seconds for the last block."""
        self.num_decoded = 0
        """How many of its images were decoded in full."""

    def of(self, encoded_n: np.ndarray, low_pixels: Tensor) -> InFull:
        """Images in full of a block whose files are `encoded_n`, by their places.

        A file that could be decoded small and cannot be in full is its small image, enlarged: it was chosen by that.
        """
        self.seconds, self.num_decoded = 0.0, 0

        def in_full(places: Tensor) -> Tensor:
            decoded = list(self._pool.map(self._decode, encoded_n[places.numpy()]))
            self.seconds += sum(image.seconds for image in decoded)
            self.num_decoded += len(decoded)
            if not decoded:
                height, width = self._decode.image_size
                return torch.zeros(0, height, width, 3, dtype=torch.uint8)
            images = [
                torch.from_numpy(image.pixels) if image.is_ok else self._enlarged(low_pixels[int(place)])
                for place, image in zip(places, decoded, strict=True)
            ]
            return torch.stack(images)

        return in_full

    def saved(self, *, num_rows: int, low_seconds: float) -> float:
        """Threads' seconds less than if all rows of the block had been decoded in full, at this block's mean cost."""
        if not self.num_decoded:
            return 0.0
        return self.seconds / self.num_decoded * num_rows - self.seconds - low_seconds

    def _enlarged(self, low: Tensor) -> Tensor:
        image = low.permute(2, 0, 1)[None].float()
        return F.interpolate(image, self._decode.image_size, mode="bilinear")[0].permute(1, 2, 0).to(torch.uint8)
