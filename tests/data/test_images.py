"""Hostile and odd images: everything decodes to RGB or is refused with a reason, and ordinary ones are open_clip's."""

from __future__ import annotations

import csv
import functools
import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from PIL import Image

from curation.data import images
from curation.data.drop_reasons import DROP_REASONS
from curation.data.images import (
    MAX_PYTHON_PIXELS,
    PILLOW_MAX_PIXELS,
    ImageError,
    Pixels,
    fast_pixels,
    open_image,
    pixels,
)
from curation.data.read_rules import ReadRules
from curation.data.shards import ShardReader

MAX_PIXELS = 50_000_000

# The filter that images.py sets once is undone by pytest around each test.
pytestmark = pytest.mark.filterwarnings("ignore:::PIL")


def resize_and_crop(image: Image.Image) -> np.ndarray:
    """As open_clip does it for a square model: the shortest side to 64, then the centre, then RGB."""
    scale = 64 / min(image.size)
    width, height = (max(64, int(side * scale)) for side in image.size)
    left, top = round((width - 64) / 2), round((height - 64) / 2)
    cropped = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + 64, top + 64))
    return np.asarray(cropped.convert("RGB"))


def saved(image: Image.Image, image_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def picture(mode: str = "RGB", size: tuple[int, int] = (80, 60)) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def refusal(data: bytes, *, max_pixels: int = MAX_PIXELS) -> ImageError:
    with pytest.raises(ImageError, match="image:") as caught:
        open_image(data, max_pixels=max_pixels)
    assert caught.value.reason in DROP_REASONS
    return caught.value


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header declares a size and whose pixels are missing."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")


def test_bad_input_decodes_or_is_refused_as_its_manifest_says(real_data: Path):
    with open(real_data / "bad-input/manifest.csv", newline="") as lines:
        manifest = {row["key"]: row for row in csv.DictReader(lines)}
    with open(real_data / "bad-input/00000.tar", "rb") as raw:
        samples = list(ShardReader(raw, url="bad-input/00000.tar", rules=ReadRules()))
    assert [sample.key for sample in samples] == list(manifest)
    num_decoded = 0
    for sample in samples:
        row = manifest[sample.key]
        assert sample.image is not None
        if row["result"] == "decodes":
            decoded = pixels(sample.image, max_pixels=MAX_PIXELS, resize=resize_and_crop)
            assert (decoded.pixels.shape, decoded.pixels.dtype) == ((64, 64, 3), np.uint8)
            assert [str(decoded.width), str(decoded.height)] == [row["width"], row["height"]]
            num_decoded += 1
        else:
            reason = refusal(sample.image).reason
            if "DecompressionBomb" in row["result"] + row["warnings"]:
                assert reason in ("image:too_many_pixels", "image:extreme_aspect")
            if "Unidentified" in row["result"]:
                assert reason == "image:unrecognized"
    assert num_decoded == 92


@pytest.mark.parametrize(
    ("mode", "image_format", "options"),
    [
        ("RGB", "PNG", {}),
        ("RGB", "PNG", {"transparency": (1, 2, 3)}),
        ("RGBA", "PNG", {}),
        ("L", "PNG", {"transparency": 3}),
        ("LA", "PNG", {}),
        ("P", "PNG", {"transparency": 3}),
        ("P", "GIF", {"transparency": 3}),
        ("1", "PNG", {}),
        ("RGB", "JPEG", {"quality": 90}),
        ("L", "JPEG", {}),
        ("CMYK", "JPEG", {}),
        ("YCbCr", "TIFF", {}),
        ("RGB", "WEBP", {}),
        ("RGBA", "WEBP", {"lossless": True}),
        ("RGB", "AVIF", {}),
    ],
)
def test_ordinary_modes_give_exactly_the_pixels_of_open_clips_order(mode, image_format, options):
    data = saved(picture(mode), image_format, **options)
    expected = resize_and_crop(Image.open(io.BytesIO(data)))
    decoded = pixels(data, max_pixels=MAX_PIXELS, resize=resize_and_crop)
    assert np.array_equal(decoded.pixels, expected)
    assert (decoded.width, decoded.height) == (80, 60)


def test_pixels_equal_open_clips_own_transform():
    import torch
    from open_clip.transform import image_transform
    from torchvision.transforms import Compose

    steps = cast(Compose, image_transform(64, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))).transforms
    data = saved(picture(size=(123, 77)), "JPEG")
    theirs = cast(torch.Tensor, Compose(steps[:-1])(Image.open(io.BytesIO(data))))  # all but the normalisation
    ours = pixels(data, max_pixels=MAX_PIXELS, resize=lambda image: np.asarray(Compose(steps[:2])(image))).pixels
    assert np.array_equal(ours, (theirs.permute(1, 2, 0) * 255).round().byte().numpy())


def test_the_first_frame_is_taken_and_exif_does_not_turn_it():
    frames = [Image.new("RGB", (4, 2), color) for color in ("red", "blue")]
    animated = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_image(animated, max_pixels=99).convert("RGB").getpixel((0, 0)) == (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_image(saved(frames[0], "JPEG", exif=exif), max_pixels=99).size == (4, 2)


@pytest.mark.parametrize(
    ("grey", "expected"),
    [
        (np.array([[0, 257, 65535]], np.uint16), [0, 1, 255]),
        (np.array([[0, 257, 65535]], np.int32), [0, 1, 255]),
        (np.array([[-100, 0, 100]], np.int32), [0, 128, 255]),
        (np.array([[0, 500_000, 1_000_000]], np.int32), [0, 128, 255]),
        (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
        (np.array([[0, 2, 255]], np.float32), [0, 2, 255]),
        (np.array([[0, 257, 65535]], np.float32), [0, 1, 255]),
        (np.array([[-1, 0, 1]], np.float32), [0, 128, 255]),
        (np.array([[np.nan, np.inf, 1]], np.float32), [0, 0, 255]),
        (np.array([[np.nan, np.nan, -np.inf]], np.float32), [0, 0, 0]),
        (np.array([[-5, -5, -5]], np.float32), [0, 0, 0]),
    ],
)
def test_deep_grey_is_scaled_to_8_bits_instead_of_clipped(grey, expected):
    image = open_image(saved(Image.fromarray(grey), "TIFF"), max_pixels=99)
    assert (image.mode, np.asarray(image)[0].tolist()) == ("L", expected)


def test_lab_and_palettes_with_alpha_become_rgb():
    lab = Image.merge("LAB", [Image.new("L", (2, 2), value) for value in (128, 28, 128)])  # L 50, a -100, b 0
    red, green, blue = np.asarray(open_image(saved(lab, "TIFF"), max_pixels=99).convert("RGB"))[0, 0].tolist()
    assert (red, green > 140, blue > 100) == (0, True, True)
    assert images._to_plain_mode(picture("RGBA").convert("RGBa")).mode == "RGBA"
    assert images._to_plain_mode(picture("LA").convert("La")).mode == "LA"
    assert images._to_plain_mode(picture("LA").convert("PA")).mode == "RGBA"


def test_a_mode_without_conversion_is_refused_not_guessed():
    image = picture()
    image._mode = "XYZ"
    with pytest.raises(ValueError, match="mode XYZ with pixels in mode RGB"):
        images._to_plain_mode(image)


def test_more_pixels_than_the_cap_are_refused_from_the_header_alone():
    error = refusal(png_header(50_000, 40_000))
    assert error.reason == "image:too_many_pixels"
    error = refusal(png_header(101, 100), max_pixels=10_000)
    assert (error.reason, error.width, error.height) == ("image:too_many_pixels", 101, 100)
    assert open_image(saved(picture(size=(100, 100)), "PNG"), max_pixels=10_000).size == (100, 100)


@pytest.mark.parametrize("max_pixels", [0, -1, PILLOW_MAX_PIXELS + 1])
def test_a_cap_that_pillow_would_undercut_is_refused(max_pixels):
    with pytest.raises(ValueError, match="max_pixels must be in"):
        open_image(b"", max_pixels=max_pixels)


def icon(body: bytes) -> bytes:
    """A 16 x 16 icon, by its directory."""
    return b"\0\0\1\0\1\0" + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(body), 22) + body


@pytest.mark.parametrize(
    "body",
    [
        png_header(9000, 9000),
        struct.pack("<IiiHHIIiiII", 40, 9000, 18000, 1, 32, 0, 0, 0, 0, 0, 0),
        struct.pack("<IiiHHIIiiII", 40, 9000, -18000, 1, 32, 0, 0, 0, 0, 0, 0),
        struct.pack("<IHHHH", 12, 9000, 9000, 1, 24) + bytes(12),
    ],
    ids=["png", "dib", "dib upside down", "os2 dib"],
)
def test_an_image_in_an_icon_is_measured_by_its_own_header(body):
    assert refusal(icon(body)).reason == "image:too_many_pixels"


def test_icons_that_hold_what_they_say_decode_and_broken_ones_are_refused():
    assert open_image(icon(saved(picture("RGBA", (16, 16)), "PNG")), max_pixels=256).size == (16, 16)
    assert refusal(b"\0\0\1\0").reason.startswith("image:")
    assert refusal(icon(b"")).reason.startswith("image:")


def blp(jpeg: bytes, *, size: tuple[int, int]) -> bytes:
    """A BLP1 file with a JPEG inside."""
    head = b"BLP1" + struct.pack("<IIIIII", 0, 0, *size, 5, 0)
    tables = struct.pack("<16I", 160, *[0] * 15) + struct.pack("<16I", len(jpeg), *[0] * 15)
    return head + tables + struct.pack("<I", 0) + jpeg


def test_a_jpeg_in_a_blp_is_measured_by_its_own_header():
    jpeg = saved(picture(size=(200, 200)), "JPEG")
    assert refusal(blp(jpeg, size=(8, 8)), max_pixels=39_999).reason == "image:too_many_pixels"
    assert open_image(blp(jpeg, size=(200, 200)), max_pixels=40_000).size == (200, 200)


def test_tiles_larger_than_their_image_are_measured():
    data = bytearray(saved(picture("L", (16, 16)), "TIFF"))
    tags = {256: 16, 257: 16, 258: 8, 259: 1, 262: 1, 277: 1, 322: 30_000, 323: 30_000, 324: 8, 325: 256}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    data = b"II*\0" + struct.pack("<I", 264) + bytes(256) + struct.pack("<H", len(tags)) + entries + bytes(4)
    assert refusal(data).reason == "image:too_many_pixels"


def test_formats_that_pillow_decodes_in_python_have_a_cap_of_their_own():
    side = int(MAX_PYTHON_PIXELS**0.5) + 1
    qoi = b"qoif" + struct.pack(">IIBB", side, side, 3, 0)
    assert refusal(qoi).reason == "image:too_many_pixels"
    assert open_image(saved(picture(), "QOI"), max_pixels=MAX_PIXELS).size == (80, 60)


@pytest.mark.parametrize("size", [(201, 1), (1, 201)])
def test_extreme_shapes_are_refused_before_a_resize_makes_them_huge(size):
    error = refusal(saved(Image.new("L", size), "PNG"))
    assert (error.reason, error.width, error.height) == ("image:extreme_aspect", *size)
    assert open_image(saved(Image.new("L", (200, 1)), "PNG"), max_pixels=200).size == (200, 1)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "image:unrecognized"),
        (b"<html>not found</html>", "image:unrecognized"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "image:unrecognized"),
        (png_header(0, 5), "image:unrecognized"),
        (b"BM" + bytes(60), "image:bad_header"),
        (saved(picture(), "JPEG")[:800], "image:decode_failed"),
        (saved(picture(), "PNG")[:-99], "image:decode_failed"),
        (png_header(5, 5), "image:decode_failed"),
        (saved(picture(), "AVIF").replace(b"pitm", b"xitm"), "image:bad_header"),
    ],
)
def test_what_cannot_be_decoded_has_a_reason(data, reason):
    assert refusal(data).reason == reason


def test_a_failure_after_opening_still_tells_the_stored_size():
    error = refusal(saved(picture(), "PNG")[:-99])
    assert (error.width, error.height) == (80, 60)


def test_a_bomb_that_only_the_decoder_sees_is_too_many_pixels(monkeypatch):
    def load(_: Image.Image) -> None:
        raise Image.DecompressionBombError("inside")

    monkeypatch.setattr(images, "_load", load)
    assert refusal(saved(picture(), "PNG")).reason == "image:too_many_pixels"


def test_an_image_that_cannot_be_resized_is_refused_and_a_defect_of_the_resize_propagates():
    def failing(error: Exception):
        def resize(image: Image.Image) -> np.ndarray:
            raise error

        return resize

    with pytest.raises(ImageError, match="image:resize_failed"):
        pixels(saved(picture(), "PNG"), max_pixels=MAX_PIXELS, resize=failing(MemoryError()))
    with pytest.raises(TypeError, match="a defect"):
        pixels(saved(picture(), "PNG"), max_pixels=MAX_PIXELS, resize=failing(TypeError("a defect")))


class Halves:
    """A model of 64 x 64 that takes every so many-th pixel; it notes what size it was handed."""

    min_size = (64, 64)

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def __call__(self, pixels: np.ndarray, *, height: int, width: int) -> np.ndarray:
        self.seen.append((*pixels.shape, height, width))
        return resize_and_crop(Image.fromarray(pixels))


def fast(data: bytes, *, resize: Halves | None = None, max_pixels: int = MAX_PIXELS) -> Pixels:
    return fast_pixels(data, max_pixels=max_pixels, fast=resize or Halves(), exact=resize_and_crop)


@pytest.mark.parametrize(
    ("size", "decoded"),
    [
        ((512, 512), (64, 64)),
        ((511, 1025), (129, 64)),  # an eighth, rounded up
        ((500, 400), (100, 125)),
        ((127, 300), (150, 64)),
        ((126, 300), (300, 126)),
        ((64, 64), (64, 64)),
        ((30, 20), (20, 30)),
    ],
)
def test_a_jpeg_is_decoded_at_the_smallest_dct_scale_that_is_not_smaller_than_the_model(size, decoded):
    resize = Halves()
    result = fast(saved(picture(size=size), "JPEG"), resize=resize)
    assert resize.seen == [(*decoded, 3, size[1], size[0])]
    assert ((result.width, result.height), result.fell_back) == (size, False)


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}, {"optimize": True}]
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_scaled_decoding_is_close_to_the_exact_pixels(mode, options):
    smooth = Image.fromarray(np.random.default_rng(3).integers(0, 256, (9, 12, 3), dtype=np.uint8))
    data = saved(smooth.resize((640, 544), Image.Resampling.BICUBIC).convert(mode), "JPEG", **options)
    exact = pixels(data, max_pixels=MAX_PIXELS, resize=resize_and_crop).pixels.astype(int)
    difference = np.abs(fast(data).pixels.astype(int) - exact)
    assert difference.mean() < 1 and difference.max() <= 16


@pytest.mark.parametrize(
    ("mode", "image_format"), [("RGB", "PNG"), ("RGB", "WEBP"), ("RGBA", "PNG"), ("CMYK", "JPEG"), ("P", "GIF")]
)
def test_what_is_no_plain_jpeg_goes_the_exact_way_and_says_so(mode, image_format):
    data = saved(picture(mode), image_format)
    resize = Halves()
    result, exact = fast(data, resize=resize), pixels(data, max_pixels=MAX_PIXELS, resize=resize_and_crop)
    assert result.fell_back and not exact.fell_back and not resize.seen
    assert np.array_equal(result.pixels, exact.pixels) and result[1:3] == exact[1:3]


def test_a_jpeg_that_libjpeg_warns_of_goes_the_exact_way_and_pillow_decides():
    cut = saved(picture(), "JPEG")[:800]
    with pytest.raises(ImageError, match="image:decode_failed"):
        fast(cut)
    stuffed = saved(picture(), "JPEG")[:-2] + b"\0" * 9 + b"\xff\xd9"
    assert fast(stuffed).fell_back


def test_the_fast_way_refuses_from_the_header_what_the_exact_way_refuses():
    large, narrow = saved(picture(size=(101, 100)), "JPEG"), saved(Image.new("L", (201, 1)), "JPEG")
    for data, reason in ((large, "image:too_many_pixels"), (narrow, "image:extreme_aspect")):
        with pytest.raises(ImageError, match=reason):
            fast(data, max_pixels=10_000)


def test_bad_input_has_the_same_reasons_the_fast_way(real_data: Path):
    with open(real_data / "bad-input/00000.tar", "rb") as raw:
        samples = list(ShardReader(raw, url="bad-input/00000.tar", rules=ReadRules()))
    num_fast = 0
    for sample in samples:
        outcomes: list[str] = []
        for decode in (fast, functools.partial(pixels, max_pixels=MAX_PIXELS, resize=resize_and_crop)):
            try:
                decoded = decode(sample.image or b"")
                outcomes.append(f"{decoded.width} x {decoded.height}")
                num_fast += decode is fast and not decoded.fell_back
            except ImageError as error:
                outcomes.append(f"{error.reason} {error.width} x {error.height}")
        assert outcomes[0] == outcomes[1], sample.key
    assert num_fast == 30


def test_any_damaged_byte_of_a_jpeg_decodes_the_fast_way_or_is_refused():
    rng = np.random.default_rng(1)
    for options in ({}, {"progressive": True}):
        whole = saved(picture(size=(130, 130)), "JPEG", **options)
        for _ in range(150):
            damaged = bytearray(whole)
            for offset in rng.integers(0, min(len(whole), 700), rng.integers(1, 5)):
                damaged[offset] = rng.integers(0, 256)
            try:
                decoded = fast(bytes(damaged), max_pixels=1_000_000)
                assert decoded.pixels.shape == (64, 64, 3)
            except ImageError as error:
                assert error.reason in DROP_REASONS


def test_any_damaged_byte_of_an_image_decodes_or_is_refused():
    rng = np.random.default_rng(0)
    for image_format in ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "TIFF", "BMP", "ICO", "JPEG2000", "TGA", "PPM", "SGI"):
        whole = saved(picture(size=(24, 24)), image_format)
        for _ in range(150):
            damaged = bytearray(whole)
            for offset in rng.integers(0, min(len(whole), 400), rng.integers(1, 5)):
                damaged[offset] = rng.integers(0, 256)
            try:
                pixels(bytes(damaged), max_pixels=1_000_000, resize=resize_and_crop)
            except ImageError as error:
                assert error.reason in DROP_REASONS


def test_odd_images_leave_no_word_on_python_s_side(real_data: Path):
    """In a fresh interpreter, since pytest has its own filters. libtiff's lines come from C."""
    code = f"""
import sys
from curation.data.images import ImageError, open_image
from curation.data.read_rules import ReadRules
from curation.data.shards import ShardReader
with open({str(real_data / "bad-input/00000.tar")!r}, "rb") as raw:
    for sample in ShardReader(raw, url="bad-input/00000.tar", rules=ReadRules()):
        try:
            open_image(sample.image, max_pixels=50_000_000)
        except ImageError:
            pass
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert not [line for line in run.stderr.splitlines() if "Warning" in line or "More samples" in line]
