"""Training runs beside each other: arms of seeds, and their curves.

An arm is all the runs whose recipes differ in their seeds only. Costs before the first step (reference, cache) count.

E evaluations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from curation.numerics.intervals import Interval, t_interval
from curation.report import costs
from curation.report.charts import MAX_POINTS, Line, look
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
    dash: int

    @property
    def is_uniform(self) -> bool:
        """True for the rival of all: rows taken as they come."""
        recipe = self.runs[0].recipe
        return recipe.get("method", {}).get("name") == "uniform" and not recipe.get("train", {}).get("filter_ratio")

    @property
    def look(self) -> str:
        """The style sheet's classes for the arm's curves, and for the squares that stand for them."""
        return f"s{self.colour} d{self.dash}"

    @property
    def measured(self) -> list[TrainingRun]:
        """The seeds that were evaluated at all."""
        return [run for run in self.runs if len(run.evaluations)]

    def tables(self) -> list[pa.Table]:
        """The measured seeds' evaluations, at the steps where all of them were measured."""
        steps = [run.evaluations["step"].to_pylist() for run in self.measured]
        common = set.intersection(*map(set, steps)) if steps else set()
        return [
            run.evaluations.filter(pa.array([step in common for step in its_steps], pa.bool_()))
            for run, its_steps in zip(self.measured, steps, strict=True)
        ]

    def curve(self) -> Curve:
        """As `curves.draw` takes it."""
        return Curve(self.label, self.tables(), self.before)

    def last(self, column: str) -> Interval | None:
        """Mean and interval over the measured seeds of a column at their last common step; None where one has none."""
        values = [last_of(table, column) for table in self.tables()]
        known = [value for value in values if value is not None and np.isfinite(value)]
        return t_interval(known) if known and len(known) == len(values) else None

    def total(self, column: str) -> float | None:
        """Mean over seeds of what each had spent at its last step, as far as they noted it."""
        known = [spent for run in self.runs if (spent := last_of(run.steps, column)) is not None]
        return float(np.mean(known)) if known else None

    def short(self) -> list[str]:
        """Which seeds did not come as far as the others, and at which step they are compared therefore."""
        ends = [int(last_of(run.steps, "step") or 0) for run in self.runs]
        told = [
            f"seed {run.recipe.get('seed')} came to step {end} of {max(ends)}"
            for run, end in zip(self.runs, ends, strict=True)
            if end < max(ends)
        ]
        if not self.measured:
            return told
        told += [f"seed {run.recipe.get('seed')} was never measured" for run in self.runs if not len(run.evaluations)]
        compared = last_of(self.tables()[0], "step")
        if any(last_of(run.evaluations, "step") != compared for run in self.measured):
            told.append("measured at no common step" if compared is None else f"measured at step {compared:.0f}")
        return told


def arms(
    runs: Sequence[TrainingRun], pools: Mapping[str, CurationRun], references: Mapping[str, TrainingRun]
) -> list[Arm]:
    """The arms of some runs, in order of their first run. `pools`, `references`: by the URL of the training run."""
    grouped: dict[str, list[TrainingRun]] = {}
    for run in runs:
        grouped.setdefault(run.arm, []).append(run)
    labels = _labels([seeds[0] for seeds in grouped.values()])
    found = []
    for place, (label, seeds) in enumerate(zip(labels, grouped.values(), strict=True)):
        noted = next((run for run in seeds if len(run.steps)), seeds[0])
        before, unknown = _before(noted, pools.get(noted.url), references.get(noted.url))
        found.append(Arm(label, seeds, before, unknown, *look(place)))
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
        if not any(len(table) for table in arm.tables()):
            continue
        cost_E, values_SE = arm.curve().along(axis, metric)
        lines.append(_banded(arm, cost_E, values_SE))
    return lines


def step_lines(found: Sequence[Arm], column: str) -> list[Line]:
    """A line for each arm of a column of the step log, over samples trained, as `curve_lines` are.

    It ends where the first of the seeds that noted anything ends.
    Stretches of steps are averaged within a seed first: an interval of single steps would be one of their noise.
    """
    lines = []
    for arm in found:
        logs = [run.steps for run in arm.runs if len(run.steps)]
        if not logs or any(column not in log.column_names for log in logs):
            continue
        length = min(map(len, logs))
        x = _stretches(np.asarray(logs[0]["samples_trained"].to_pylist()[:length], float))
        values_SE = np.array(
            [
                _stretches(np.array([np.nan if v is None else v for v in log[column].to_pylist()[:length]]))
                for log in logs
            ]
        )
        if np.isfinite(values_SE).all(axis=0).any():
            lines.append(_banded(arm, x, values_SE))
    return lines


def _stretches(values: np.ndarray) -> np.ndarray:
    """The means of at most MAX_POINTS stretches."""
    return np.array([part.mean() for part in np.array_split(values, min(MAX_POINTS, len(values)))])


def _banded(arm: Arm, x: np.ndarray, values_SE: np.ndarray) -> Line:
    """The mean over seeds, in the band of its 95% t interval if there are several."""
    if len(values_SE) == 1:
        return Line(arm.label, x, values_SE[0], arm.colour, dash=arm.dash)
    mean = values_SE.mean(axis=0)
    known = np.isfinite(mean)
    half = np.full(len(mean), np.nan)
    half[known] = [t_interval(column.tolist()).half_width for column in values_SE.T[known]]
    return Line(arm.label, x, mean, arm.colour, mean - half, mean + half, arm.dash)


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
