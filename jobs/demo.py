"""`python -m jobs.demo`: the whole engine on a pool that it makes itself, in less than ten minutes on two cores.

Makes a pool of rendered image-text pairs, most of them junk; trains a small reference CLIP on a small clean set;
curates the pool with `jobs.curate`'s own pipeline; and, since the truth about each sample is recorded aside, says how
much junk was in the pool and how much is in the kept set. Then a race, by `jobs.train`'s own: a fresh learner trains on
all of the pool, another on what JEST selects from it. At last `jobs.report`'s page of all this. Nothing here sees the
truth before it is printed, but for the races' logs. Run again, it does only what is not done.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.distributed.pipeline import curate
from curation.distributed.stopping import Interrupted
from curation.distributed.train import train
from curation.recipe import Compute, CurateRecipe, Embed, Pool, Select
from curation.report.curves import Curve, draw
from curation.report.page import Wanted
from curation.training.step import StepReport
from jobs.command import EXIT_OK, ended, exit_code, was_stopped
from jobs.curate import Progress, print_summary
from jobs.demo_pool import DemoPool, make_pool
from jobs.demo_race import METRIC, SUB_BATCH, race_recipe, write_held_out, write_mismatched
from jobs.demo_race import NUM_STEPS as NUM_RACE_STEPS
from jobs.demo_reference import MODEL, NUM_PAIRS, NUM_STEPS, train_reference
from jobs.report import write_report

KEEP_FRACTION = 0.3
REPORT_EVERY_STEPS = 50


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        "python -m jobs.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("out/demo"), help="where everything goes (out/demo)")
    parser.add_argument("--samples", type=int, default=20_000, help="size of the pool (20000)")
    parser.add_argument("--reference-pairs", type=int, default=NUM_PAIRS, help=f"size of the clean set ({NUM_PAIRS})")
    parser.add_argument("--reference-steps", type=int, default=NUM_STEPS, help=f"training steps ({NUM_STEPS})")
    parser.add_argument("--race-steps", type=int, default=NUM_RACE_STEPS, help=f"steps of the race ({NUM_RACE_STEPS})")
    parser.add_argument("--no-race", action="store_true", help="stop after the curated set")
    known = parser.parse_args(arguments)
    try:
        return _demo(known)
    except Interrupted as error:
        return was_stopped(error)


def _demo(known: argparse.Namespace) -> int:
    begun = time.time()
    pool = _pool(known.folder / "pool", samples=known.samples)
    checkpoint = _reference(known.folder, num_pairs=known.reference_pairs, num_steps=known.reference_steps)
    _say("3/5 curate: embed, score, keep 30%, write")
    recipe = CurateRecipe(
        name="demo",
        pool=Pool(shards=pool.shards),
        embed=Embed(model=MODEL, checkpoint=str(checkpoint), batch_size=64),
        compute=Compute(device="cpu"),
        selection=(Select(method={"name": "clip_score"}, keep_fraction=KEEP_FRACTION),),
        output=str(known.folder / "run"),
    )
    summary = curate(recipe, watch=Progress())
    print_summary(recipe, summary)
    if code := exit_code(summary.failures, summary.stopped):
        return code
    _say("4/5 the truth about the pool, and about what was kept")
    print_junk(known.folder / "run", pool)
    print(f"\nThe kept set: {known.folder}/run/shards/*.tar; who is who: {known.folder}/run/selection/selected.parquet")
    print(f"Everything else: {known.folder}/run (tables, drops, manifests, README.md)")
    runs = [known.folder / "run"]
    if not known.no_race:
        _say(f"\n5/5 a race: {known.race_steps} steps on everything, and on what JEST selects from five times as much")
        runs += race(known.folder, pool, samples=known.samples, num_steps=known.race_steps)
    again = shlex.join(["python", "-m", "jobs.report", *map(str, runs)])
    print(f"\nAll of this as one page: {write_report([str(run) for run in runs], Wanted(command=again))}")
    print(f"{time.time() - begun:.0f} s in all")
    return EXIT_OK


def _pool(folder: Path, *, samples: int) -> DemoPool:
    _say(f"1/5 a pool of {samples:,} rendered image-text pairs, about two thirds of them junk")
    return make_pool(
        folder, samples=samples, report=lambda done, total: _show(f"  {done}/{total} shards", done == total)
    )


def _reference(folder: Path, *, num_pairs: int, num_steps: int) -> Path:
    """The reference's checkpoint; trained only if these settings have not been trained here before."""
    _say(f"2/5 a reference: {MODEL} CLIP, {num_steps} steps on {num_pairs:,} clean pairs that are not in the pool")
    checkpoint = folder / f"reference-{num_pairs}x{num_steps}.pt"

    def report(step: int, total: int, seen: StepReport) -> None:
        if step % REPORT_EVERY_STEPS == 0 or step == total:
            _show(f"  step {step}/{total}, loss {seen.loss:.3f}", step == total)

    if not checkpoint.exists():
        train_reference(checkpoint, num_pairs=num_pairs, num_steps=num_steps, report=report)
    return checkpoint


def race(folder: Path, pool: DemoPool, *, samples: int, num_steps: int) -> list[Path]:
    """Train a learner by each method, print what they came to, draw their curves into race.png; the runs' folders."""
    held_out = write_held_out(folder / "held_out.tar")
    mismatched = write_mismatched(pool, folder / "mismatched.parquet")
    curves, runs = [], []
    print(f"\n  {'':<10}{'R@1 held out':>14}{'mismatched':>12}{'loaded':>10}{'trained':>10}{'seconds':>9}")
    for method in ("uniform", "jest"):
        recipe = race_recipe(
            run=folder / "run",
            output=folder / f"race-{method}-{num_steps}",
            held_out=held_out,
            mismatched=mismatched,
            method=method,
            num_steps=num_steps,
            sub_batch=min(SUB_BATCH, samples // 10),
        )
        summary = train(recipe)
        ended(summary, of=method)
        runs.append(Path(recipe.output))
        noted = runs[-1] / "train"
        curves.append(Curve(method, [pq.read_table(noted / "evaluations.parquet")], {}))
        share = float(np.mean(pq.read_table(noted / "steps.parquet")["junk_share"].to_numpy()))
        print(
            f"  {method:<10}{summary.last[METRIC]:>14.1%}{share:>12.1%}{summary.samples_loaded:>10,}"
            f"{summary.samples_trained:>10,}{summary.last['seconds']:>9.0f}"
        )
    with open(folder / "race.png", "wb") as file:
        draw(curves, metric=METRIC, title="held-out retrieval, mean R@1 of both directions", file=file)
    print(f"\nThe race's curves on four axes: {folder}/race.png; each step: {folder}/race-*/train/steps.parquet")
    return runs


def junk_shares(run: Path, pool: DemoPool) -> pa.Table:
    """Per kind of sample: how many were in the pool, how many were kept, and their shares, with totals last."""
    truth = pq.read_table(pool.truth)
    kept = set(pq.read_table(run / "selection" / "selected.parquet")["uid"].to_pylist())
    is_kept = np.array([uid in kept for uid in truth["uid"].to_pylist()])
    matches = truth["caption_matches"].to_numpy(zero_copy_only=False)
    kind, junk = np.array(truth["kind"].to_pylist()), truth["junk"].to_numpy(zero_copy_only=False)
    rows = {"mismatched caption": (kind == "scene") & ~matches}
    rows |= {name.replace("_", " "): kind == name for name in sorted(set(kind.tolist()) - {"scene"})}
    rows |= {"clean": ~junk, "junk in all": junk}
    return pa.table(
        {
            "what": list(rows),
            "pool": [int(mask.sum()) for mask in rows.values()],
            "kept": [int((mask & is_kept).sum()) for mask in rows.values()],
            "share_of_pool": [float(mask.mean()) for mask in rows.values()],
            "share_of_kept": [float(mask[is_kept].mean()) if is_kept.any() else 0.0 for mask in rows.values()],
        }
    )


def print_junk(run: Path, pool: DemoPool) -> None:
    """The table of `junk_shares`."""
    print(f"\n  {'':<20}{'pool':>9}{'kept':>9}{'% of pool':>12}{'% of kept':>12}")
    for row in junk_shares(run, pool).to_pylist():
        print(
            f"  {row['what']:<20}{row['pool']:>9,}{row['kept']:>9,}"
            f"{row['share_of_pool']:>12.1%}{row['share_of_kept']:>12.1%}"
        )


def _say(line: str) -> None:
    print(line, flush=True)


def _show(line: str, last: bool) -> None:
    """A line that the next one replaces on a terminal; in a log only the last is printed."""
    if sys.stdout.isatty():
        print(f"\r{line:<70}", end="\n" if last else "", flush=True)
    elif last:
        print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
