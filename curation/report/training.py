"""Training runs beside each other: arms of seeds, their curves, and what one method saves against uniform.

An arm is all the runs whose recipes differ in their seeds only. A saving is at equal quality: the share of uniform's
cost that a method does not need to come to uniform's own last value. A method that never gets there is compared at its
own best instead, which makes the saving what it is: negative. Costs before the first step (reference, cache) count.

E evaluations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from curation.numerics.intervals import Interval, t_interval
from curation.report import costs
from curation.report.charts import Line
from curation.report.costs import Prices
from curation.report.curves import AXES, Curve
from curation.report.folder import CurationRun, TrainingRun
from curation.training.flops import TRAINING_PASS

NOT_METRICS = frozenset({"step", "evaluate_seconds", "held_out_loss", *AXES})
"""Columns of evaluations that are no measure of quality, or of which less is better."""
PREFERRED = ("mean_r1", "zero_shot_top1", "accuracy")


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seeds only."""

    label: str
    runs: Sequence[TrainingRun]
    before: Mapping[str, float]
    """What was spent before the first step, by the names in AXES."""
    not_counted: Sequence[str]
    """What was spent before and is not known."""
    colour: int

    @property
    def is_uniform(self) -> bool:
        """True for the rival of all: rows taken as they come."""
        recipe = self.runs[0].recipe
        return recipe.get("method", {}).get("name") == "uniform" and not recipe.get("train", {}).get("filter_ratio")

    def tables(self) -> list[pa.Table]:
        """The seeds' evaluations at the steps where all of them were measured."""
        common = set.intersection(*(set(run.evaluations["step"].to_pylist()) for run in self.runs))
        return [
            run.evaluations.filter(pa.array([step in common for step in run.evaluations["step"].to_pylist()]))
            for run in self.runs
        ]

    def curve(self) -> Curve:
        """As `curves.draw` takes it."""
        return Curve(self.label, self.tables(), self.before)

    def last(self, column: str) -> Interval | None:
        """Mean and interval over seeds of a column's last value; None where a seed has none."""
        values = [last_of(run.evaluations, column) for run in self.runs]
        known = [value for value in values if value is not None]
        return t_interval(known) if len(known) == len(values) else None


class Saving(NamedTuple):
    """What an arm saves against uniform on one axis; negative if it costs more."""

    axis: str
    quality: float
    """Mean over seeds of the value at which they are compared."""
    reached: bool
    """False if the arm never came to uniform's last value, and they are compared at its own best."""
    share: Interval
    not_counted: Sequence[str]


def arms(
    runs: Sequence[TrainingRun], pools: Mapping[str, CurationRun], references: Mapping[str, TrainingRun]
) -> list[Arm]:
    """The arms of some runs, in order of their first run. `pools`, `references`: by the URL of the training run."""
    grouped: dict[str, list[TrainingRun]] = {}
    for run in runs:
        grouped.setdefault(run.arm, []).append(run)
    labels = _labels([seeds[0] for seeds in grouped.values()])
    found = []
    for colour, (label, seeds) in enumerate(zip(labels, grouped.values(), strict=True)):
        before, unknown = _before(seeds[0], pools.get(seeds[0].url), references.get(seeds[0].url))
        found.append(Arm(label, seeds, before, unknown, colour))
    return found


def metrics_of(found: Sequence[Arm]) -> list[str]:
    """Measures of quality that all arms have, the one to show first in front."""
    named = [set(run.evaluations.column_names) for arm in found for run in arm.runs if len(run.evaluations)]
    if not named:
        return []
    common = set.intersection(*named) - NOT_METRICS
    return sorted(common, key=_order)


def _order(metric: str) -> tuple[int, str, int]:
    """Those to show first, then by name, r5 before r10."""
    name = metric.rstrip("0123456789")
    first = PREFERRED.index(metric) if metric in PREFERRED else len(PREFERRED)
    return first, name, int(metric[len(name) :] or 0)


def curve_lines(found: Sequence[Arm], axis: str, metric: str) -> list[Line]:
    """A line for each arm: the mean over seeds, in the band of its 95% t interval."""
    lines = []
    for arm in found:
        if not all(len(table) for table in arm.tables()):
            continue
        cost_E, values_SE = arm.curve().along(axis, metric)
        around = [t_interval(column.tolist()) for column in values_SE.T]
        mean = np.array([each.mean for each in around])
        half = np.array([each.half_width or 0.0 for each in around])
        has_band = len(arm.runs) > 1
        low, high = (mean - half, mean + half) if has_band else ((), ())
        lines.append(Line(arm.label, cost_E, mean, arm.colour, low, high))
    return lines


def step_lines(found: Sequence[Arm], column: str) -> list[Line]:
    """A line for each arm of a column of the step log, over samples trained: the mean over seeds."""
    lines = []
    for arm in found:
        logs = [run.steps for run in arm.runs if column in run.steps.column_names and len(run.steps)]
        if len(logs) < len(arm.runs):
            continue
        length = min(map(len, logs))
        x = np.asarray(logs[0]["samples_trained"].to_pylist()[:length], float)
        y = np.array([[np.nan if v is None else v for v in log[column].to_pylist()[:length]] for log in logs], float)
        if np.isfinite(y).all(axis=0).any():
            lines.append(Line(arm.label, x, y.mean(axis=0), arm.colour))
    return lines


def savings(arm: Arm, uniform: Arm, metric: str) -> list[Saving]:
    """What `arm` saves against `uniform` on each axis, paired by seed; empty where one was never measured."""
    pairs = list(zip(arm.tables(), uniform.tables(), strict=False))
    if any(not len(mine) or not len(theirs) for mine, theirs in pairs):
        return []
    found = []
    for axis in AXES:
        each = [_saving(m, u, axis, metric, arm.before.get(axis, 0.0), uniform.before.get(axis, 0.0)) for m, u in pairs]
        shares, qualities, reached = zip(*each, strict=True)
        unknown = arm.not_counted if axis in ("flops", "seconds") else ()
        found.append(Saving(axis, float(np.mean(qualities)), all(reached), t_interval(shares), unknown))
    return found


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


def _before(
    run: TrainingRun, pool: CurationRun | None, reference: TrainingRun | None
) -> tuple[dict[str, float], list[str]]:
    """What reference and cache cost, by axis, and what of it is not known."""
    if not costs.needs_reference(run):
        return {}, []
    spent = costs.training_costs(run, pool, reference, Prices())[:2]
    unknown = [f"seconds of the {cost.part}" for cost in spent if cost.seconds is None]
    before = {"seconds": sum(cost.seconds or 0.0 for cost in spent), "flops": 0.0}
    if reference is not None and len(reference.steps):
        before["flops"] += float(reference.steps["flops"][-1].as_py())
    else:
        unknown.append("FLOPs of the reference")
    forward = _forward_flops(run)
    model = pool.whole_recipe.get("embedded_by", {}).get("embed.model") if pool else None
    if pool is not None and forward is not None and model == run.recipe.get("learner", {}).get("model"):
        before["flops"] += forward * sum(pool.records[number]["embedded"] for number in pool.numbers)
    else:
        unknown.append("FLOPs of the cache")
    return before, unknown


def _forward_flops(run: TrainingRun) -> float | None:
    """The learner's forward pass per row, from what a step cost; None if a step did more than score and train."""
    train = run.recipe.get("train", {})
    if not len(run.steps) or run.recipe.get("reference", {}).get("online") or train.get("micro_batches", 1) > 1:
        return None
    sub_batch, ratio = train["sub_batch"], train["filter_ratio"]
    scored = round(sub_batch / (1 - ratio)) if costs.needs_reference(run) else 0
    return float(run.steps["flops"][0].as_py()) / (scored + TRAINING_PASS * sub_batch)


def _labels(firsts: Sequence[TrainingRun]) -> list[str]:
    """A name for each arm: its method, and as much more as tells it from the others."""
    names = [str(run.recipe.get("method", {}).get("name", run.label)) for run in firsts]
    details = [f"{run.recipe.get('train', {}).get('num_steps', '?')} steps" for run in firsts]
    labels = [f"{n}, {d}" if names.count(n) > 1 else n for n, d in zip(names, details, strict=True)]
    return [
        f"{each} ({run.label})" if labels.count(each) > 1 else each for each, run in zip(labels, firsts, strict=True)
    ]


def last_of(table: pa.Table, column: str) -> float | None:
    """A column's last value; None if there is none."""
    return table[column][-1].as_py() if column in table.column_names and len(table) else None


def lorenz(usage: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of the samples, most used first, and the share of all uses that is theirs; from counts by uses (u,)."""
    samples = usage[::-1].astype(float)
    uses = samples * np.arange(len(usage))[::-1]
    if not uses.sum():
        return np.zeros(0), np.zeros(0)
    return np.concatenate([[0.0], np.cumsum(samples) / samples.sum()]), np.concatenate(
        [[0.0], np.cumsum(uses) / uses.sum()]
    )
