"""`python -m jobs.benchmark race`: what a method's selection is worth, against training on everything.

For each seed four runs of `jobs.train` on one pool (`jobs.benchmarks.tracks`): JEST for T steps; uniform for T steps
(equal samples trained), for as many as cost the FLOPs of JEST with its reference and cache (equal FLOPs), and for
T / (1 - filter ratio) (equal samples loaded). All have their own learning-rate schedule, ended. Equal seconds are read
off the longest uniform run's curve. Figures are means over seeds with t intervals of the paired differences.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.distributed.resources import cluster
from curation.distributed.train import train
from curation.numerics.intervals import t_interval
from curation.recipe import TrainRecipe
from curation.report.curves import Curve, draw
from curation.training.flops import TRAINING_PASS, jest_step
from jobs.benchmarks.pairs import provenance
from jobs.benchmarks.tracks import TRACKS, Track
from jobs.command import ended
from jobs.demo_race import FILTER_RATIO, NUM_STEPS

TARGET_STEPS_SHARE, TARGET_POINTS, TARGET_MISMATCHED = 0.25, 0.15, 0.15


def benchmark(*, track: str, seeds: int, tiny: bool, folder: Path) -> dict[str, Any]:
    """All figures of this benchmark on one track; what is in `folder` already is not done again."""
    with cluster(num_cpus=2):  # one Ray for all runs: starting it costs as much as some hundred small steps
        return _race(track, seeds=seeds, tiny=tiny, folder=folder / track)


def _race(track: str, *, seeds: int, tiny: bool, folder: Path) -> dict[str, Any]:
    on = TRACKS[track](folder, tiny=tiny)
    arms = _arms(12 if tiny else NUM_STEPS, on)
    tables: dict[str, list[pa.Table]] = {name: [] for name in arms}
    steps: list[pa.Table] = []
    for seed in range(seeds):
        for name, (method, arm_steps) in arms.items():
            recipe = on.run(
                folder / f"{name.replace(' ', '-')}-{seed}",
                method={"name": method},
                filter_ratio=0.0 if method == "uniform" else FILTER_RATIO,
                num_steps=arm_steps,
                seed=seed,
            )
            tables[name].append(_run(recipe))
            if method != "uniform":
                steps.append(pq.read_table(Path(recipe.output) / "train" / "steps.parquet"))
    figures = _figures(tables, steps, arms, on)
    with open(folder / "race.png", "wb") as file:
        spent = {"flops": on.before.flops, "seconds": on.before.seconds}
        curves = [Curve(name, seeds, spent if name == "jest" else {}) for name, seeds in tables.items()]
        draw(curves, metric=on.metric, title=f"{on.about}: held-out {on.metric}", file=file)
    _print(figures, on, folder)
    return {**provenance(), "benchmark": "race", "pool": on.about, "metric": on.metric, **figures}


def _arms(num_steps: int, on: Track) -> dict[str, tuple[str, int]]:
    """Method and steps of each arm."""
    equal_flops = num_steps * jest_step(FILTER_RATIO) / TRAINING_PASS + on.before.flops / on.step_flops
    return {
        "jest": ("jest", num_steps),
        "uniform": ("uniform", num_steps),
        "uniform equal flops": ("uniform", round(equal_flops)),
        "uniform equal loaded": ("uniform", round(num_steps / (1 - FILTER_RATIO))),
    }


def _run(recipe: TrainRecipe) -> pa.Table:
    """The evaluations of one run; one that is done is not done again."""
    print(f"{recipe.name}, seed {recipe.seed}, {recipe.train.num_steps} steps ...", flush=True)
    ended(train(recipe), of=f"{recipe.name}, seed {recipe.seed}")
    return pq.read_table(Path(recipe.output) / "train" / "evaluations.parquet")


def _figures(
    tables: dict[str, list[pa.Table]], steps: list[pa.Table], arms: dict[str, tuple[str, int]], on: Track
) -> dict[str, Any]:
    ends = {name: [table[on.metric].to_pylist()[-1] for table in seeds] for name, seeds in tables.items()}
    reached = []
    for seed, table in enumerate(tables["jest"]):
        best = max(tables["uniform"][seed][on.metric].to_pylist())
        curve = zip(table["step"].to_pylist(), table[on.metric].to_pylist(), strict=True)
        at = next((step for step, value in curve if value >= best), None)
        reached.append(None if at is None else at / arms["uniform"][1])
    junk = [float(np.mean(table["junk_share"].to_numpy())) for table in steps]
    late = [float(np.mean(table["junk_share"].to_numpy()[len(table) // 2 :])) for table in steps]
    seconds = [_at_equal_seconds(tables, seed, on) for seed in range(len(tables["jest"]))]
    return {
        "arms": {name: {"method": method, "steps": count} for name, (method, count) in arms.items()},
        "before": on.before._asdict(),
        "end": {name: interval(values) for name, values in ends.items()},
        "jest_minus": {
            name: interval([mine - theirs for mine, theirs in zip(ends["jest"], ends[name], strict=True)])
            for name in arms
            if name != "jest"
        },
        "jest_minus_uniform_at_equal_seconds": interval(seconds),
        "share_of_uniforms_steps_to_its_best": reached,
        "mismatched_share_of_what_jest_trains_on": interval(junk),
        "mismatched_share_second_half": interval(late),
        "targets": {"steps_share": TARGET_STEPS_SHARE, "points": TARGET_POINTS, "mismatched": TARGET_MISMATCHED},
    }


def _at_equal_seconds(tables: dict[str, list[pa.Table]], seed: int, on: Track) -> float:
    """JEST's end against the longest uniform run's curve at the same seconds, reference and cache included."""
    jest, rival = tables["jest"][seed], tables["uniform equal loaded"][seed]
    spent = jest["seconds"].to_pylist()[-1] + on.before.seconds
    value = float(np.interp(spent, rival["seconds"].to_numpy(), rival[on.metric].to_numpy()))
    return jest[on.metric].to_pylist()[-1] - value


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean, and the half width of its 95% t interval; None for a single seed."""
    return {**t_interval(values)._asdict(), "values": list(values)}


def show(found: dict[str, Any]) -> str:
    """An interval in words."""
    half = found["half_width"]
    return f"{found['mean']:.3f}" + ("" if half is None else f" ± {half:.3f}")


def _print(figures: dict[str, Any], on: Track, folder: Path) -> None:
    print(f"\nheld-out {on.metric} at the end, over {len(figures['end']['jest']['values'])} seeds:")
    for name, found in figures["end"].items():
        print(f"  {name:<22}{figures['arms'][name]['steps']:>6} steps   {show(found)}")
    print("JEST minus:")
    for name, found in figures["jest_minus"].items():
        print(f"  {name:<22}{show(found)}")
    print(f"  uniform at equal seconds {show(figures['jest_minus_uniform_at_equal_seconds'])}")
    shares = figures["share_of_uniforms_steps_to_its_best"]
    print(f"share of uniform's steps after which JEST has reached its best: {shares}")
    print(
        f"mismatched captions among what JEST trained on: {show(figures['mismatched_share_of_what_jest_trains_on'])}, "
        f"in its second half {show(figures['mismatched_share_second_half'])}"
    )
    print(f"plot: {folder}/race.png")
