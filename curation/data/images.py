"""Image bytes -> a loaded PIL image or uint8 pixels, safely.

The bytes are hostile until proven otherwise: only decoders on an explicit list are tried (no Ghostscript, no WMF, none
of Pillow's stubs), the number of pixels is read from the header and checked before a pixel is decoded, embedded images
whose size may differ from the header's are checked too, and every failure is an `ImageError` with a drop reason.

What open_clip sees is what comes out: the first frame, no rotation by EXIF (open_clip does none; Pillow itself turns
TIFF), and modes that Pillow resizes and converts well are passed on untouched. The others (16-bit, float, Lab, palette
with alpha, premultiplied) would crash open_clip or come out black or white; they are brought to 8 bits first.

`fast_pixels` is the cheap way for plain JPEGs, about five times faster for a 512 px image and a 224 px model:
libjpeg-turbo decodes at 1/2, 1/4 or 1/8 of the size, as its scaled DCT gives it, and only what is left is resampled.
The pixels differ a little from open_clip's (`python -m jobs.benchmark decode` says by how much, in CLIP score).
Whatever is no plain JPEG, or makes libjpeg-turbo so much as warn, goes the exact way: it decodes, or has its reason.

Safe to call from threads: nothing global changes at call time. libtiff prints its complaints to stderr from C; those
alone cannot be silenced from here.
"""

from __future__ import annotations

import io
import logging
import struct
import warnings
import zlib
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import simplejpeg
from PIL import Image, ImageCms, UnidentifiedImageError
from PIL.PsdImagePlugin import PsdImageFile
from PIL.TiffImagePlugin import TiffImageFile

FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "AVIF", "TIFF", "BMP", "JPEG2000", "ICO", "CUR", "PPM", "PSD", "QOI", "SGI", "SUN"),
    *("XBM", "XPM", "BLP", "TGA"),  # TGA last: it has no magic number, so it guesses
)
"""What may be decoded, tried in this order. MPO is opened as JPEG."""

PILLOW_MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 1 << 40)
"""Above this Pillow itself refuses an image: a second line of defence, left as it is."""

MAX_PYTHON_PIXELS = 1 << 22
"""Cap for formats that Pillow decodes in Python (QOI, BLP, plain PPM): 1 us per pixel, holding the GIL."""

MAX_ASPECT = 200
"""Longest side per shortest side. A resize of the shortest side to 224 makes a 1 x 1,000,000 image 50 Gpx."""

PILLOW_ERRORS = (
    # Pillow's own, and what its plugins raise on purpose; AVIF raises RuntimeError (RecursionError is one, too).
    *(OSError, SyntaxError, ValueError, EOFError, NotImplementedError, RuntimeError, Image.DecompressionBombError),
    # What hostile bytes make plugins trip over: short reads, absent tags, odd types, huge numbers, zlib.
    *(struct.error, zlib.error, IndexError, KeyError, TypeError, AttributeError, AssertionError),
    *(OverflowError, ZeroDivisionError),
    # The C core raises it for impossible sizes. A real shortage drops an image that the cap should have refused.
    MemoryError,
)
"""What Pillow raises on broken files, by its source and by fuzzing. Nothing else is caught."""

DCT_SCALES = (8, 4, 2)
"""By what a JPEG is scaled down in decoding: libjpeg-turbo has SIMD code for these; 5/8 takes longer than the whole."""

_PLAIN_JPEG = frozenset({"YCbCr", "Gray"})
_RESIZES_WELL = frozenset({"1", "L", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LA", "HSV"})
_PLAIN_MODE = {"PA": "RGBA", "La": "LA", "RGBa": "RGBA"}

Image.init()  # once, here: plugins are otherwise imported at the first use, by several threads at a time
# A sample's drop reason says it; thousands of lines about odd EXIF data would not. Set once, never per call.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


class ImageError(Exception):
    """An image that is refused. `reason` is one of `drop_reasons.DROP_REASONS`; width and height if they were read."""

    def __init__(self, reason: str, *, size: tuple[int, int] | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.width, self.height = size or (None, None)


class Pixels(NamedTuple):
    """A decoded and resized image, and its size as it was stored."""

    pixels: np.ndarray
    """uint8 (H, W, 3)."""
    width: int
    height: int
    fell_back: bool = False
    """True if the fast way was wanted and this image had to go the exact one."""


class ScaledResize(Protocol):
    """Brings a JPEG that was decoded at a part of its size to the model's size."""

    @property
    def min_size(self) -> tuple[int, int]:
        """Height and width that it wants at least, so that nothing is enlarged which was larger in the file."""
        ...

    def __call__(self, pixels: np.ndarray, *, height: int, width: int) -> np.ndarray:
        """uint8 (h, w, 3) of an image stored as `height` x `width` -> uint8 (S_h, S_w, 3)."""
        ...


def pixels(data: bytes, *, max_pixels: int, resize: Callable[[Image.Image], np.ndarray]) -> Pixels:
    """Decode, and bring to the model's size: `resize` gives uint8 (H, W, 3). ImageError if either is refused."""
    image = open_image(data, max_pixels=max_pixels)
    try:
        return Pixels(resize(image), *image.size)
    except (OSError, ValueError, MemoryError, OverflowError) as error:
        raise ImageError("image:resize_failed", size=image.size) from error


def fast_pixels(
    data: bytes, *, max_pixels: int, fast: ScaledResize, exact: Callable[[Image.Image], np.ndarray]
) -> Pixels:
    """As `pixels`, through libjpeg-turbo's scaled DCT if the image is a plain JPEG, else the exact way."""
    decoded = _scaled_jpeg(data, max_pixels=max_pixels, min_size=fast.min_size)
    if decoded is None:
        return pixels(data, max_pixels=max_pixels, resize=exact)._replace(fell_back=True)
    return decoded._replace(pixels=fast(decoded.pixels, height=decoded.height, width=decoded.width))


def _scaled_jpeg(data: bytes, *, max_pixels: int, min_size: tuple[int, int]) -> Pixels | None:
    """A plain JPEG, at the smallest DCT scale that `min_size` (height, width) allows; None for anything else.

    Not plain: other formats, CMYK, too many pixels, extreme shapes, and what libjpeg-turbo has a complaint about.
    """
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    try:
        stored_height, stored_width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        height, width = int(stored_height), int(stored_width)
        is_extreme = height * width > max_pixels or max(height, width) > MAX_ASPECT * min(height, width)
        if is_extreme or colorspace not in _PLAIN_JPEG:
            return None
        sizes = [(-(-height // scale), -(-width // scale)) for scale in DCT_SCALES]
        wanted = next((size for size in sizes if size[0] >= min_size[0] and size[1] >= min_size[1]), (height, width))
        # Asked for at least this size, it takes the scale that gives exactly this one.
        decoded = simplejpeg.decode_jpeg(data, min_height=wanted[0], min_width=wanted[1])
    except ValueError:  # broken, or not quite: Pillow tells which, and has the drop reason
        return None
    return Pixels(decoded, width, height)


def open_image(data: bytes, *, max_pixels: int) -> Image.Image:
    """The image, loaded, in a mode that resizes and converts to RGB well; `.size` is the stored width and height.

    ImageError if it is refused. ValueError if `max_pixels` is not in [1, PILLOW_MAX_PIXELS].
    """
    if not 1 <= max_pixels <= PILLOW_MAX_PIXELS:
        raise ValueError(f"max_pixels must be in [1, {PILLOW_MAX_PIXELS}], got {max_pixels}")
    image = _open_header(data, max_pixels=max_pixels)
    size = image.size
    if max(size) > MAX_ASPECT * min(size):
        raise ImageError("image:extreme_aspect", size=size)
    try:
        _load(image)
        # Only conversions to a mode with alpha look at it, and they trip over odd values; RGB pixels stay the same.
        image.info.pop("transparency", None)
        return _to_plain_mode(image)
    except Image.DecompressionBombError as error:
        raise ImageError("image:too_many_pixels", size=size) from error
    except PILLOW_ERRORS as error:
        raise ImageError("image:decode_failed", size=size) from error


def _open_header(data: bytes, *, max_pixels: int) -> Image.Image:
    """The image, not yet loaded (except ICO, which Pillow loads at once), with at most `max_pixels` in every part."""
    if any(width * height > max_pixels for width, height in _ico_sizes(data)):
        raise ImageError("image:too_many_pixels")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        parts = [image.size, *_blp_sizes(data)]
        if isinstance(image, TiffImageFile):
            parts += [image._tile_size, (image.tag_v2.get(322, 1), image.tag_v2.get(323, 1))]
        if isinstance(image, PsdImageFile):
            _ = image.n_frames  # reads the layer table: a PSD with a broken one is refused
        num_pixels = max(width * height for width, height in parts)
        is_too_large = num_pixels > max_pixels
    except UnidentifiedImageError as error:
        raise ImageError("image:unrecognized") from error
    except Image.DecompressionBombError as error:
        raise ImageError("image:too_many_pixels") from error
    except PILLOW_ERRORS as error:
        raise ImageError("image:bad_header") from error
    is_python = any(codec in Image.DECODERS for codec, *_ in getattr(image, "tile", ()))
    if is_too_large or (is_python and image.width * image.height > MAX_PYTHON_PIXELS):
        raise ImageError("image:too_many_pixels", size=image.size)
    return image


def _load(image: Image.Image) -> None:
    """Decode the first frame. If all its pixels are there, a broken animation chunk behind them does no harm."""
    try:
        image.load()
    except SyntaxError:
        if image.format != "PNG" or getattr(image, "tile", None):
            raise
        image.load()


def _to_plain_mode(image: Image.Image) -> Image.Image:
    """The image itself if Pillow resizes its mode well, else its 8-bit equivalent. ValueError if it has none."""
    if image.im.mode != image.mode:  # broken palettes do this to GIFs; Pillow then fails at the first resize
        raise ValueError(f"mode {image.mode} with pixels in mode {image.im.mode}")
    if image.mode in _RESIZES_WELL:
        return image
    if image.mode in _PLAIN_MODE:
        return image.convert(_PLAIN_MODE[image.mode])
    if image.mode == "LAB":
        to_srgb = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
        converted = ImageCms.applyTransform(image, to_srgb)
        assert converted is not None  # None only when asked to work in place
        return converted
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_to_8_bits(np.asarray(image)))
    raise ValueError(f"no conversion from mode {image.mode}")


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Grey values uint8 (H, W). White is 65535 for integers and the first of 1, 255 and 65535 that nothing exceeds for
    floats; values beyond, or below 0, are stretched from minimum to maximum. Not finite becomes black."""
    whites = (65535,) if values.dtype.kind in "iu" else (1, 255, 65535)
    grey = values.astype(np.float32)
    finite = np.isfinite(grey)
    low, high = (float(grey[finite].min()), float(grey[finite].max())) if finite.any() else (0.0, 0.0)
    white = next((white for white in whites if 0 <= low and high <= white), None)
    if white is None:
        grey, white = grey - low, (high - low) or 1.0
    return np.where(finite, np.clip(grey / white, 0, 1) * 255 + 0.5, 0).astype(np.uint8)


def _ico_sizes(data: bytes) -> list[tuple[int, int]]:
    """Width and height of the images in an icon file, from their own headers; empty for any other file.

    An icon's directory holds at most 256 x 256, whatever the image behind it declares; Pillow loads it while opening.
    """
    if not data.startswith(b"\0\0\1\0") or len(data) < 6:
        return []
    sizes = []
    for entry in range(min(int.from_bytes(data[4:6], "little"), (len(data) - 6) // 16)):
        offset = int.from_bytes(data[18 + 16 * entry : 22 + 16 * entry], "little")
        head = data[offset : offset + 24]
        if len(head) < 24:
            continue
        if head.startswith(b"\x89PNG"):
            sizes.append(struct.unpack(">II", head[16:24]))
        elif head[:4] == b"\x0c\0\0\0":
            sizes.append(struct.unpack("<HH", head[4:8]))
        else:
            width, height = struct.unpack("<ii", head[4:12])
            sizes.append((abs(width), abs(height) // 2))  # the mask doubles the height
    return sizes


def _blp_sizes(data: bytes) -> list[tuple[int, int]]:
    """Width and height of the JPEG in a BLP1 file, which may differ from the file's own; empty for any other file."""
    if not data.startswith(b"BLP1\0\0\0\0"):
        return []
    offset, length = (int.from_bytes(data[at : at + 4], "little") for at in (28, 92))
    head_length = int.from_bytes(data[156:160], "little")
    jpeg = data[160 : 160 + head_length] + data[offset : offset + length]
    return [Image.open(io.BytesIO(jpeg), formats=("JPEG",)).size]
