"""An image as it is served: its pixels and nothing else that could tell where it came from.

Every image becomes a PNG, at most MAX_SIDE on its longer side and, by whole factors, at least MIN_SIDE, without
metadata. It is padded to a power of two with a chunk that decoders pass over, because the length of a PNG goes with how
smooth its image is, and that with the model.
"""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image

MAX_SIDE = 1024
MIN_SIDE = 256
"""Smaller images are enlarged here, pixel by pixel: a browser would blur them."""
MIN_BYTES = 1 << 14
_END = 12
"""Bytes of the last chunk, IEND."""
_CHUNK = 12
"""Bytes of a chunk beside its data."""


def rendered(image: Image.Image) -> bytes:
    """The PNG that is served; its length is a power of two."""
    whole = image.convert("RGBA") if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info else image
    if whole.mode == "RGBA":  # on white for all, or a page in the dark would show models differently
        sheet = Image.new("RGBA", whole.size, "white")
        whole = Image.alpha_composite(sheet, whole)
    whole = whole.convert("RGB")
    longer = max(whole.size)
    if longer > MAX_SIDE:
        whole.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    elif longer < MIN_SIDE:
        times = -(-MIN_SIDE // longer)
        whole = whole.resize((whole.width * times, whole.height * times), Image.Resampling.NEAREST)
    whole.info.clear()
    out = io.BytesIO()
    whole.save(out, "PNG", compress_level=1)
    return _padded(out.getvalue())


def _padded(png: bytes) -> bytes:
    size = MIN_BYTES
    while size < len(png) + _CHUNK:
        size *= 2
    # Small letters, but for the third: may be left out by whoever does not know it, is safe to copy.
    kind, zeros = b"paDd", bytes(size - len(png) - _CHUNK)
    chunk = struct.pack(">I", len(zeros)) + kind + zeros + struct.pack(">I", zlib.crc32(kind + zeros))
    return png[:-_END] + chunk + png[-_END:]
