"""`python -m jobs.benchmark NAME ...`: speed claims as ratios against a named rival, in one run on one machine.

    ablate   which parts of JEST its gain comes from: chunks, filter ratio, joint against independent
    alchemist  raters and Shift-Gsample on a pool with known junk, against loss alone, alignment and random
    chaos    faults at random moments on several raylets: is each table byte for byte that of a run without harm?
    dedup    exact and perceptual dedup against known copies: precision and recall
    decode   --resize fast against Pillow and open_clip's transform; what it does to the CLIP score
    doctor   is this cluster fit for a long run? Pass or fail, and the fix for each
    dynamic  dynamic selection (our completion of 2603.04981) against InfoBatch, RCAP, RS2 and more, on frozen features
    embed    jobs.curate against a hand-written loop; peak memory of a larger pool
    feed     a step of jobs.train on everything against a hand-written loop over webdataset
    ingest   reading tars against webdataset and ray.data.read_webdataset; what each makes of damaged ones
    ledger   updates, snapshot and restore of a billion addresses; through actors; against dicts
    mimic    Grad-Mimic on linear probes under label noise, against its rivals and controls; what a step of it costs
    online   Flexi-JEST, a scoring pool, distillation: quality against FLOPs, seconds and the weights' age
    plan     600,000 shards listed, planned and resumed: seconds and memory; with --samples: what a run needs and costs
    race     what JEST's selection is worth against training on everything, on four axes, over seeds
    scale    jobs.curate with 1 to 64 actors that sleep for a model: weak and strong scaling
    select   JEST's selection against the dense algorithm; its share of the time that scoring takes
    subsample  typicality, k-center and near copies against packages and exact scans; growth with the pool
    subsets  what selection rules pick from pools whose junk is planted, judged on the picked rows themselves

`--tiny` runs the smallest size, which proves the command and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.benchmarks import (
    ablate,
    alchemist,
    capacity,
    chaos,
    decode,
    dedup,
    doctor,
    dynamic,
    embed,
    feed,
    ingest,
    ledger,
    ledger_actors,
    mimic,
    online,
    plan,
    race,
    scale,
    select,
    subsample,
    subsets,
)
from jobs.benchmarks.pairs import provenance
from jobs.benchmarks.subset_pools import TRACKS as POOL_TRACKS
from jobs.benchmarks.tracks import TRACKS


def _ledger(given: argparse.Namespace) -> dict[str, Any]:
    alone = ledger.in_process(pairs=given.pairs, tiny=given.tiny)
    actors = ledger_actors.through_actors(pairs=given.pairs, tiny=given.tiny)
    return {**provenance(), "benchmark": "ledger", "in_process": alone, "through_actors": actors}


def _priced(given: argparse.Namespace) -> dict[str, Any]:
    return capacity.priced(
        given.rates,
        given.prices,
        samples=given.samples,
        hours=given.hours,
        samples_per_shard=given.samples_per_shard,
        keep_fraction=given.keep_fraction,
    )


BENCHMARKS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "ablate": lambda given: ablate.benchmark(
        track=given.track, seeds=given.seeds, tiny=given.tiny, folder=given.folder
    ),
    "alchemist": lambda given: alchemist.benchmark(seeds=given.seeds, tiny=given.tiny, folder=given.folder),
    "chaos": lambda given: chaos.benchmark(
        minutes=given.minutes, seed=given.seed, tiny=given.tiny, faults=given.faults
    ),
    "dedup": lambda given: dedup.benchmark(tiny=given.tiny, folder=given.folder),
    "decode": lambda given: decode.benchmark(pairs=given.pairs, tiny=given.tiny),
    "doctor": lambda given: doctor.benchmark(output=given.output, tiny=given.tiny),
    "dynamic": lambda given: dynamic.benchmark(
        seeds=given.seeds, tiny=given.tiny, folder=given.folder, hours=given.hours
    ),
    "embed": lambda given: embed.benchmark(shards=given.shards, pairs=given.pairs, tiny=given.tiny),
    "feed": lambda given: feed.benchmark(shards=given.shards, pairs=given.pairs, tiny=given.tiny),
    "ingest": lambda given: ingest.benchmark(pairs=given.pairs, tiny=given.tiny),
    "ledger": _ledger,
    "mimic": lambda given: mimic.benchmark(seeds=given.seeds, pairs=given.pairs, tiny=given.tiny, folder=given.folder),
    "online": lambda given: online.benchmark(seeds=given.seeds, tiny=given.tiny, folder=given.folder, arms=given.arms),
    "plan": lambda given: plan.benchmark(tiny=given.tiny) if given.samples is None else _priced(given),
    "race": lambda given: race.benchmark(track=given.track, seeds=given.seeds, tiny=given.tiny, folder=given.folder),
    "scale": lambda given: scale.benchmark(actors=given.actors, tiny=given.tiny),
    "select": lambda given: select.benchmark(pairs=given.pairs, tiny=given.tiny),
    "subsample": lambda given: subsample.benchmark(pairs=given.pairs, tiny=given.tiny),
    "subsets": lambda given: subsets.benchmark(tracks=given.tracks, tiny=given.tiny, folder=given.folder),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        "python -m jobs.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", choices=sorted(BENCHMARKS), metavar="NAME")
    parser.add_argument("--shards", help="embed, feed: a pool to measure on; a demo pool is made if none is named")
    parser.add_argument("--pairs", type=int, default=7, help="interleaved pairs of runs (7)")
    parser.add_argument("--seeds", type=int, default=3, help="race: runs of each arm (3)")
    parser.add_argument("--track", choices=sorted(TRACKS), default="demo", help="race: the pool it is run on (demo)")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("out/race"),
        help="race: where the runs go (out/race); dedup: a folder of `jobs.demo`",
    )
    parser.add_argument("--actors", type=int, nargs="+", help="scale: sizes of the pool (1 2 4 8 16 32 64)")
    parser.add_argument("--minutes", type=float, default=20.0, help="chaos: begin no round after so long (20)")
    parser.add_argument("--seed", type=int, default=0, help="chaos: of its moments and order (0)")
    parser.add_argument("--faults", nargs="+", choices=sorted(chaos.FAULTS), help="chaos: these only (all)")
    parser.add_argument("--output", default="out/doctor", help="doctor: a folder or URL that every node can write")
    parser.add_argument("--tracks", nargs="+", choices=["planted", *POOL_TRACKS], help="subsets: the pools (all)")
    parser.add_argument("--arms", nargs="+", help="online: the arms to run (all)")
    parser.add_argument("--samples", type=float, help="plan: price a run over so many samples, as in 5.85e9")
    parser.add_argument("--hours", type=float, default=24.0, help="plan: within, dynamic: begin within (24)")
    parser.add_argument("--rates", type=Path, default=Path("cluster/rates.json"), help="plan: measured rates")
    parser.add_argument("--prices", type=Path, default=Path("cluster/prices.json"), help="plan: what is paid")
    parser.add_argument("--samples-per-shard", type=int, default=10_000, help="plan: (10000)")
    parser.add_argument("--keep-fraction", type=float, default=0.3, help="plan: share that is written out again (0.3)")
    parser.add_argument("--tiny", action="store_true", help="the smallest size")
    parser.add_argument("--json", type=Path, help="write the raw figures there; several benchmarks' by name")
    given = parser.parse_args(arguments)
    if given.tiny:
        given.pairs = given.seeds = 1
    figures = {name: BENCHMARKS[name](given) for name in dict.fromkeys(given.names)}
    if given.json:
        told = figures if len(figures) > 1 else next(iter(figures.values()))
        given.json.write_text(json.dumps(told, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
