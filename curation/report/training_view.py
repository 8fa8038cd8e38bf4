"""What the page says of training runs: curves, what the steps were like, who was used how often, what it all cost."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from curation.data import storage
from curation.numerics.intervals import Interval
from curation.numerics.quantiles import gini
from curation.report import costs, training
from curation.report.charts import Line, Panel, line_chart
from curation.report.costs import Cost, Prices
from curation.report.curves import AXES
from curation.report.folder import CurationRun, Remembered, TrainingRun
from curation.report.savings import Saving, rival_of, savings
from curation.report.training import Arm

NARROW = 272
"""Width of a chart that stands with three others in a row."""
STEP_COLUMNS = (
    ("junk_share", "known junk among what is trained on", True),
    ("effective_clusters", "effective clusters in a sub-batch", False),
    ("duplicate_share", "copies in a sub-batch", True),
    ("learnability", "learnability of what is trained on", False),
    ("loss", "training loss", False),
)


class ArmView(NamedTuple):
    """A row of the table of arms: means over its seeds, and which of them are short of the others."""

    arm: Arm
    steps: float | None
    loaded: float | None
    trained: float | None
    flops: float | None
    seconds: float | None
    values: list[tuple[str, Interval | None]]
    short: list[str]


class SavingView(NamedTuple):
    """What an arm saves against the uniform arm that is its rival."""

    arm: Arm
    rival: Arm
    found: list[Saving]


class UsageView(NamedTuple):
    """How often one arm used its samples, at its first seed."""

    label: str
    look: str
    offered: int
    used: int
    uses: int
    gini: float


@dataclass(frozen=True)
class TrainingView:
    """All that is shown of some training runs."""

    arms: list[ArmView]
    metric: str | None
    curves: list[Panel]
    steps: list[Panel]
    usage: list[UsageView]
    usage_chart: Markup
    savings: list[SavingView]
    costs: list[tuple[Arm, list[Cost]]]
    recipes: list[tuple[str, str, Mapping[str, Any]]]
    """Label, recipe as JSON, and all that stands beside it."""
    commands: list[str]
    warnings: list[tuple[str, str]]
    """Label of a run, and what a reader must know of it before believing the rest."""

    @property
    def has_bands(self) -> bool:
        """True if some arm has several seeds."""
        return any(len(row.arm.runs) > 1 for row in self.arms)


def training_view(
    runs: Sequence[TrainingRun],
    *,
    pools: Mapping[str, CurationRun],
    references: Mapping[str, TrainingRun],
    memories: Mapping[str, Remembered],
    prices: Prices,
) -> TrainingView | None:
    """The view of the runs, None if there are none. The mappings go by the URL of a training run."""
    if not runs:
        return None
    arms = training.arms(runs, pools, references)
    metrics = training.metrics_of(arms)
    metric = metrics[0] if metrics else None
    curves = []
    for axis, name in AXES.items():
        chart = (
            line_chart(
                training.curve_lines(arms, axis, metric), x_label=name, y_label=metric, as_share=True, width=NARROW
            )
            if metric
            else Markup("")
        )
        curves += [Panel(name, chart)] if chart else []
    steps = []
    for column, title, as_share in STEP_COLUMNS:
        chart = line_chart(
            training.step_lines(arms, column), x_label="samples trained", y_label=title, as_share=as_share
        )
        steps += [Panel(title, chart)] if chart else []
    usage, lines = _usage(arms, memories)
    return TrainingView(
        arms=[_arm_view(arm, metrics) for arm in arms],
        metric=metric,
        curves=curves,
        steps=steps,
        usage=usage,
        usage_chart=line_chart(
            lines, x_label="samples, most used first (%)", y_label="share of all uses", as_share=True
        ),
        savings=_savings(arms, metric) if metric else [],
        costs=[(arm, _costs(arm, pools, references, prices)) for arm in arms],
        recipes=[(run.label, json.dumps(run.recipe, indent=1, ensure_ascii=False), run.whole_recipe) for run in runs],
        commands=[_command(run) for run in runs],
        warnings=[(run.label, warning) for run in runs for warning in _warnings(run)],
    )


def _command(run: TrainingRun) -> str:
    """What makes a run again."""
    return f"python -m jobs.train {shlex.quote(storage.join(run.url, 'recipe.json'))} --output AGAIN"


def _warnings(run: TrainingRun) -> list[str]:
    """What is unfinished of a run or was found wrong with it, as its own account has it."""
    summary, done = run.summary, int(training.last_of(run.steps, "step") or 0)
    found = [f"the run failed: {failure}" for failure in summary.get("failures", [])]
    if not summary:
        wanted = run.recipe.get("train", {}).get("num_steps", "?")
        found.append(
            f"the run has written no account, after {done:,} of {wanted} steps: it is under way, or was stopped"
        )
    elif summary.get("stopped"):
        found.append(f"the run was stopped at step {summary.get('steps', done):,}: {summary['stopped']}")
    if done > summary.get("steps", done):
        found.append(f"its log goes on to step {done:,}: it is under way again, or was killed after its account")
    return found + list(summary.get("warnings", []))


def _savings(arms: Sequence[Arm], metric: str) -> list[SavingView]:
    uniforms = [arm for arm in arms if arm.is_uniform]
    pairs = [(arm, rival) for arm in arms if (rival := rival_of(arm, uniforms)) is not None]
    saved = [SavingView(arm, rival, savings(arm, rival, metric)) for arm, rival in pairs]
    return [each for each in saved if each.found]


def _arm_view(arm: Arm, metrics: Sequence[str]) -> ArmView:
    totals = {name: arm.total(name) for name in AXES}
    return ArmView(
        arm,
        arm.total("step"),
        totals["samples_loaded"],
        totals["samples_trained"],
        totals["flops"],
        totals["seconds"],
        [(metric, arm.last(metric)) for metric in metrics],
        arm.short(),
    )


def _usage(arms: Sequence[Arm], memories: Mapping[str, Remembered]) -> tuple[list[UsageView], list[Line]]:
    found, lines = [], []
    for arm in arms:
        memory = memories.get(arm.runs[0].url)
        if memory is None or not memory.usage[1:].sum():
            continue
        samples, uses = training.lorenz(memory.usage)
        lines.append(Line(arm.label, 100 * samples, uses, arm.colour, dash=arm.dash))
        found.append(
            UsageView(
                arm.label,
                arm.look,
                offered=int(memory.usage.sum()),
                used=int(memory.usage[1:].sum()),
                uses=int((memory.usage * np.arange(len(memory.usage))).sum()),
                gini=gini(memory.usage),
            )
        )
    return found, lines


def _costs(
    arm: Arm, pools: Mapping[str, CurationRun], references: Mapping[str, TrainingRun], prices: Prices
) -> list[Cost]:
    run = arm.runs[0]
    return costs.training_costs(run, pools.get(run.url), references.get(run.url), prices)
