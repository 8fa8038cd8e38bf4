"""`python -m jobs.benchmark online`: what scoring at low resolution, in a pool, and with a larger reference is worth.

On the race's demo pool, whose learners see pixels. Arms, all of the same number of steps and rows per step:

    uniform            what all are held against
    jest               scored and trained in patches of 8 pixels
    flexi              Flexi-JEST: scored in patches of 16, half of the sub-batch trained in them (J-6)
    flexi, f=0.5/0.9   the same at other filter ratios
    low scoring only   scored in patches of 16, all of the sub-batch trained in patches of 8 (J-9)
    beta2=0.999        jest at f=0.9 with AdamW's default, beside `jest, f=0.9` with 0.95
    distilled          jest, or uniform, with the reference's softmax distillation added to the loss (J-11)
    easy reference     what the reference finds easy, whatever the learner does (I-ACID; jest is H-ACID)
    pool, age A        jest scored by a pool with weights of that age
    filtered pool      jest on what the demo's CLIP filter kept (J-10; jest is the raw pool)
    curated set        uniform on the reference's own clean pairs alone

Each learner is measured by retrieval and by small tasks of their own (`jobs.demo_tasks`). Then, with a timed sleep in
place of the forward passes, sub-batches per second served by 1 to 8 scoring actors.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import ray

from curation.distributed.resources import cluster
from curation.distributed.scoring_pool import Serving, close_pool, pool_actor, scorer_actor
from curation.distributed.train import learner_url, train
from curation.models.clip import load_towers
from curation.recipe import TrainRecipe
from curation.recipe.train_parts import LowResolution
from jobs import demo_tasks
from jobs.benchmarks.online_pools import POOLS
from jobs.benchmarks.pairs import provenance
from jobs.benchmarks.parts import once
from jobs.benchmarks.race import interval, show
from jobs.benchmarks.tracks import Track, demo_size, demo_track
from jobs.command import ended
from jobs.demo_race import NUM_STEPS

LOW = LowResolution(patch_size=16)
SCORE_SECONDS = 0.5
SERVED_STEPS = 40
ACTORS = (1, 2, 4, 8)

Change = Callable[[TrainRecipe], TrainRecipe]


def _train(**fields: Any) -> Change:
    return lambda recipe: recipe.model_copy(update={"train": recipe.train.model_copy(update=fields)})


def _low(**fields: Any) -> Change:
    return lambda recipe: recipe.model_copy(update={"low_resolution": LOW.model_copy(update=fields)})


class Arm(NamedTuple):
    """A way to train: method, filter ratio, the pool, and what else differs from the track's own runs."""

    method: dict[str, Any]
    filter_ratio: float
    changes: tuple[Change, ...] = ()
    pool: str = "raw"


UNIFORM, JEST = {"name": "uniform"}, {"name": "jest"}
ARMS = {
    "uniform": Arm(UNIFORM, 0.0),
    "jest": Arm(JEST, 0.8),
    "flexi": Arm(JEST, 0.8, (_low(),)),
    "low scoring only": Arm(JEST, 0.8, (_low(share=0.0),)),
    "jest, f=0.5": Arm(JEST, 0.5),
    "flexi, f=0.5": Arm(JEST, 0.5, (_low(),)),
    "jest, f=0.9": Arm(JEST, 0.9),
    "flexi, f=0.9": Arm(JEST, 0.9, (_low(),)),
    "jest, f=0.9, beta2=0.999": Arm(JEST, 0.9, (_train(beta2=0.999),)),
    "distilled": Arm(JEST, 0.8, (_train(distill=1.0),)),
    "uniform, distilled": Arm(UNIFORM, 0.0, (_train(distill=1.0),)),
    "easy reference": Arm({"name": "jest", "scoring": "easy_reference"}, 0.8),
    "pool, age 0": Arm(JEST, 0.8, (_train(scoring="pool"),)),
    "pool, age 4 to 7": Arm(JEST, 0.8, (_train(scoring="pool", score_ahead=4, publish_every=4),)),
    "pool, age 16 to 31": Arm(JEST, 0.8, (_train(scoring="pool", score_ahead=16, publish_every=16),)),
    "filtered pool": Arm(JEST, 0.8, pool="filtered"),
    "curated set": Arm(UNIFORM, 0.0, pool="curated"),
}
TINY_ARMS = ("uniform", "flexi", "pool, age 4 to 7", "curated set")


def benchmark(
    *, seeds: int, tiny: bool, folder: Path, arms: list[str] | None = None, steps: int = NUM_STEPS
) -> dict[str, Any]:
    """All figures; a run that is in `folder` already is not done again. `arms` names those to run, all by default."""
    names = list(TINY_ARMS if tiny else ARMS) if arms is None else arms
    if unknown := sorted(set(names) - ARMS.keys()):
        raise ValueError(f"unknown arms {unknown}; there are {sorted(ARMS)}")
    num_steps = 12 if tiny else steps
    runs = folder / f"online-{num_steps}"
    with cluster(num_cpus=2):
        on = demo_track(folder / "demo", tiny=tiny)
        ends: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for seed in range(seeds):  # one after the other, so that a study that is cut short has all arms
            for name in names:
                run = f"{_file_name(name)}-{seed}"
                of = {"tiny": tiny, "num_steps": num_steps, "seed": seed}
                ends[name].append(once(runs / f"{run}.json", partial(_end, on, folder, name, runs / run, **of)))
    with cluster(num_cpus=max(ACTORS)):
        served = throughput((1, 2) if tiny else ACTORS, steps=6 if tiny else SERVED_STEPS)
    figures = _figures(ends)
    _print(figures, served, on)
    return {
        **provenance(),
        "benchmark": "online",
        "pool": on.about,
        "metric": on.metric,
        "seeds": seeds,
        "steps": num_steps,
        "arms": figures,
        "sub_batches_per_second_by_scoring_actors": served,
    }


def _file_name(arm: str) -> str:
    return arm.replace(", ", "-").replace(" ", "-")


def _end(
    on: Track, folder: Path, name: str, output: Path, *, tiny: bool, num_steps: int, seed: int
) -> dict[str, float]:
    """How one run ended, and what its steps cost; shares in [0, 1], seconds and FLOPs."""
    arm = ARMS[name]
    recipe = on.run(output, method=arm.method, filter_ratio=arm.filter_ratio, num_steps=num_steps, seed=seed)
    recipe = POOLS[arm.pool](recipe, folder, num_pairs=demo_size(tiny=tiny).pairs)
    for change in arm.changes:
        recipe = change(recipe)
    ended(train(TrainRecipe.model_validate(recipe.model_dump())), of=f"{name}, seed {seed}")
    evaluations = pq.read_table(output / "train" / "evaluations.parquet")
    steps = pq.read_table(output / "train" / "steps.parquet")
    towers = load_towers(recipe.learner.model, checkpoint=learner_url(recipe.output))
    num_scenes = 20 if tiny else demo_tasks.NUM_SCENES

    def median(column: str) -> float:
        return statistics.median(steps[column].to_pylist())

    return {
        "metric": evaluations[on.metric].to_pylist()[-1],
        "flops_per_step": steps["flops"].to_pylist()[-1] / len(steps),
        "seconds_per_step": median("step_seconds"),
        "idle_share": median("seconds_wait") / median("step_seconds"),
        "junk_share": float(np.mean(steps["junk_share"].to_pylist()[len(steps) // 2 :])),
        **{task: demo_tasks.score(towers, task, num_scenes=num_scenes).accuracy for task in demo_tasks.TASKS},
    }


def _figures(ends: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    found = {}
    for name, seeds in ends.items():
        found[name] = {of: interval([end[of] for end in seeds]) for of in seeds[0]}
        for rival in ("uniform", "jest"):
            if rival in ends and rival != name:
                pairs = list(zip(seeds, ends[rival], strict=True))
                found[name][f"minus_{rival}"] = interval([mine["metric"] - other["metric"] for mine, other in pairs])
                cost = [mine["flops_per_step"] / other["flops_per_step"] for mine, other in pairs]
                found[name][f"flops_of_{rival}s"] = cost[0]
    return found


class SleepingScorer:
    """Answers as a Scorer does; its reading is nothing, and its forward passes are a sleep."""

    def begin(self) -> None:
        """Nothing to forget."""

    def read(self, step: int) -> None:
        """The step's super-batch is there."""

    def serve(self, step: int, version: int, weights: list[Any], world_size: int) -> tuple[Any, ...]:
        """The facts and parts of a sub-batch that nobody will train on."""
        time.sleep(SCORE_SECONDS)
        return ({"noted": {"weights_age": step - version}}, *[None] * world_size)


def throughput(counts: tuple[int, ...], *, steps: int) -> dict[int, float]:
    """Sub-batches per second that a worker, who does nothing else, gets of so many scorers that sleep."""
    return {actors: _served_per_second(actors, steps=steps) for actors in counts}


def _served_per_second(actors: int, *, steps: int) -> float:
    def new_scorer() -> Any:
        return scorer_actor(SleepingScorer, num_cpus=0).remote()

    pool = pool_actor(Serving(steps, score_ahead=2 * actors, publish_every=1), actors, new_scorer)
    ray.get(pool.begin.remote(0, 1))
    ray.get(pool.publish.remote(0, [ray.put({})]))
    warm, begun = max(2, steps // 4), 0.0
    for step in range(steps):
        if step == warm:
            begun = time.perf_counter()
        ray.get(pool.take.remote(step, 0))
        ray.get(pool.publish.remote(step + 1, [ray.put({})]))
    seconds = time.perf_counter() - begun
    close_pool(pool)
    return (steps - warm) / seconds


def _print(figures: dict[str, Any], served: dict[int, float], on: Track) -> None:
    print(f"\n{on.about}: held-out {on.metric} at the end; FLOPs and seconds of a step")
    for name, of in figures.items():
        against = f"{show(of['minus_uniform'])} to uniform" if "minus_uniform" in of else ""
        flops = f"{of['flops_of_uniforms']:.2f} of uniform's FLOPs" if "flops_of_uniforms" in of else ""
        seconds, idle = of["seconds_per_step"]["mean"], of["idle_share"]["mean"]
        print(f"  {name:<26}{show(of['metric']):<16}{against:<26}{flops:<28}{seconds:.2f} s, {idle:.0%} idle")
    print(f"\naccuracy by task{'':<14}" + "".join(f"{task:<16}" for task in demo_tasks.TASKS))
    for name, of in figures.items():
        print(f"  {name:<28}" + "".join(f"{show(of[task]):<16}" for task in demo_tasks.TASKS))
    told = ", ".join(f"{actors}: {rate:.2f}" for actors, rate in served.items())
    print(f"sub-batches/s by scoring actors that sleep {SCORE_SECONDS} s: {told}")
