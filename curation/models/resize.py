"""Image in, a model's pixels out: what of its inference transform is done per image, on a CPU, before any batch.

n images, S_h x S_w pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip.transform import MaybeToTensor, PreprocessCfg, image_transform_v2
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms import Compose

from curation.models.registry import height_width, preprocess_of


class Resize:
    """A model's inference transform up to, but without, ToTensor: PIL image of any mode -> uint8 (S_h, S_w, 3), RGB.

    Picklable, holds no weights, safe to call from many threads.
    """

    def __init__(self, preprocess: PreprocessCfg) -> None:
        steps = cast(Compose, image_transform_v2(preprocess, is_train=False)).transforms
        cut = next(i for i, step in enumerate(steps) if isinstance(step, MaybeToTensor))
        self.preprocess = preprocess
        self.image_size: tuple[int, int] = height_width(preprocess.size)
        self._steps: list[Callable[[Image.Image], Image.Image]] = steps[:cut]

    def __call__(self, image: Image.Image) -> NDArray[np.uint8]:
        for step in self._steps:
            image = step(image)
        return np.array(image, dtype=np.uint8)


class FastResize:
    """The same transform for a JPEG that was decoded at a part of its size: uint8 (h, w, 3) -> uint8 (S_h, S_w, 3).

    The DCT scaling was the area filter; what is left of it, a ratio of 1 to 2, is resampled with the transform's own
    filter by torch's uint8 kernel. Next to open_clip's pixels that gives 43 dB where a box filter gives 31 dB, in a
    quarter of Pillow's time. Geometry is the exact transform's: same size, same crop.

    ValueError for a transform that pads (`resize_mode` longest) or keeps the ratio for a model that is not square.
    """

    def __init__(self, preprocess: PreprocessCfg) -> None:
        self._size = height_width(preprocess.size)
        self._squash = preprocess.resize_mode == "squash"
        if not self._squash and (preprocess.resize_mode != "shortest" or self._size[0] != self._size[1]):
            raise ValueError(
                "resize 'fast' knows transforms that squash, or crop to a square; this model's has resize_mode "
                f"{preprocess.resize_mode!r} and size {self._size}: use 'exact'"
            )
        self._mode = "bilinear" if preprocess.interpolation == "bilinear" else "bicubic"
        self.min_size: tuple[int, int] = self._size

    def __call__(self, pixels: NDArray[np.uint8], *, height: int, width: int) -> NDArray[np.uint8]:
        # In this order of axes torch sees that the channels come last, and takes its fast path.
        image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
        resized = F.interpolate(image, self._whole_size(height, width), mode=self._mode, antialias=True)
        return self._cropped(resized[0].permute(1, 2, 0).numpy())

    def _whole_size(self, height: int, width: int) -> tuple[int, int]:
        """What the whole image is resized to: torchvision's rule for the shortest side, by the size as stored."""
        if self._squash:
            return self._size
        side = self._size[0]
        return (side, int(side * width / height)) if height <= width else (int(side * height / width), side)

    def _cropped(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The centre, as torchvision's CenterCrop cuts it."""
        top, left = (round((have - want) / 2.0) for have, want in zip(pixels.shape[:2], self._size, strict=True))
        return pixels[top : top + self._size[0], left : left + self._size[1]]


def load_resize(name: str, *, pretrained: str | None = None, image_size: int | None = None) -> Resize:
    """The same `resize` as the towers', without building the model: for tasks that only decode.

    With `image_size` its result has that side, whatever the model's own.
    """
    return Resize(preprocess_of(name, pretrained=pretrained, image_size=image_size))


def load_fast_resize(name: str, *, pretrained: str | None = None, image_size: int | None = None) -> FastResize:
    """The resize for JPEGs that were decoded at a part of their size. ValueError for a model whose transform pads."""
    return FastResize(preprocess_of(name, pretrained=pretrained, image_size=image_size))
