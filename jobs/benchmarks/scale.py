"""`python -m jobs.benchmark scale`: does the machinery of `jobs.curate` keep 64 actors busy? They sleep for a model.

The way of a shard is the real one (plan's rows, Ray Data's blocks, actor pool, roster, manifest, driver), only reading,
decoding and the forward pass are sleep, so cores do not bound it and 64 actors need no 64 GPUs. Efficiency is shards
done a second over what the sleep alone would allow, actors / forward_s, between 15% and 85% of the shards: starting and
ending a pool is not what a long run waits for. Weak scaling: as many shards for each actor. Strong: as many in all.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from curation.distributed.embed import CALLS_AT_A_TIME
from curation.distributed.resources import Placement, cluster
from curation.distributed.roster import enrolled
from curation.distributed.shard_pool import records_of
from jobs.benchmarks.pairs import provenance
from jobs.benchmarks.sleepers import Sleeper, SleepSpec

ACTORS = (1, 2, 4, 8, 16, 32, 64)
SHARDS_PER_ACTOR = 12
"""Weak scaling."""
SHARDS = 256
"""Strong scaling, of the larger pools: one actor would take ten minutes."""
FORWARD_S, AHEAD_S = 2.0, 1.0
"""A shard of 10,000 images takes a GPU ten seconds or more; 64 actors ask five times as much of the driver here."""
STEADY = (0.15, 0.85)
TARGET = 0.90


def benchmark(*, actors: Sequence[int] | None, tiny: bool) -> dict[str, Any]:
    """All figures of this benchmark."""
    counts = list(actors or ((1, 2) if tiny else ACTORS))
    forward_s = 0.2 if tiny else FORWARD_S
    per_actor, in_all = (6, 12) if tiny else (SHARDS_PER_ACTOR, SHARDS)
    with cluster(num_cpus=2):
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
