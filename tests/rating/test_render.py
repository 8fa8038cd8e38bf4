from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from curation.rating.render import MAX_SIDE, MIN_BYTES, rendered


def opened(png: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(png))
    image.load()
    return image


def test_pixels_are_served_as_they_are_and_nothing_beside_them() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (300, 320, 3), np.uint8)
    told, out = PngImagePlugin.PngInfo(), io.BytesIO()
    told.add_text("Software", "model-b")
    Image.fromarray(pixels).save(out, "PNG", pnginfo=told)
    served = rendered(opened(out.getvalue()))
    assert (np.asarray(opened(served)) == pixels).all()
    assert b"model-b" not in served and opened(served).info == {}


@pytest.mark.parametrize("side", [8, 300, 700])
def test_a_length_is_a_power_of_two_so_plain_and_busy_images_differ_little(side: int) -> None:
    plain = rendered(Image.new("RGB", (side, side)))
    busy = rendered(Image.fromarray(np.random.default_rng(1).integers(0, 256, (side, side, 3), np.uint8)))
    for served in (plain, busy):
        assert len(served) >= MIN_BYTES and len(served) & (len(served) - 1) == 0
        assert opened(served).format == "PNG"
    assert len(plain) == MIN_BYTES


def test_small_images_grow_by_whole_factors_and_large_ones_shrink() -> None:
    small = np.random.default_rng(2).integers(0, 256, (32, 24, 3), np.uint8)
    assert (np.asarray(opened(rendered(Image.fromarray(small)))) == small.repeat(8, 0).repeat(8, 1)).all()
    assert opened(rendered(Image.new("L", (4096, 100)))).size == (MAX_SIDE, 25)


def test_what_is_transparent_is_white() -> None:
    clear = Image.new("RGBA", (300, 300), (255, 0, 0, 0))
    palette = Image.new("P", (300, 300))
    palette.info["transparency"] = 0
    for image in (clear, palette, Image.new("LA", (300, 300), (0, 0))):
        assert opened(rendered(image)).getpixel((5, 5)) == (255, 255, 255)
