from __future__ import annotations

import base64
import io
import re

import numpy as np
from PIL import Image

from curation.report.samples_page import grid, page


def test_the_grid_shows_each_image_in_its_place_enlarged_without_mixing_pixels() -> None:
    images = np.zeros((5, 16, 16, 3), np.uint8) + np.arange(1, 6, dtype=np.uint8)[:, None, None, None] * 40
    sheet = np.asarray(grid(images))
    assert sheet.shape == (2 * 48 + 2, 3 * 48 + 4, 3)
    assert [int(sheet[24, 24 + 50 * place, 0]) for place in range(3)] == [40, 80, 120]
    assert [int(sheet[74, 24 + 50 * place, 0]) for place in range(3)] == [160, 200, 255]


def test_the_page_holds_every_arm_and_figure_and_no_text_of_it_is_markup() -> None:
    samples = {"random": np.zeros((4, 8, 8, 3), np.uint8), "<b>": np.ones((4, 8, 8, 3), np.uint8)}
    told = page(
        "A & B",
        samples,
        table=[["arm", "of_it"], ["<b>", "1 ± 2"]],
        legend={"of_it": "<i>", "other": "o"},
        notes=["n"],
        warnings=["<script>"],
    )
    assert "<th>of it</th>" in told and "<dt>of it</dt><dd>&lt;i&gt;</dd>" in told and "other" not in told
    assert "<b>" not in told and "<script>" not in told and "A &amp; B" in told and "1 ± 2" in told
    pictures = re.findall(r"data:image/png;base64,([^\"]+)", told)
    sizes = [Image.open(io.BytesIO(base64.b64decode(picture))).size for picture in pictures]
    assert sizes == [(98, 98), (98, 98)]
