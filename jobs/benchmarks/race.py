"""`python -m jobs.benchmark race`: what a method's selection is worth, against training on everything.

For each seed four runs of `jobs.train` on the demo pool: JEST for T steps; uniform for T steps (equal samples trained),
for as many steps as cost the FLOPs of JEST with its reference and cache (equal FLOPs), and for T / (1 - filter ratio)
steps (equal samples loaded). All have their own learning-rate schedule, ended. Equal seconds are read off the longest
uniform run's curve. Figures are means over seeds with t intervals of the paired differences.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from curation.distributed.train import train
from curation.models.clip import build_network
from curation.recipe import TrainRecipe
from curation.report.curves import Curve, draw
from curation.training.flops import TRAINING_PASS, jest_step, tower_flops
from jobs import demo, demo_reference
from jobs.benchmarks.pairs import provenance
from jobs.demo_pool import make_pool
from jobs.demo_race import FILTER_RATIO, METRIC, NUM_STEPS, SUB_BATCH, race_recipe, write_held_out, write_mismatched

TARGET_STEPS_SHARE, TARGET_POINTS, TARGET_MISMATCHED = 0.25, 0.15, 0.15
# Two-sided 95% quantiles of Student's t for 1 to 9 degrees of freedom.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Before(NamedTuple):
    """What JEST needs before its first step."""

    flops: float
    seconds: float


def benchmark(*, seeds: int, tiny: bool, folder: Path) -> dict[str, Any]:
    """All figures of this benchmark; what is in `folder` already is not done again."""
    num_steps, sub_batch = (12, 16) if tiny else (NUM_STEPS, SUB_BATCH)
    samples, pairs, reference_steps = (400, 200, 8) if tiny else (20_000, demo_reference.NUM_PAIRS, 400)
    prepared = _prepare(folder, samples=samples, reference_pairs=pairs, reference_steps=reference_steps)
    mismatched = write_mismatched(make_pool(folder / "pool", samples=samples), folder / "mismatched.parquet")
    held_out = write_held_out(folder / "held_out.tar", num_pairs=100 if tiny else 1_000)
    before = _before(samples=samples, reference_steps=reference_steps, seconds=prepared)
    arms = _arms(num_steps, sub_batch, before)
    tables: dict[str, list[pa.Table]] = {name: [] for name in arms}
    steps: list[pa.Table] = []
    for seed in range(seeds):
        for name, (method, arm_steps) in arms.items():
            recipe = race_recipe(
                run=folder / "run",
                output=folder / f"{name.replace(' ', '-')}-{seed}",
                held_out=held_out,
                mismatched=mismatched,
                method=method,
                num_steps=arm_steps,
                sub_batch=sub_batch,
                seed=seed,
            )
            tables[name].append(_run(recipe))
            if method != "uniform":
                steps.append(pq.read_table(Path(recipe.output) / "train" / "steps.parquet"))
    figures = _figures(tables, steps, arms, before)
    with open(folder / "race.png", "wb") as file:
        spent = {"flops": before.flops, "seconds": before.seconds}
        curves = [Curve(name, seeds, spent if name == "jest" else {}) for name, seeds in tables.items()]
        draw(curves, metric=METRIC, title="demo pool: held-out retrieval, mean R@1 of both directions", file=file)
    _print(figures, folder)
    return {**provenance(), "benchmark": "race", "pool": f"demo pool, {samples} samples", **figures}


def _prepare(folder: Path, *, samples: int, reference_pairs: int, reference_steps: int) -> float:
    """Pool, reference and cache, made as `jobs.demo` makes them; seconds that reference and cache took."""
    noted = folder / "prepared.json"
    if not noted.exists():
        make_pool(folder / "pool", samples=samples)
        begun = time.time()
        arguments = ["--samples", samples, "--reference-pairs", reference_pairs, "--reference-steps", reference_steps]
        if demo.main(["--folder", str(folder), "--no-race", *map(str, arguments)]):
            raise RuntimeError("the demo failed, its message is above")
        noted.write_text(json.dumps({"seconds": time.time() - begun}))
    return json.loads(noted.read_text())["seconds"]


def _before(*, samples: int, reference_steps: int, seconds: float) -> Before:
    """The reference's training and the cache: a forward pass of each row."""
    network = build_network(demo_reference.MODEL, seed=0)
    size = network.preprocess.size
    side = size if isinstance(size, int) else size[0]
    pixels, tokens = torch.zeros(1, side, side, 3, dtype=torch.uint8), torch.zeros(1, 28, dtype=torch.int64)
    per_row = sum(tower_flops(network, pixels, tokens))
    trained = reference_steps * demo_reference.BATCH_SIZE * TRAINING_PASS
    return Before(flops=per_row * (trained + samples), seconds=seconds)


def _arms(num_steps: int, sub_batch: int, before: Before) -> dict[str, tuple[str, int]]:
    """Method and steps of each arm."""
    network = build_network(demo_reference.MODEL, seed=0)
    pixels, tokens = torch.zeros(1, 48, 48, 3, dtype=torch.uint8), torch.zeros(1, 28, dtype=torch.int64)
    uniform_step = sum(tower_flops(network, pixels, tokens)) * TRAINING_PASS * sub_batch
    equal_flops = num_steps * jest_step(FILTER_RATIO) / TRAINING_PASS + before.flops / uniform_step
    return {
        "jest": ("jest", num_steps),
        "uniform": ("uniform", num_steps),
        "uniform equal flops": ("uniform", round(equal_flops)),
        "uniform equal loaded": ("uniform", round(num_steps / (1 - FILTER_RATIO))),
    }


def _run(recipe: TrainRecipe) -> pa.Table:
    """The evaluations of one run; one that is done is not done again."""
    print(f"{recipe.name}, seed {recipe.seed}, {recipe.train.num_steps} steps ...", flush=True)
    if failures := train(recipe).failures:
        raise RuntimeError(f"{recipe.name}, seed {recipe.seed}: {failures[0]}")
    return pq.read_table(Path(recipe.output) / "train" / "evaluations.parquet")


def _figures(
    tables: dict[str, list[pa.Table]], steps: list[pa.Table], arms: dict[str, tuple[str, int]], before: Before
) -> dict[str, Any]:
    ends = {name: [table[METRIC].to_pylist()[-1] for table in seeds] for name, seeds in tables.items()}
    reached = []
    for seed, table in enumerate(tables["jest"]):
        best = max(tables["uniform"][seed][METRIC].to_pylist())
        curve = zip(table["step"].to_pylist(), table[METRIC].to_pylist(), strict=True)
        at = next((step for step, value in curve if value >= best), None)
        reached.append(None if at is None else at / arms["uniform"][1])
    junk = [float(np.mean(table["junk_share"].to_numpy())) for table in steps]
    late = [float(np.mean(table["junk_share"].to_numpy()[len(table) // 2 :])) for table in steps]
    seconds = [_at_equal_seconds(tables, seed, before) for seed in range(len(tables["jest"]))]
    return {
        "arms": {name: {"method": method, "steps": count} for name, (method, count) in arms.items()},
        "before": before._asdict(),
        "end": {name: _interval(values) for name, values in ends.items()},
        "jest_minus": {
            name: _interval([mine - theirs for mine, theirs in zip(ends["jest"], ends[name], strict=True)])
            for name in arms
            if name != "jest"
        },
        "jest_minus_uniform_at_equal_seconds": _interval(seconds),
        "share_of_uniforms_steps_to_its_best": reached,
        "mismatched_share_of_what_jest_trains_on": _interval(junk),
        "mismatched_share_second_half": _interval(late),
        "targets": {"steps_share": TARGET_STEPS_SHARE, "points": TARGET_POINTS, "mismatched": TARGET_MISMATCHED},
    }


def _at_equal_seconds(tables: dict[str, list[pa.Table]], seed: int, before: Before) -> float:
    """JEST's end against the longest uniform run's curve at the same seconds, reference and cache included."""
    jest, rival = tables["jest"][seed], tables["uniform equal loaded"][seed]
    spent = jest["seconds"].to_pylist()[-1] + before.seconds
    value = float(np.interp(spent, rival["seconds"].to_numpy(), rival[METRIC].to_numpy()))
    return jest[METRIC].to_pylist()[-1] - value


def _interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean, and the half width of its 95% t interval; None for a single seed."""
    n = len(values)
    half = None if n < 2 else T_95[n - 2] * statistics.stdev(values) / math.sqrt(n)
    return {"mean": statistics.fmean(values), "half_width": half, "values": list(values)}


def _print(figures: dict[str, Any], folder: Path) -> None:
    def show(interval: dict[str, Any]) -> str:
        half = interval["half_width"]
        return f"{interval['mean']:.3f}" + ("" if half is None else f" ± {half:.3f}")

    print(f"\nheld-out {METRIC} at the end, over {len(figures['end']['jest']['values'])} seeds:")
    for name, interval in figures["end"].items():
        print(f"  {name:<22}{figures['arms'][name]['steps']:>6} steps   {show(interval)}")
    print("JEST minus:")
    for name, interval in figures["jest_minus"].items():
        print(f"  {name:<22}{show(interval)}")
    print(f"  uniform at equal seconds {show(figures['jest_minus_uniform_at_equal_seconds'])}")
    shares = figures["share_of_uniforms_steps_to_its_best"]
    print(f"share of uniform's steps after which JEST has reached its best: {shares}")
    print(
        f"mismatched captions among what JEST trained on: {show(figures['mismatched_share_of_what_jest_trains_on'])}, "
        f"in its second half {show(figures['mismatched_share_second_half'])}"
    )
    print(f"plot: {folder}/race.png")
