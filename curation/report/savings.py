"""What one method saves against uniform, at equal quality, on each of the four axes.

The share of uniform's cost that a method does not need to come to uniform's own last value. A method that never gets
there is compared at its own best instead, which makes the saving what it is: negative. Costs before the first step
(reference, cache) count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from curation.numerics.intervals import Interval, t_interval
from curation.report.curves import AXES
from curation.report.training import Arm


class Saving(NamedTuple):
    """What an arm saves against uniform on one axis; negative if it costs more."""

    axis: str
    quality: float
    """Mean over seeds of the value at which they are compared."""
    reached: bool
    """False if the arm never came to uniform's last value, and they are compared at its own best."""
    share: Interval
    num_seeds: int
    """Seeds that both were trained with; they are compared pairwise."""
    not_counted: Sequence[str]


def savings(arm: Arm, uniform: Arm, metric: str) -> list[Saving]:
    """What `arm` saves against `uniform` on each axis, paired by seed; empty where no seed was measured in both."""
    pairs = _pairs(arm, uniform, metric)
    if not pairs or any(not len(mine) or not len(theirs) for mine, theirs in pairs):
        return []
    found = []
    for axis in AXES:
        each = [_saving(m, u, axis, metric, arm.before.get(axis, 0.0), uniform.before.get(axis, 0.0)) for m, u in pairs]
        shares, qualities, reached = zip(*each, strict=True)
        unknown = arm.not_counted if axis in ("flops", "seconds") else ()
        found.append(Saving(axis, float(np.mean(qualities)), all(reached), t_interval(shares), len(pairs), unknown))
    return found


def rival_of(arm: Arm, uniforms: Sequence[Arm]) -> Arm | None:
    """Which uniform arm an arm is held against: one of the same pool and number of steps, else the first.

    None if there is none, or it is the arm itself.
    """
    alike = [each for each in uniforms if _setting(each) == _setting(arm)]
    rival = next(iter([*alike, *uniforms]), None)
    return None if rival is arm else rival


def _setting(arm: Arm) -> tuple[Any, Any]:
    recipe = arm.runs[0].recipe
    return recipe.get("data", {}).get("run"), recipe.get("train", {}).get("num_steps")


def _pairs(arm: Arm, uniform: Arm, metric: str) -> list[tuple[pa.Table, pa.Table]]:
    """The evaluations of both at each seed that both have, where the metric is known."""
    mine, theirs = (
        {
            run.recipe.get("seed"): table.filter(pa.array(np.isfinite(np.array(table[metric].to_pylist(), float))))
            for run, table in zip(each.measured, each.tables(), strict=True)
        }
        for each in (arm, uniform)
    )
    return [(mine[seed], theirs[seed]) for seed in mine if seed in theirs]


def _saving(
    mine: pa.Table, theirs: pa.Table, axis: str, metric: str, mine_before: float, theirs_before: float
) -> tuple[float, float, bool]:
    """Saved share, the quality at which it is measured, and whether that is the rival's last value."""
    goal = float(theirs[metric][-1].as_py())
    reached = max(mine[metric].to_pylist()) >= goal
    quality = goal if reached else min(max(mine[metric].to_pylist()), max(theirs[metric].to_pylist()))
    cost = _first_at(mine, axis, metric, quality) + mine_before
    rival = _first_at(theirs, axis, metric, quality) + theirs_before
    return 1 - cost / rival, quality, reached


def _first_at(table: pa.Table, axis: str, metric: str, quality: float) -> float:
    """The cost at which a curve first comes to a value that it does come to, between two evaluations by a line."""
    cost, value = (np.asarray(table[name].to_pylist(), float) for name in (axis, metric))
    place = int(np.argmax(value >= quality))
    if place == 0:
        return float(cost[0])
    part = (quality - value[place - 1]) / (value[place] - value[place - 1])
    return float(cost[place - 1] + part * (cost[place] - cost[place - 1]))
