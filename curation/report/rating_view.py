"""What `jobs.fit ratings` left in RUN/fit/NAME: images by range of the rating, how the ranges train, what it goes with.

The files are figures and addresses; pictures are read from the pool like all others of the page, with their captions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from curation.addresses import shard_of
from curation.data import manifest, storage
from curation.report.charts import Line, Panel, line_chart
from curation.report.folder import CurationRun
from curation.report.galleries import SHOWN, Gallery
from curation.report.ratings import PANELS, RANGES

FIRST_SHADE = 10
"""The page's colours from here on are ten shades from one hue to another."""
NUM_SHADES = 10
FACT_NAMES = {
    "file_bytes": "bytes of the file",
    "png_bytes": "bytes as a PNG",
    "edge_density": "edge density",
    "luminance": "luminance",
}


class Fact(NamedTuple):
    """Something of an image that a rating may go with."""

    name: str
    spearman: float | None
    """With the rating; None if the fact is constant."""
    medians: list[float | None]
    """Of the article's three ranges."""


class RatingView(NamedTuple):
    """All that is shown of one rating."""

    name: str
    rows: int
    facts: list[Fact]
    ranges: list[str]
    galleries: list[Gallery]
    panels: list[Panel]
    """Loss and gradient over the epochs, a line for each range of the rating."""
    keys: list[tuple[int, str]]
    """Colour and name of each range that the panels show."""


def rating_views(run: CurationRun) -> list[RatingView]:
    """The ratings of a run that were looked at, by the name of their column; none if none was."""
    folder = storage.join(run.url, "fit")
    found = []
    for name in sorted(storage.folders_in(folder)):
        url = storage.join(folder, name, "correlations.json")
        if storage.exists(url):
            dynamics = storage.join(folder, name, "dynamics.json")
            curves = manifest.read(dynamics) if storage.exists(dynamics) else {}
            found.append(_view(name, manifest.read(url), curves, set(run.numbers)))
    return found


def _view(name: str, told: Mapping[str, Any], dynamics: Mapping[str, Any], numbers: set[int]) -> RatingView:
    """`numbers`: the shards that can be shown; others were retired since the ratings were looked at."""
    images = {part: _still_there(addresses, numbers) for part, addresses in told.get("images", {}).items()}
    panels = [
        Panel(label, line_chart(_lines(dynamics[key]), x_label="epoch", y_label=label))
        for key, label in PANELS.items()
        if key in dynamics
    ]
    num_ranges = len(dynamics["loss"][0]) if "loss" in dynamics else 0
    return RatingView(
        name=name,
        rows=told["rows"],
        facts=[
            Fact(FACT_NAMES.get(fact, str(fact)), of["spearman_with_rating"], [of.get(part) for part in RANGES])
            for fact, of in told["facts"].items()
        ],
        ranges=[_percent(part) for part in RANGES],
        galleries=[
            Gallery(f"{name}: {_percent(part)}", "0% is the highest rating", [_spread(addresses)], "mixed")
            for part, addresses in images.items()
            if addresses
        ],
        panels=panels,
        keys=[
            (_shade(place, num_ranges), f"{100 * place // num_ranges}–{100 * (place + 1) // num_ranges}%")
            for place in range(num_ranges)
        ],
    )


def _still_there(addresses: list[int], numbers: set[int]) -> list[int]:
    where = np.array(addresses, np.int64)
    return where[np.isin(shard_of(where), list(numbers))].tolist()


def _percent(part: str) -> str:
    low, high = RANGES[part]
    return f"{part.partition('-')[0]}, {100 * low:.0f}–{100 * high:.0f}%"


def _spread(addresses: list[int]) -> list[int]:
    """At most SHOWN of them, evenly over the range, the highest rating first."""
    places = np.linspace(0, len(addresses) - 1, min(SHOWN, len(addresses))).round().astype(int)
    return [addresses[place] for place in places]


def _shade(place: int, num_ranges: int) -> int:
    return FIRST_SHADE + round((NUM_SHADES - 1) * place / max(1, num_ranges - 1))


def _lines(by_epoch: list[list[float | None]]) -> list[Line]:
    """A line for each range of figures (epochs, ranges)."""
    values = np.array([[np.nan if value is None else value for value in line] for line in by_epoch], float)
    num_ranges = values.shape[1]
    epochs = np.arange(1, len(values) + 1)
    return [
        Line(
            f"{100 * place // num_ranges}–{100 * (place + 1) // num_ranges}%",
            epochs,
            values[:, place],
            _shade(place, num_ranges),
        )
        for place in range(num_ranges)
    ]
