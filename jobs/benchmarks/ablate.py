"""`python -m jobs.benchmark ablate`: which parts of JEST its gain comes from (claims J-2, J-3, J-4 and J-8).

Four questions, on one of the race's pools with its reference. How many chunks does a selection need, and what does a
larger filter ratio bring: sets chosen from 5,120 rows by a learner in the middle of a run, measured by what JEST
maximises (their learnability), over 20 draws. Does joint selection beat independent selection of the same learner,
reference and filter ratio; and does a reference that learnt from few clean pairs beat one that learnt from the whole
pool, or training on those few pairs alone: whole runs, over seeds, with paired differences.

Learnability is normalised as in the paper's Figure 2: over chunks, one chunk is 0 and 32 are 1; over filter ratios, no
selection is 0 and 0.5 is 1. Filter ratios differ in the super-batch and agree in the sub-batch, as the paper's do: a
row's loss is a sum over its sub-batch, so learnability grows with that alone.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from curation.data import manifest, shard_list, tables
from curation.distributed.columns import add_columns
from curation.distributed.resources import cluster
from curation.distributed.train import learner_url, train
from curation.methods.jest import Jest
from curation.recipe import Compute
from curation.recipe.columns import EmbeddingsRecipe
from curation.recipe.parts import Weights
from curation.recipe.train_parts import Reference
from curation.selector import Rows
from jobs.benchmarks.pairs import provenance
from jobs.benchmarks.race import interval, show
from jobs.benchmarks.tracks import FEATURES, REFERENCE, TRACKS, Track, add_reference
from jobs.command import ended
from jobs.demo_race import NUM_STEPS, SUB_BATCH

CHUNKS = (1, 2, 4, 8, 16, 32)
FILTER_RATIOS = (0.5, 0.8, 0.9)
DRAWS = 20
RATIO = 0.8
SUPER_BATCH = 5_120
SHARE = 0.1
"""Of it, the sub-batch that filter ratios are compared at."""
WEAK_REFERENCE = "reference_of_the_pool"


class Arm(NamedTuple):
    """A way to train: what differs from the track's own runs."""

    method: dict[str, Any]
    reference: str = REFERENCE
    is_on_clean_pairs: bool = False

    @property
    def selects(self) -> bool:
        """False if it trains on all that is loaded."""
        return self.method["name"] != "uniform"


ARMS = {
    "joint": Arm({"name": "jest"}),
    "independent, top": Arm({"name": "rho"}),
    "independent, sampled": Arm({"name": "rho", "sampling": True}),
    "easy reference": Arm({"name": "jest", "scoring": "easy_reference"}),
    "hard learner": Arm({"name": "jest", "scoring": "hard_learner"}),
    "uniform": Arm({"name": "uniform"}),
}
REFERENCE_ARMS = {
    "joint, reference of the whole pool": Arm({"name": "jest"}, reference=WEAK_REFERENCE),
    "uniform, on the reference's pairs": Arm({"name": "uniform"}, is_on_clean_pairs=True),
}
JOINT_OR_NOT = ("joint", "independent, top", "independent, sampled", "uniform")
RUNS = {0.8: {**ARMS, **REFERENCE_ARMS}, 0.9: {name: ARMS[name] for name in JOINT_OR_NOT}}
"""By filter ratio; `joint` comes first, all others are held against it."""
TINY_RUNS = {0.8: {name: {**ARMS, **REFERENCE_ARMS}[name] for name in ("joint", "uniform", *REFERENCE_ARMS)}}


def benchmark(*, track: str, seeds: int, tiny: bool, folder: Path) -> dict[str, Any]:
    """All figures; what is in `folder` already is not done again."""
    if track == "demo":
        raise ValueError("ablate runs on a pool of features: --track flickr8k or cifar10")
    with cluster(num_cpus=2):
        folder = folder / track
        on = TRACKS[track](folder, tiny=tiny)
        num_steps = 12 if tiny else NUM_STEPS
        sets = _sets(_rows_in_mid_run(on, folder, num_steps=num_steps), draws=2 if tiny else DRAWS)
        _print_sets(sets, on)
        runs = _runs(TINY_RUNS if tiny else RUNS, on, folder, seeds=seeds, num_steps=num_steps)
        _print_runs(runs, on)
    figures = {"sets": sets, "runs": runs}
    return {**provenance(), "benchmark": "ablate", "pool": on.about, "metric": on.metric, "seeds": seeds, **figures}


def _rows_in_mid_run(on: Track, folder: Path, *, num_steps: int) -> Rows:
    """A super-batch as a learner half-way through a JEST run sees it, beside the reference."""
    recipe = on.run(folder / "half-way", method={"name": "jest"}, filter_ratio=0.8, num_steps=num_steps, seed=0)
    # The first half of a whole run's schedule would be a run of its own; a whole run of half the steps is as late.
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"num_steps": max(1, num_steps // 2)})})
    _done(recipe)
    run = on.recipe.data.run
    weights = Weights(model=on.recipe.learner.model, checkpoint=learner_url(recipe.output))
    column = "halfway"
    embeddings = EmbeddingsRecipe(
        run=run, column=column, weights=weights, features=FEATURES, compute=Compute(device="cpu")
    )
    ended(add_columns(embeddings), of=f"column {column}")
    return {
        name: value
        for prefix, piece in (("", column), ("reference_", REFERENCE))
        for name, value in _first(_columns(run, piece, prefix=prefix), SUPER_BATCH).items()
    }


def _columns(run: str, piece: str, *, prefix: str) -> Rows:
    """A piece's embeddings of the pool's first shards, and its model's scale and bias."""
    made = manifest.committed(run, tables.piece_stage(piece))
    parts = []
    for shard in shard_list.load(run)[: 1 + SUPER_BATCH // 1000]:
        table = tables.read(run, shard.number, [f"{piece}.image_embedding", f"{piece}.text_embedding"])
        parts.append(table.filter(table[0].is_valid()))
    table = pa.concat_tables(parts)
    values = made[0]["run_values"]
    return {
        **{
            f"{prefix}{side}_embedding": torch.from_numpy(
                np.array(tables.as_array(table[f"{piece}.{side}_embedding"], name=side))
            )
            for side in ("image", "text")
        },
        f"{prefix}logit_scale": torch.tensor(values["logit_scale"]),
        f"{prefix}logit_bias": torch.tensor(values["logit_bias"]),
    }


def _sets(rows: Rows, *, draws: int) -> dict[str, Any]:
    """Learnability of chosen sets: means over draws."""
    n = len(rows["image_embedding"])
    keep, sub_batch = round(n * (1 - RATIO)), round(n * SHARE)
    by_chunks = {chunks: _drawn(rows, keep, num_chunks=chunks, draws=draws) for chunks in CHUNKS}
    means = {chunks: statistics.fmean(values) for chunks, values in by_chunks.items()}
    by_ratio = {
        ratio: statistics.fmean(_drawn(_first(rows, round(sub_batch / (1 - ratio))), sub_batch, draws=draws))
        for ratio in FILTER_RATIOS
    }
    nothing = _at_random(rows, sub_batch, draws=draws)
    return {
        "logit_scale": rows["logit_scale"].item(),
        "large": _compared(rows, keep, draws=draws),
        "as_in_the_runs": _compared(_first(rows, round(SUB_BATCH / (1 - RATIO))), SUB_BATCH, draws=draws),
        "by_chunks": means,
        "by_chunks_deviation": {chunks: statistics.pstdev(values) for chunks, values in by_chunks.items()},
        "by_chunks_normalised": {c: (value - means[1]) / (means[32] - means[1]) for c, value in means.items()},
        "by_filter_ratio": by_ratio,
        "by_filter_ratio_normalised": {
            r: (value - nothing) / (by_ratio[0.5] - nothing) for r, value in by_ratio.items()
        },
    }


def _compared(rows: Rows, keep: int, *, draws: int) -> dict[str, float]:
    """Learnability of `keep` rows as each way chooses them, and how much of it could be the rows' company."""
    alone = Jest().score(rows, 0.5)
    chosen = Jest().select(rows, keep, 0.5, torch.Generator().manual_seed(0)).indices
    return {
        "rows": len(alone),
        "chosen": keep,
        "uniform": _at_random(rows, keep, draws=draws),
        "independent_sampled": statistics.fmean(_drawn(rows, keep, num_chunks=1, draws=draws)),
        "independent_top": Jest().set_score(rows, alone.topk(keep).indices),
        "joint": statistics.fmean(_drawn(rows, keep, draws=draws)),
        "off_diagonal_share_of_the_logits_variance": Jest().off_diagonal_share(rows, chosen[: keep // 2]),
    }


def _drawn(rows: Rows, keep: int, *, draws: int, num_chunks: int = 16) -> list[float]:
    jest, seeds = Jest(num_chunks=num_chunks), [torch.Generator().manual_seed(seed) for seed in range(draws)]
    return [jest.set_score(rows, jest.select(rows, keep, 0.5, rng).indices) for rng in seeds]


def _at_random(rows: Rows, keep: int, *, draws: int) -> float:
    n, seeds = len(rows["image_embedding"]), [torch.Generator().manual_seed(seed) for seed in range(draws)]
    return statistics.fmean(Jest().set_score(rows, torch.randperm(n, generator=rng)[:keep]) for rng in seeds)


def _first(rows: Rows, count: int) -> Rows:
    return {name: value[:count] if value.ndim else value for name, value in rows.items()}


def _runs(runs: dict[float, dict[str, Arm]], on: Track, folder: Path, *, seeds: int, num_steps: int) -> dict[str, Any]:
    """Each arm's last evaluation and what it trained on, and the differences to joint selection."""
    found: dict[str, Any] = {}
    for ratio, arms in runs.items():
        ends = {
            name: [_end(on, folder, name, arm, ratio=ratio, num_steps=num_steps, seed=seed) for seed in range(seeds)]
            for name, arm in arms.items()
        }
        joint, *others = ends
        found[str(ratio)] = {
            "ends": {name: {of: interval([end[of] for end in ends[name]]) for of in ends[name][0]} for name in ends},
            "joint_minus": {
                name: interval([a["metric"] - b["metric"] for a, b in zip(ends[joint], ends[name], strict=True)])
                for name in others
            },
        }
    return found


def _end(on: Track, folder: Path, name: str, arm: Arm, *, ratio: float, num_steps: int, seed: int) -> dict[str, float]:
    """A run's last evaluation, and of what it trained on in the second half: learnability and mismatched captions."""
    at = ratio if arm.selects else 0.0
    output = folder / f"ablate-{name.replace(', ', '-').replace(' ', '-')}-{at}-{seed}"
    recipe = on.run(output, method=arm.method, filter_ratio=at, num_steps=num_steps, seed=seed)
    assert on.reference is not None
    changed: dict[str, Any] = {"reference": Reference(columns=arm.reference)}
    if arm.is_on_clean_pairs:
        changed = {"data": on.reference.data, "reference": Reference()}
    elif arm.reference == WEAK_REFERENCE:
        weak = on.reference.model_copy(update={"data": on.recipe.data, "output": str(folder / WEAK_REFERENCE)})
        add_reference(weak, on.recipe.data.run, column=WEAK_REFERENCE)
    end = {"metric": _done(recipe.model_copy(update=changed))[on.metric].to_pylist()[-1]}
    steps = pq.read_table(output / "train" / "steps.parquet")
    late = steps.slice(len(steps) // 2)
    for of in ("learnability", "junk_share", "effective_clusters"):
        if of in late.column_names and late[of].null_count == 0:
            end[of] = float(np.mean(late[of].to_numpy()))
    return end


def _done(recipe: Any) -> pa.Table:
    """The evaluations of a run; one that is done is not done again."""
    ended(train(recipe), of=recipe.name)
    return pq.read_table(Path(recipe.output) / "train" / "evaluations.parquet")


def _print_sets(sets: dict[str, Any], on: Track) -> None:
    print(f"\n{on.about}: learner's scale {sets['logit_scale']:.1f}; learnability of sets")
    for size in ("large", "as_in_the_runs"):
        told = ", ".join(f"{name} {value:.3g}" for name, value in sets[size].items())
        print(f"  {told}")
    for what in ("by_chunks", "by_filter_ratio"):
        told = ", ".join(f"{key}: {value:.2f}" for key, value in sets[f"{what}_normalised"].items())
        print(f"  {what}, normalised: {told}", flush=True)


def _print_runs(found: dict[str, Any], on: Track) -> None:
    for ratio, runs in found.items():
        print(f"held-out {on.metric} at f = {ratio}:")
        for name, end in runs["ends"].items():
            told = ", ".join(f"{of} {show(value)}" for of, value in end.items() if of != "metric")
            difference = runs["joint_minus"].get(name)
            against = "" if difference is None else f"   joint minus it {show(difference)}"
            print(f"  {name:<36}{show(end['metric'])}{against}   {told}")
