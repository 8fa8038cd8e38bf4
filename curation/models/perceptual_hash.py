"""A 64-bit perceptual hash as a vector: what stays of an image that is resized, recompressed or brightened.

pHash (Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash Functions", Ch. 3.2): grey, 32 x 32, the
8 x 8 lowest frequencies of its cosine transform, each a bit: is it above their median. The bits are -1/8 and 1/8, so
that a hash is a vector of unit norm and the cosine of two counts bits: 1 - h / 32 at Hamming distance h. So what works
on embeddings works on hashes. Crops and mirror images have other hashes.

n images.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE, LOW = 32, 8
BITS = LOW * LOW


def grey_square(image: Image.Image) -> NDArray[np.uint8]:
    """The image as uint8 (32, 32), squashed; what is transparent is shown on white."""
    if image.mode in ("RGBA", "LA", "P"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS), dtype=np.uint8)


def perceptual_hashes(grey_n: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Hashes (n, 64) of grey images (n, 32, 32): each number -1/8 or 1/8."""
    angle = np.pi / SIDE * (np.arange(SIDE) + 0.5) * np.arange(LOW)[:, None]
    cosines = np.cos(angle)
    frequencies = np.einsum("uy,nyx,vx->nuv", cosines, grey_n.astype(np.float64), cosines).reshape(len(grey_n), BITS)
    # A flat image has no frequency but the first: what is left of the others is rounding, and would be noise.
    frequencies = frequencies.round(6)
    is_above = frequencies > np.median(frequencies, axis=1, keepdims=True)
    return np.where(is_above, 1 / LOW, -1 / LOW).astype(np.float32)


def cosine_within(hamming: int) -> float:
    """The cosine that hashes at a Hamming distance of at most `hamming` have at least."""
    if not 0 <= hamming <= BITS:
        raise ValueError(f"hamming must be in [0, {BITS}], got {hamming}")
    return 1 - 2 * hamming / BITS
