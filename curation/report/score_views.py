"""Scores as histograms, what was kept apart from what was not, with the places at which the recipe's steps cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from curation.recipe import Step, Threshold
from curation.report.charts import Bars, Mark, histogram, widened
from curation.report.outcomes import ranking
from curation.report.scan import Scan

BINS = 48
PERCENTILES = (0, 5, 20, 50, 80, 95, 100)
NOT_YET = "not selected yet"


class ScoreView(NamedTuple):
    """A score's histogram and its percentiles, over all rows and over the kept ones."""

    name: str
    chart: Markup
    percentiles: list[tuple[int, float, float | None]]
    known: int


def score_views(found: Scan, steps: Sequence[Step], *, is_selected: bool) -> list[ScoreView]:
    """Each score over the rows of the sample; bins from the least to the greatest value."""
    return [_view(name, found, steps, is_selected=is_selected) for name in found.scores]


def _view(name: str, found: Scan, steps: Sequence[Step], *, is_selected: bool) -> ScoreView:
    values = found.scores[name].astype(float)
    known = np.isfinite(values)
    chosen = values[known & found.is_kept]
    edges = np.linspace(*widened(float(values[known].min()), float(values[known].max())), BINS + 1)
    of_kept, of_cut = (np.histogram(values[known & mask], edges)[0] for mask in (found.is_kept, ~found.is_kept))
    bars = [Bars("kept", "kept", of_kept), Bars("cut", "cut" if is_selected else NOT_YET, of_cut)]
    chart = histogram(edges, bars, x_label=name, marks=cuts(name, steps, chosen))
    table = [
        (q, float(np.percentile(values[known], q)), float(np.percentile(chosen, q)) if len(chosen) else None)
        for q in PERCENTILES
    ]
    return ScoreView(name, chart, table, int(known.sum()))


def cuts(name: str, steps: Sequence[Step], chosen: np.ndarray) -> list[Mark]:
    """Where steps cut a score: the limits of its filters, and if rows were ranked by it the lowest `chosen` value (k,).

    That is the ranking's own cut if no selector came after it; otherwise the cut may be lower.
    """
    limits = [step for step in steps if isinstance(step, Threshold) and step.column == name]
    marks = [Mark(step.at_least, "at least") for step in limits if step.at_least is not None]
    marks += [Mark(step.at_most, "at most") for step in limits if step.at_most is not None]
    ranked = ranking(steps)
    if ranked is not None and ranked.column == name and ranked.keeps_highest and len(chosen):
        marks.append(Mark(float(chosen.min()), "cut" if ranked.has_cut else "lowest kept"))
    return marks
