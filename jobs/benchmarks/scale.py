"""`python -m jobs.benchmark scale`: does the machinery of `jobs.curate` keep 64 actors busy? They sleep for a model.

The way of a shard is the real one (plan's rows, Ray Data's blocks, actor pool, roster, manifest, driver), only reading,
decoding and the forward pass are sleep, so cores do not bound it and 64 actors need no 64 GPUs. Efficiency is shards
done a second over what the sleep alone would allow, actors / forward_s, between 15% and 85% of the shards: starting and
ending a pool is not what a long run waits for. Weak scaling: as many shards for each actor. Strong: as many in all.

The same for the online feed of `jobs.train`: 1 to 8 ranks, each with a pipeline of its own whose reader sleeps, and a
sleep in place of the training step. And with real work, on as many cores as there are: the demo pool through the nano
model, an actor a core.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import ray

from curation.data.offered import OfferedShard, Rounds
from curation.distributed.embed import CALLS_AT_A_TIME
from curation.distributed.feed import FeedSpec, Share, blocks
from curation.distributed.resources import Placement, cluster
from curation.distributed.roster import enrolled
from curation.distributed.shard_pool import records_of
from jobs.benchmarks import embed
from jobs.benchmarks.pairs import provenance
from jobs.benchmarks.sleepers import ReadSpec, Sleeper, SleepingReader, SleepSpec

ACTORS = (1, 2, 4, 8, 16, 32, 64)
SHARDS_PER_ACTOR = 12
"""Weak scaling."""
SHARDS = 256
"""Strong scaling, of the larger pools: one actor would take ten minutes."""
FORWARD_S, AHEAD_S = 2.0, 1.0
"""A shard of 10,000 images takes a GPU ten seconds or more; 64 actors ask five times as much of the driver here."""
RANKS = (1, 2, 4, 8)
STEP_S, READ_S, RANK_ROWS, SIDE, STEPS = 0.5, 0.4, 64, 224, 60
"""A rank's step, its share's reading, and that share: 64 images of 224 pixels, 10 MB a step."""
STEADY = (0.15, 0.85)
TARGET = 0.90


def benchmark(*, actors: Sequence[int] | None, tiny: bool) -> dict[str, Any]:
    """All figures of this benchmark."""
    counts = list(actors or ((1, 2) if tiny else ACTORS))
    forward_s = 0.2 if tiny else FORWARD_S
    per_actor, in_all = (6, 12) if tiny else (SHARDS_PER_ACTOR, SHARDS)
    ranks = (1, 2) if tiny else RANKS
    with cluster(num_cpus=2 + max(ranks)):
        fed = [_fed(count, steps=8 if tiny else STEPS, shrink=10 if tiny else 1) for count in ranks]
        weak = [_measured(count, shards=per_actor * count, forward_s=forward_s) for count in counts]
        strong = [
            _measured(count, shards=in_all, forward_s=forward_s) for count in counts if tiny or count >= max(counts) / 4
        ]
    largest = weak[-1]
    outcome = "met" if largest["efficiency"] >= TARGET else "missed"
    print(f"{largest['actors']} actors, weak: {largest['efficiency']:.3f} of the ideal (target {TARGET}: {outcome})")
    return {
        **provenance(),
        "benchmark": "scale",
        "load": os.getloadavg(),
        "forward_s": forward_s,
        "ahead_s": forward_s * AHEAD_S / FORWARD_S,
        "weak": weak,
        "strong": strong,
        "feed": fed,
        "real": [] if tiny else _on_real_cores(),
        "target": TARGET,
        "outcome": outcome,
    }


def _measured(actors: int, *, shards: int, forward_s: float) -> dict[str, Any]:
    """One pool of so many actors over so many shards."""
    with tempfile.TemporaryDirectory(prefix="curation-scale-") as folder, enrolled() as name:
        spec = SleepSpec(str(Path(folder) / "out"), forward_s, forward_s * AHEAD_S / FORWARD_S, name)
        placement = Placement("cpu", "float32", actors, num_cpus=0.0, num_gpus=0.0)
        rows = [pa.table({"number": [number]}) for number in range(shards)]
        begun, cpu = time.time(), time.process_time()
        ends = sorted(r["done"] for r in records_of(Sleeper, spec, rows, placement, calls_at_a_time=CALLS_AT_A_TIME))
        seconds, driver_s = time.time() - begun, time.process_time() - cpu
    rate = steady_rate(ends)
    figures = {
        "actors": actors,
        "shards": shards,
        "shards_per_s": rate,
        "efficiency": rate * forward_s / actors,
        "whole_run_s": seconds,
        "driver_cpu_s": driver_s,
    }
    print("  " + ", ".join(f"{name} {value:.3g}" for name, value in figures.items()), flush=True)
    return figures


def steady_rate(ends: Sequence[float]) -> float:
    """Shards a second between the STEADY parts of a run, from the sorted times at which each was done."""
    first, last = (int(share * (len(ends) - 1)) for share in STEADY)
    return (last - first) / (ends[last] - ends[first])


def _fed(ranks: int, *, steps: int, shrink: int) -> dict[str, Any]:
    """So many ranks, each with its feed; all times divided by `shrink`."""
    step_s, read_s = STEP_S / shrink, READ_S / shrink
    shares = [Share(ranks * RANK_ROWS, rank, ranks) for rank in range(ranks)]
    told = ray.get([_ranks_waits.remote(share, step_s, read_s, steps) for share in shares])
    waits = [statistics.median(waited[steps // 4 :]) for waited in told]
    figures = {"ranks": ranks, "steps": steps, "wait_s": max(waits), "efficiency": step_s / (step_s + max(waits))}
    print("  feed: " + ", ".join(f"{name} {value:.3g}" for name, value in figures.items()), flush=True)
    return figures


@ray.remote(num_cpus=0)
def _ranks_waits(share: Share, step_s: float, read_s: float, steps: int) -> list[float]:
    """Seconds that each step of a rank waited for its rows, where step and reading are sleep."""
    rows = share.super_batch * steps
    feed = blocks(
        cast(FeedSpec, ReadSpec(read_s, SIDE)),
        [OfferedShard(0, "", "", rows, np.zeros(0, np.int32))],
        Rounds(np.array([rows]), segment_rows=RANK_ROWS, seed=0),
        share,
        steps=range(steps),
        actors=1,
        prefetch=2,
        reader=SleepingReader,
    )
    waited = []
    for _ in range(steps):
        begun = time.perf_counter()
        next(feed)
        waited.append(time.perf_counter() - begun)
        time.sleep(step_s)
    return waited


def _on_real_cores() -> list[dict[str, Any]]:
    """Images a second of `jobs.curate` on one core, two, ...; efficiency against one."""
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="curation-scale-") as folder:
        pool = embed.demo_pool(Path(folder) / "pool", samples=12_000)
        for cores in range(1, len(os.sched_getaffinity(0)) + 1):
            with _cores(cores):
                rate = embed.run("ours", pool, str(Path(folder) / f"out-{cores}")).steady
            one = found[0]["images_per_s"] if found else rate
            found.append({"cores": cores, "images_per_s": rate, "efficiency": rate / cores / one})
            print("  real: " + ", ".join(f"{name} {value:.3g}" for name, value in found[-1].items()), flush=True)
    return found


@contextlib.contextmanager
def _cores(count: int) -> Iterator[None]:
    """This process and what it starts, on so many of its cores."""
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(mine)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, mine)
