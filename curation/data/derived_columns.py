"""Numbers that follow from a row's other columns: what DataComp's "basic" filter asks of a caption and an image.

Gadre et al. 2023 (arXiv:2304.14108): more than 2 words, more than 5 characters, a shorter side of at least 200 pixels,
an aspect ratio of at most 3, each as `baselines/apply_filter.py` counts it (its language test needs fastText and is not
here). Sides are those before any resizing, where the pool tells them (img2dataset's original_width, LAION's WIDTH).
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from curation.columns import JSON_PREFIX
from curation.data.tables import as_numbers, numbers_in

WIDTHS = ("json.original_width", "json.WIDTH", "width")
HEIGHTS = ("json.original_height", "json.HEIGHT", "height")

DERIVED: dict[str, tuple[str, ...]] = {
    "caption_words": ("caption",),
    "caption_chars": ("caption",),
    "min_side": (*WIDTHS, *HEIGHTS),
    "aspect_ratio": (*WIDTHS, *HEIGHTS),
}
"""Name -> the columns that it is made of."""


def sources_of(name: str) -> tuple[str, ...]:
    """The columns that are read for a column, which is itself if it is not derived."""
    return DERIVED.get(name, (name,))


def numbers(table: pa.Table, name: str) -> np.ndarray:
    """A column, derived or not, as float64 (n,); NaN where there is no value, or in the pool's own fields no number."""
    if name not in DERIVED:
        is_own = name.startswith(JSON_PREFIX)
        return numbers_in(table[name]) if is_own else as_numbers(table[name], name=name)
    if name.startswith("caption_"):
        captions = table["caption"].to_pylist()
        count = len if name == "caption_chars" else _num_words
        return np.array([np.nan if caption is None else count(caption) for caption in captions], np.float64)
    width, height = _first_known(table, WIDTHS), _first_known(table, HEIGHTS)
    shorter, longer = np.minimum(width, height), np.maximum(width, height)
    if name == "min_side":
        return shorter
    return np.divide(longer, shorter, out=np.full(len(shorter), np.nan), where=shorter > 0)


def _num_words(caption: str) -> int:
    return len(caption.split())


def _first_known(table: pa.Table, names: tuple[str, ...]) -> np.ndarray:
    values = np.full(table.num_rows, np.nan)
    for name in names:
        values = np.where(np.isnan(values), numbers_in(table[name]), values)
    return values
