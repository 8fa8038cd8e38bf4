"""Learning curves against what they cost: samples trained, samples loaded, FLOPs, seconds, side by side.

A method that looks at more samples than it trains on is ahead on the first axis by design; whether it is ahead on the
others is the question. What was spent before the first step (a reference, its cache) is added to the axes it belongs
to. A line is the mean over seeds, the band runs from the lowest to the highest of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO

import matplotlib
import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure

AXES = {
    "samples_trained": "samples trained",
    "samples_loaded": "samples loaded",
    "flops": "FLOPs",
    "seconds": "seconds",
}
matplotlib.rcParams["svg.hashsalt"] = "curation"  # the same figures give the same bytes


@dataclass(frozen=True)
class Curve:
    """One method's evaluations, a table for each seed, and what it had spent before its first step."""

    label: str
    seeds: Sequence[pa.Table]
    before: Mapping[str, float]
    """By the names in AXES; 0 where none is given."""

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ValueError(f"curve {self.label!r} has no seed")
        if unknown := sorted(self.before.keys() - AXES.keys()):
            raise ValueError(f"before: no axis {unknown[0]!r}, there are {sorted(AXES)}")
        steps = [table["step"].to_pylist() for table in self.seeds]
        if any(other != steps[0] for other in steps):
            raise ValueError(f"curve {self.label!r}: the seeds were not evaluated at the same steps, {steps}")

    def along(self, axis: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean cost (E,) and the metric (seeds, E) at E evaluations."""
        cost = np.array([table[axis].to_pylist() for table in self.seeds], dtype=float).mean(axis=0)
        values = np.array([table[metric].to_pylist() for table in self.seeds], dtype=float)
        return cost + self.before.get(axis, 0.0), values


def draw(curves: Sequence[Curve], *, metric: str, title: str, file: IO[bytes], kind: str = "png") -> None:
    """Draw the metric of all curves against each of AXES. `kind` is png or svg."""
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    panels = figure.subplots(1, len(AXES), sharey=True)
    for panel, (axis, name) in zip(panels, AXES.items(), strict=True):
        for number, curve in enumerate(curves):
            cost, values = curve.along(axis, metric)
            panel.plot(cost, values.mean(axis=0), color=f"C{number}", label=curve.label)
            panel.fill_between(cost, values.min(axis=0), values.max(axis=0), color=f"C{number}", alpha=0.2, linewidth=0)
        panel.set_xlabel(name)
        panel.grid(alpha=0.3)
        panel.set_xlim(left=0)
    panels[0].set_ylabel(metric)
    panels[-1].legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(file, format=kind, dpi=130, metadata={"Date": None} if kind == "svg" else None)
