"""`python -m jobs.curate RECIPE --pool.shards 'PATTERN' --output DIR`: a pool of shards becomes tables and a kept set.

Exit code 0: every sample that was read is accounted for. 1: the run failed, and says why; what it committed stays, and
the same command goes on from there. 2: the command or the recipe is wrong. 3: another run holds the output. 4: it was
stopped by --max-hours or SIGTERM; what it committed stays.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice

from curation.data.redact import redacted
from curation.distributed import logs
from curation.distributed.account import Summary
from curation.distributed.audit import warned_groups
from curation.distributed.pipeline import Plan, Record, Watch, curate, make_plan
from curation.distributed.stopping import Stop
from curation.recipe import CurateRecipe
from jobs import log
from jobs.command import Command, exit_code
from jobs.recipes import CURATE

LINE_EVERY_S = 10.0
AUDIT_LINES = 10


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return Command("curate", __doc__).run(
        arguments,
        recipes=CURATE,
        recipe_type=CurateRecipe,
        job=_curate,
        dry_run=lambda recipe: print_plan(recipe, make_plan(recipe)),
    )


def _curate(recipe: CurateRecipe, stop: Stop) -> int:
    if recipe.embed.has_random_weights:
        log.say(f"note: {recipe.embed.model} has random weights, so its scores mean nothing")
    summary = curate(recipe, watch=Progress(), stop=stop)
    print_summary(recipe, summary)
    return exit_code(summary.failures, summary.stopped)


class Progress(Watch):
    """One line that says how far the run is: renewed in place on a terminal, every 10 s in a log."""

    def __init__(self) -> None:
        self._total = self._done = self._images = 0
        self._begun = self._printed = time.time()
        self._in_place = sys.stderr.isatty() and not logs.is_json()

    def planned(self, plan: Plan) -> None:
        """Say what is ahead."""
        self._total, self._begun = len(plan.todo), time.time()
        there = len(plan.pool) - len(plan.todo)
        counts = f"{len(plan.pool):,} shards, {there:,} committed before, {self._total:,} to do"
        log.say(f"pool: {counts}", shards=len(plan.pool), committed_before=there, todo=self._total)
        for url in plan.absent[:10]:
            log.say(f"warning: {url} is named but not there", level=logging.WARNING, url=url)

    def committed(self, record: Record) -> None:
        """Count a shard."""
        self._done += 1
        self._images += record.get("embedded", 0)
        now = time.time()
        if self._in_place or now - self._printed >= LINE_EVERY_S or self._done == self._total:
            self._printed = now
            seconds = now - self._begun
            left = seconds / self._done * (self._total - self._done)
            line = (
                f"embed: {self._done:,}/{self._total:,} shards, {self._images:,} images, "
                f"{self._images / seconds:,.0f} images/s, {left:,.0f} s left"
            )
            if self._in_place and self._done < self._total:
                print(f"{line:<78}", end="\r", file=sys.stderr, flush=True)
            else:
                log.say(line, done=self._done, total=self._total, images=self._images, seconds=round(seconds, 1))

    def stalled(self, lines: list[str]) -> None:
        """Say on whom the run waits."""
        for line in lines:
            log.say(f"warning: {line}", level=logging.WARNING)

    def stage(self, name: str) -> None:
        """Say which stage begins."""
        log.say(f"{name} ...", stage=name)


def print_plan(recipe: CurateRecipe, plan: Plan) -> None:
    """What a run of this recipe would do, without the secrets in its URLs."""
    print("\n".join(map(redacted, _plan_lines(recipe, plan))))


def _plan_lines(recipe: CurateRecipe, plan: Plan) -> Iterator[str]:
    retired = sum(shard.retired for shard in plan.shards)
    yield f"recipe {recipe.name}: {recipe.embed.model} on {recipe.compute.device}, output {recipe.output}"
    counts = f"{len(plan.todo):,} to embed, {retired:,} retired, {len(plan.absent):,} absent"
    yield f"pool: {len(plan.pool):,} shards; {counts}"
    for shard in plan.todo[:5]:
        yield f"  embed  {shard.number:08d}  {shard.url}"
    if len(plan.todo) > 5:
        yield f"  ... and {len(plan.todo) - 5:,} more"
    for exclude in recipe.exclude:
        yield f"  leave out {exclude.name}: by {exclude.by}, {exclude.files}"
    if recipe.holdout:
        yield f"  hold out {', '.join(recipe.holdout.parts)}; choose from {recipe.holdout.keep}"
    for name, run in recipe.decontaminate.sets.items() if recipe.decontaminate else ():
        yield f"  leave out copies in {name}: {run}"
    for column in recipe.columns:
        yield f"  make column {column.name}: {column.make}"
    for step in recipe.selection:
        yield f"  select {step.name}: {step.model_dump(exclude_defaults=True)}"
    yield f"  write  {'tables and tars' if recipe.write.tars else 'tables'}"


def print_summary(recipe: CurateRecipe, summary: Summary) -> None:
    """The account of a run, as a table, or as one JSON line."""
    if logs.is_json():
        log.say("summary", **asdict(summary))
        return
    rows = [("read", summary.read), ("embedded", summary.embedded)]
    rows += [(f"dropped {reason}", count) for reason, count in summary.dropped.items()]
    rows += [("selected", summary.selected)] if summary.selected is not None else []
    rows += [(f"warning {name}", count) for name, count in summary.warnings.items()]
    rows += [(f"images/s {stage}", rate) for stage, rate in summary.images_per_second.items()]
    width = max(len(name) for name, _ in rows)
    print()
    for name, value in rows:
        print(f"  {name:<{width}}  {value:>12,}")
    if summary.bottleneck:
        print(f"  {'bottleneck':<{width}}  {summary.bottleneck}")
    print(f"  {'seconds':<{width}}  {summary.seconds:>12,.1f}")
    if summary.waterfall:
        print_waterfall(summary)
        print_audit(recipe.output)
    if not summary.failures and not summary.stopped:
        print(f"\n{recipe.output}: selection/ has the kept set, samples/ the tables, README.md the card")


def print_waterfall(summary: Summary) -> None:
    """What each step of the selection removed."""
    width = max(len("left out by"), *(len(name) for name, _, _ in summary.waterfall))
    print(f"\n  {'left out by':<{width}}  {'rows in':>12}  {'removed':>12}  {'rows out':>12}")
    for name, before, after in summary.waterfall:
        print(f"  {name:<{width}}  {before:>12,}  {before - after:>12,}  {after:>12,}")


def print_audit(output: str) -> None:
    """The groups that the selection keeps much more, or much less, often than others."""
    for row in islice(warned_groups(output), AUDIT_LINES):
        kept = f"{row['rows_out']:,} of {row['rows_in']:,} kept, lift {row['lift']:.2f}"
        print(f"warning: {row['column']} {row['group']!r}: {kept}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
