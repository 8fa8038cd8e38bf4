"""Charts as inline SVG, a few kilobytes each, whose colours are the page's: they follow its light or dark scheme.

matplotlib's SVG bakes in colours and glyph outlines and takes 30 kB a panel, so these few shapes are drawn here. All
text is escaped; every coordinate is finite, whatever the data (a constant, one point, nothing).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from curation.report.plain import plain

WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 38
MAX_POINTS = 60
"""A line of more points is drawn by the means of as many stretches."""
PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
NUM_COLOURS, NUM_DASHES = 6, 4
"""What the style sheet tells curves apart by: hues, and strokes for those that come round to a hue again."""


@dataclass(frozen=True)
class Line:
    """A curve (m,) with a band around it, if it has one. `colour` and `dash` are numbers of the page's style sheet."""

    label: str
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    colour: int
    low: Sequence[float] | np.ndarray = field(default=())
    high: Sequence[float] | np.ndarray = field(default=())
    dash: int = 0


class Mark(NamedTuple):
    """A place on a histogram's axis, and what is said of it."""

    value: float
    label: str


@dataclass(frozen=True)
class Bars:
    """Stacked counts (m,) over bins, one more edge than bins. `kind` is the page's colour: kept or cut."""

    kind: str
    label: str
    counts: Sequence[int] | np.ndarray


class Panel(NamedTuple):
    """A chart with its heading."""

    title: str
    chart: Markup


def number(value: float) -> str:
    """A number for a tick or a tile: 1.5M, 20k, 0.25, and 5e20 where there is no prefix. At most four digits."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.3g}")  # 999.6 is 1k, not 1e+03
    for scale, prefix in PREFIXES:
        if 1000 * PREFIXES[0][0] > abs(rounded) >= scale:
            return f"{rounded / scale:.3g}{prefix}".replace("-", "−")
    return f"{rounded:.3g}".replace("e+", "e").replace("-", "−")


def share(value: float) -> str:
    """A share for a tick: 25%."""
    return f"{100 * value:.3g}%"


def ticks(low: float, high: float, *, about: int = 5) -> list[float]:
    """Round numbers in [low, high], 1, 2 or 5 times a power of ten apart."""
    span = high - low
    step = 10.0 ** math.floor(math.log10(span / about))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= about)
    first = math.ceil(low / step - 1e-9)
    digits = 12 - math.floor(math.log10(step))  # of a tiny step all twelve after the point may be zeros
    return [round(place * step, digits) for place in range(first, math.floor(high / step + 1e-9) + 1)]


def widened(low: float, high: float) -> tuple[float, float]:
    """The range [low, high], or one that begins at low where that is empty, wide enough to be told from low."""
    return (low, high) if high > low else (low, low + max(1.0, 0.01 * abs(low)))


def look(place: int) -> tuple[int, int]:
    """Colour and dash of the curve at a place in a row of them: each colour once plain, then dashed, and so round."""
    return place % NUM_COLOURS, place // NUM_COLOURS % NUM_DASHES


def line_chart(
    lines: Sequence[Line], *, x_label: str, y_label: str, as_share: bool = False, width: int = WIDTH
) -> Markup:
    """Curves over a common axis that begins at 0, drawn `width` units wide. Empty if no curve has a finite point.

    The band of a share is drawn as far as shares go: an interval of a few seeds may reach beyond 0 or 1.
    """
    drawn = [thin for line in lines if len((thin := _thinned(line, between=(0.0, 1.0) if as_share else None)).x)]
    if not drawn:
        return Markup("")
    highest = max(float(np.max(np.concatenate([line.y, line.high]))) for line in drawn)
    lowest = min(float(np.min(np.concatenate([line.y, line.low]))) for line in drawn)
    right = max(max(float(np.max(line.x)) for line in drawn), 1e-9)
    frame = _Frame(0.0, right, *_padded(min(0.0, lowest), max(highest, lowest)), width)
    parts = [frame.grid(x_label, y_label, y_text=share if as_share else number)]
    for line in drawn:
        if len(line.low):
            around = [*zip(line.x, line.high, strict=True), *reversed(list(zip(line.x, line.low, strict=True)))]
            parts.append(Markup('<polygon class="band s{}" points="{}"/>').format(line.colour, frame.points(around)))
    for line in drawn:
        points = frame.points(zip(line.x, line.y, strict=True))
        title = Markup("<title>{}</title>").format(plain(line.label))
        drawing = Markup('<polyline class="line s{} d{}" points="{}">{}</polyline>')
        parts.append(drawing.format(line.colour, line.dash, points, title))
        x, y = frame.place(float(line.x[-1]), float(line.y[-1]))
        parts.append(Markup('<circle class="dot s{}" cx="{}" cy="{}" r="2.6"/>').format(line.colour, x, y))
    return _svg(parts, f"{y_label} over {x_label}", width)


def histogram(
    edges: Sequence[float] | np.ndarray, stacks: Sequence[Bars], *, x_label: str, marks: Sequence[Mark] = ()
) -> Markup:
    """Stacked counts over bins, and marks where the cuts are. Empty if all counts are 0."""
    edges = np.asarray(edges, float)
    total = np.sum([np.asarray(stack.counts) for stack in stacks], axis=0)
    if not np.sum(total):
        return Markup("")
    frame = _Frame(*widened(float(edges[0]), float(edges[-1])), 0.0, float(np.max(total)) * 1.06)
    parts = [frame.grid(x_label, "samples", y_text=number)]
    below = np.zeros(len(edges) - 1)
    for stack in stacks:
        path = []
        for place, count in enumerate(np.asarray(stack.counts, float)):
            if count:
                left, top = frame.place(edges[place], below[place] + count)
                right, bottom = frame.place(edges[place + 1], below[place])
                path.append(f"M{left} {bottom}V{top}H{right}V{bottom}z")
        title = Markup("<title>{}</title>").format(plain(stack.label))
        parts.append(Markup('<path class="bar {}" d="{}">{}</path>').format(stack.kind, "".join(path), title))
        below = below + np.asarray(stack.counts, float)
    inside = [mark for mark in marks if edges[0] <= mark.value <= edges[-1]]
    for line, mark in enumerate(inside):  # one label under the other
        x, top = frame.place(mark.value, frame.y_high)
        anchor, at = ("end", x - 4) if x > WIDTH - 110 else ("start", x + 4)
        parts.append(Markup('<path class="cut-mark" d="M{} {}V{}"/>').format(x, top, HEIGHT - BOTTOM))
        parts.append(
            Markup('<text class="cut-label" x="{}" y="{}" text-anchor="{}">{} {}</text>').format(
                at, top + 10 + 12 * line, anchor, mark.label, f"{mark.value:.4g}".replace("-", "−")
            )
        )
    return _svg(parts, f"histogram of {x_label}", WIDTH)


def _thinned(line: Line, *, between: tuple[float, float] | None) -> Line:
    """The curve at its finite points, and at most MAX_POINTS of them; its band clipped to what is given."""
    x, y = np.asarray(line.x, float), np.asarray(line.y, float)
    banded = len(line.low) == len(x) and len(x) > 0
    low, high = (np.asarray(side, float) if banded else y for side in (line.low, line.high))
    fine = np.isfinite(x) & np.isfinite(y) & np.isfinite(low) & np.isfinite(high)
    columns = [column[fine] for column in (x, y, low, high)]
    if len(columns[0]) > MAX_POINTS:
        columns = [np.array([part.mean() for part in np.array_split(column, MAX_POINTS)]) for column in columns]
    x, y, low, high = columns
    if between is not None:
        low, high = np.clip(low, *between), np.clip(high, *between)
    return Line(line.label, x, y, line.colour, low if banded else (), high if banded else (), line.dash)


def _padded(low: float, high: float) -> tuple[float, float]:
    """A range with some room above, and below where it goes under 0; never empty."""
    room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return low - (room if low < 0 else 0.0), high + room


@dataclass(frozen=True)
class _Frame:
    """The plot's area, in units of the data."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    width: int = WIDTH

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a point of the data lies in the drawing."""
        across = (x - self.x_low) / (self.x_high - self.x_low)
        up = (y - self.y_low) / (self.y_high - self.y_low)
        return round(LEFT + across * (self.width - LEFT - RIGHT), 1), round(
            HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM), 1
        )

    def points(self, pairs) -> str:
        """The points of a polyline."""
        return " ".join("{},{}".format(*self.place(float(x), float(y))) for x, y in pairs)

    def grid(self, x_label: str, y_label: str, *, y_text) -> Markup:
        """Grid lines, tick labels and the axes' names."""
        parts = []
        for value in ticks(self.y_low, self.y_high):
            _, y = self.place(self.x_low, value)
            parts.append(Markup('<path class="grid" d="M{} {}H{}"/>').format(LEFT, y, self.width - RIGHT))
            parts.append(
                Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(LEFT - 6, y + 3.5, y_text(value))
            )
        for value in ticks(self.x_low, self.x_high):
            x, _ = self.place(value, self.y_low)
            parts.append(
                Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(
                    x, HEIGHT - BOTTOM + 14, number(value)
                )
            )
        middle = (LEFT + self.width - RIGHT) / 2
        parts.append(Markup('<path class="axis" d="M{} {}H{}"/>').format(LEFT, HEIGHT - BOTTOM, self.width - RIGHT))
        parts.append(
            Markup('<text class="name" x="{}" y="{}" text-anchor="middle">{}</text>').format(
                middle, HEIGHT - 6, plain(x_label)
            )
        )
        parts.append(Markup("<desc>{}</desc>").format(plain(y_label)))
        return Markup("").join(parts)


def _svg(parts: Sequence[Markup], label: str, width: int) -> Markup:
    head = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
        width, HEIGHT, plain(label)
    )
    return head + Markup("").join(parts) + Markup("</svg>")
