"""Sharpness and plainness of pictures whose figures are known by hand."""

from __future__ import annotations

import numpy as np

from curation.numerics.picture import colourfulness, laplacian_variance, plainness


def test_a_flat_picture_and_a_ramp_have_no_laplacian() -> None:
    assert laplacian_variance(np.full((9, 7), 200, np.uint8)) == 0
    assert laplacian_variance(np.add.outer(np.arange(9), 3 * np.arange(7)).astype(np.uint8)) == 0
    assert laplacian_variance(np.array([[0, 255]], np.uint8)) == 0


def test_the_variance_is_that_of_the_inner_pixels_laplacian() -> None:
    grey = np.zeros((3, 4), np.uint8)
    grey[1, 1] = 10  # Laplacian at (1, 1): -40, at (1, 2): 10
    assert laplacian_variance(grey) == 25.0**2


def test_smoothing_lowers_it_and_noise_raises_it() -> None:
    rng = np.random.default_rng(0)
    sharp = np.kron(rng.integers(0, 2, (16, 16)), np.ones((4, 4))) * 200
    smooth = np.mean([np.roll(sharp, (dy, dx), (0, 1)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)], axis=0)
    noisy = np.clip(sharp + rng.normal(0, 20, sharp.shape), 0, 255)
    values = [laplacian_variance(picture.astype(np.uint8)) for picture in (smooth, sharp, noisy)]
    assert values == sorted(values) and values[1] > 4 * values[0]


def test_plainness_is_the_share_of_the_commonest_tone_and_its_neighbours() -> None:
    assert plainness(np.full((5, 5), 255, np.uint8)) == 1.0
    tones = np.array([[10, 10, 10, 14, 15, 6, 5, 200]], np.uint8)
    assert plainness(tones) == 5 / 8
    assert plainness(np.arange(256, dtype=np.uint8)[None]) == 5 / 256  # all are the commonest: the first, at the end


def test_grey_has_no_colour_and_two_pure_colours_have_that_of_the_formula() -> None:
    assert colourfulness(np.full((3, 4, 3), 90, np.uint8)) == 0
    halves = np.zeros((2, 2, 3), np.uint8)
    halves[0, :, 0], halves[1, :, 2] = 200, 200  # red-green is 200 and 0, yellow-blue 100 and -200
    wanted = np.hypot(100, 150) + 0.3 * np.hypot(100, -50)
    np.testing.assert_allclose(colourfulness(halves), wanted)
