"""The article's picture of a pool, of its ratings: images of their ranges, what they go with, how the ranges train.

Alchemist, 2025 (arXiv:2512.16905), Fig. 1 and Fig. 3: the head of the ratings is plain, the middle worth training on,
the tail chaotic; loss and gradient change differ accordingly. Ratings by loss are confounded by entropy, so their
correlations with file size, edge density and luminance stand beside them.

N rows, R ranges, S snapshots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import IO, Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from curation.evaluation.correlation import spearman

RANGES = {"head-0-20": (0.0, 0.2), "middle-30-80": (0.3, 0.8), "tail-80-100": (0.8, 1.0)}
"""Name -> percentiles [low, high) of the article's three parts."""
COLUMNS = 10
GAP = 2
PANELS = {"loss": "loss", "gradient_norm": "gradient's norm", "gradient_change": "gradient's change"}


def sheet(images_NSS3: np.ndarray) -> Image.Image:
    """Images side by side, ten in a line."""
    side = images_NSS3.shape[1] + GAP
    lines = -(-len(images_NSS3) // COLUMNS)
    whole = Image.new("RGB", (COLUMNS * side - GAP, lines * side - GAP), (255, 255, 255))
    for place, image in enumerate(images_NSS3):
        whole.paste(Image.fromarray(image), (place % COLUMNS * side, place // COLUMNS * side))
    return whole


def of_range(percentile_N: np.ndarray, name: str, *, limit: int) -> np.ndarray:
    """Places of at most `limit` rows of a range, spread evenly over it, the highest rating first."""
    low, high = RANGES[name]
    inside = np.flatnonzero((percentile_N >= low) & (percentile_N < high))
    inside = inside[np.argsort(percentile_N[inside], kind="stable")]
    return (
        inside[np.linspace(0, len(inside) - 1, min(limit, len(inside))).round().astype(int)] if len(inside) else inside
    )


def correlations(percentile_N: np.ndarray, facts: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Spearman's correlation of the rating with each fact (N,), None if it is constant, and each range's medians."""
    inside = {name: (percentile_N >= low) & (percentile_N < high) for name, (low, high) in RANGES.items()}
    told = {}
    for name, values in facts.items():
        correlation = spearman(-percentile_N, values)  # percentile 0 is the highest rating
        medians = {part: float(np.median(values[here])) for part, here in inside.items() if here.any()}
        told[name] = {"spearman_with_rating": None if np.isnan(correlation) else correlation, **medians}
    return told


def draw_dynamics(figures: Mapping[str, Sequence[Sequence[float | None]]], file: IO[bytes]) -> None:
    """Loss, gradient norm and gradient change (S, R each) over the epochs, a line for each range, as a PNG."""
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    panels = figure.subplots(1, len(PANELS))
    for panel, (name, label) in zip(panels, PANELS.items(), strict=True):
        values_SR = np.array([[np.nan if v is None else v for v in line] for line in figures[name]], float)
        num_ranges = values_SR.shape[1]
        for place in range(num_ranges):
            shade = 0.1 + 0.8 * place / max(1, num_ranges - 1)
            told = f"{100 * place // num_ranges}-{100 * (place + 1) // num_ranges}%"
            colour = (shade, 0.25, 1 - shade)
            panel.plot(np.arange(1, len(values_SR) + 1), values_SR[:, place], color=colour, label=told)
        panel.set_xlabel("epoch")
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    panels[-1].legend(fontsize="x-small", title="percentile")
    figure.suptitle("The proxy by range of the rating, 0% the highest")
    figure.savefig(file, format="png", dpi=130)
