"""`python -m jobs.train RECIPE --data.run RUN --output DIR`: train on what a method selects, step by step.

RUN is the folder of a `jobs.curate` run, whose embeddings are the reference. The same command with
`--method '{"name": "uniform"}' --train.filter-ratio 0` trains on everything, as a rival.

Exit code 0: all steps are done. 1: the run failed, and says why; the same command goes on from its last checkpoint. 2:
the command or the recipe is wrong. 3: another run holds the output. 4: it was stopped by --max-hours or SIGTERM, after
a checkpoint; the same command goes on from there.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import asdict
from typing import Any

from curation.distributed import logs
from curation.distributed.stopping import Stop
from curation.distributed.train import TrainSummary, TrainWatch, check, train
from curation.recipe import TrainRecipe
from jobs import log
from jobs.command import Command, exit_code
from jobs.recipes import TRAIN


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return Command("train", __doc__).run(
        arguments, recipes=TRAIN, recipe_type=TrainRecipe, job=run_training, dry_run=print_plan
    )


def run_training(recipe: TrainRecipe, stop: Stop) -> int:
    """Train, with a line now and then; returns the exit code."""
    summary = train(recipe, watch=TrainProgress(), stop=stop)
    print_summary(recipe, summary)
    return exit_code(summary.failures, summary.stopped)


class TrainProgress(TrainWatch):
    """A line now and then that says how far the run is: renewed in place on a terminal."""

    def __init__(self) -> None:
        self._in_place = sys.stderr.isatty() and not logs.is_json()
        self._num_steps = 0

    def planned(self, recipe: TrainRecipe, *, rows: int, done: int) -> None:
        """Say what is ahead."""
        self._num_steps = recipe.train.num_steps
        train = recipe.train
        log.say(
            f"{recipe.method['name']}: {train.num_steps:,} steps on {train.sub_batch:,} of {train.super_batch:,} rows, "
            f"{rows:,} in the pool, {recipe.compute.workers} workers; {done:,} steps done before",
            steps=train.num_steps,
            done_before=done,
            rows=rows,
        )

    def held_out(self, told: dict[str, int]) -> None:
        """Before any figure: what of the held-out samples the pool holds."""
        held, evaluated = told["held_by_the_pool"], told["evaluated"]
        share = held / evaluated
        log.say(
            f"the pool holds {held:,} of the {evaluated:,} held-out samples ({share:.1%}, by uid or equal bytes)",
            **told,
        )

    def progress(self, noted: dict[str, Any]) -> None:
        """Say how far it is."""
        step = noted["step"]
        left = (self._num_steps - step) * noted["step_seconds"]
        line = f"step {step:,}/{self._num_steps:,}, loss {noted['loss']:.3f}, {noted['step_seconds']:.2f} s a step, "
        if self._in_place:
            print(f"{line + f'{left:,.0f} s left':<78}", end="\r", file=sys.stderr, flush=True)
        else:
            log.say(line + f"{left:,.0f} s left", **noted)

    def stalled(self, lines: list[str]) -> None:
        """Say on whom the run waits."""
        for line in lines:
            log.say(f"warning: {line}", level=logging.WARNING)


def print_plan(recipe: TrainRecipe) -> None:
    """What a run of this recipe would do, after all checks that need no Ray."""
    rows = check(recipe)
    TrainProgress().planned(recipe, rows=rows, done=0)


def print_summary(recipe: TrainRecipe, summary: TrainSummary) -> None:
    """The account of a run, as a table, or as one JSON line."""
    if logs.is_json():
        log.say("summary", **asdict(summary))
        return
    rows: list[tuple[str, Any]] = [
        ("steps", summary.steps),
        ("samples loaded", summary.samples_loaded),
        ("samples trained", summary.samples_trained),
        ("samples not decoded", summary.samples_not_decoded),
        ("rounds of the pool", summary.rounds),
        ("FLOPs", float(f"{summary.flops:.4g}")),
        ("seconds", summary.seconds),
    ]
    rows += [(name, round(value, 4)) for name, value in summary.last.items() if isinstance(value, float)]
    rows += [(f"ledger {name}", value) for name, value in summary.ledger.items()]
    width = max(len(name) for name, _ in rows)
    print()
    for name, value in rows:
        print(f"  {name:<{width}}  {value:>18,}" if isinstance(value, int | float) else f"  {name:<{width}}  {value}")
    for warning in summary.warnings:
        log.say(f"WARNING: {warning}", level=logging.WARNING)
    if not summary.failures and not summary.stopped:
        print(f"\n{recipe.output}/train: learner.pt has the weights, steps.parquet and evaluations.parquet the log")


if __name__ == "__main__":
    sys.exit(main())
