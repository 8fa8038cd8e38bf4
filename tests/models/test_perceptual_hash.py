from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from curation.models.frozen import frozen_digest, load_frozen
from curation.models.perceptual_hash import cosine_within, grey_square, perceptual_hashes


def picture(seed: int = 0, *, side: int = 96) -> Image.Image:
    """A smooth picture: low frequencies of noise, enlarged."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def hash_of(image: Image.Image) -> np.ndarray:
    return perceptual_hashes(grey_square(image)[None])[0]


def distance(a: Image.Image, b: Image.Image) -> int:
    return int((hash_of(a) != hash_of(b)).sum())


def test_a_hash_is_a_unit_vector_whose_cosine_counts_bits():
    first, second = hash_of(picture(0)), hash_of(picture(1))
    assert first.shape == (64,) and first.dtype == np.float32
    assert set(np.unique(first).tolist()) <= {-0.125, 0.125}
    assert float(first @ second) == 1 - int((first != second).sum()) / 32


def test_it_stays_when_an_image_is_resized_recompressed_or_brightened():
    image = picture()
    smaller = image.resize((60, 50))
    saved = io.BytesIO()
    image.save(saved, "JPEG", quality=40)
    brighter = Image.fromarray(np.clip(np.asarray(image, np.float32) * 1.1, 0, 255).astype(np.uint8))
    for copy in (smaller, Image.open(saved), brighter):
        assert distance(image, copy) <= 4
    others = [distance(image, picture(seed)) for seed in range(1, 21)]
    assert min(others) > 8


def test_by_hand_a_half_dark_image_has_the_horizontal_frequencies_of_a_step():
    grey = np.zeros((1, 32, 32), np.uint8)
    grey[:, :, :16] = 200
    bits = perceptual_hashes(grey)[0].reshape(8, 8) > 0
    # Only the first row of frequencies (constant down the image) is not zero: +, 0, -, 0, +, 0, - after the mean.
    expected = np.zeros((8, 8), bool)
    expected[0, [0, 1, 5]] = True
    assert (bits == expected).all()


def test_flat_images_have_one_hash():
    assert distance(Image.new("RGB", (50, 40), "navy"), Image.new("RGB", (31, 77), "olive")) == 0


def test_what_is_transparent_is_white():
    clear = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    clear.paste((255, 0, 0, 255), (0, 0, 20, 40))
    shown = Image.new("RGB", (40, 40), "white")
    shown.paste((255, 0, 0), (0, 0, 20, 40))
    assert distance(clear, shown) == 0


def test_it_is_a_library_of_frozen_networks():
    frozen = load_frozen("phash", "64")
    grey = frozen.resize(picture())
    np.testing.assert_array_equal(frozen.embed(grey[None]), perceptual_hashes(grey[None]))
    assert frozen.embed(grey[None][:0]).shape == (0, 64)
    assert len(frozen_digest("phash", "64")) == 64
    with pytest.raises(ValueError, match="library phash has the model '64', got 'ViT-B-32'"):
        load_frozen("phash", "ViT-B-32")


def test_a_radius_is_a_cosine():
    assert [cosine_within(h) for h in (0, 4, 32, 64)] == [1.0, 0.875, 0.0, -1.0]
    with pytest.raises(ValueError, match=r"hamming must be in \[0, 64\], got 65"):
        cosine_within(65)
