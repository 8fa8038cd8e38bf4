"""`python -m jobs.benchmark NAME ...`: speed claims as ratios against a named rival, in one run on one machine.

    ablate   which parts of JEST its gain comes from: chunks, filter ratio, joint against independent
    agreement  do the methods' scores of one pool agree? Spearman's matrix over seeds (X-1)
    alchemist  raters and Shift-Gsample on a pool with known junk, against loss alone, alignment and random
    alchemist_models  small generative models trained on Alchemist's selections, of three kinds of pool
    chaos    faults at random moments on several raylets: is each table byte for byte that of a run without harm?
    dedup    exact and perceptual dedup against known copies: precision and recall
    decode   --resize fast against Pillow and open_clip's transform; what it does to the CLIP score
    doctor   is this cluster fit for a long run? Pass or fail, and the fix for each
    dynamic  dynamic selection (our completion of 2603.04981) against InfoBatch, RCAP, RS2 and more, on frozen features
    dynamic_resnet  the same with ResNet-18 on CIFAR-10; needs a GPU
    embed    jobs.curate against a hand-written loop; peak memory of a larger pool
    feed     a step of jobs.train on everything against a hand-written loop over webdataset
    ingest   reading tars against webdataset and ray.data.read_webdataset; what each makes of damaged ones
    ledger   updates, snapshot and restore of a billion addresses; through actors; against dicts
    metrics  seconds and memory of what judges a selection: Fréchet distance, precision and recall, memorisation
    mimic    Grad-Mimic on linear probes under label noise, against its rivals and controls; what a step of it costs
    mimic_clip  Grad-Mimic on image–text pairs: steps to plain training's end, as a filter, with unaligned references
    online   Flexi-JEST, a scoring pool, distillation: quality against FLOPs, seconds and the weights' age
    plan     600,000 shards listed, planned and resumed: seconds and memory; with --samples: what a run needs and costs
    race     what JEST's selection is worth against training on everything, on four axes, over seeds
    scale    jobs.curate with 1 to 64 actors that sleep for a model: weak and strong scaling
    select   JEST's selection against the dense algorithm; its share of the time that scoring takes
    subsample  typicality, k-center and near copies against packages and exact scans; growth with the pool
    subsets  what selection rules pick from pools whose junk is planted, judged on the picked rows themselves

`--tiny` runs the smallest size, which proves the command and measures nothing. Exit code 1: a check of doctor or a
round of chaos failed, or a plan is not possible; 2: the command is wrong; 4: it was stopped.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from curation.distributed.stopping import Interrupted
from jobs.benchmarks import (
    ablate,
    agreement,
    alchemist,
    alchemist_models,
    capacity,
    chaos,
    decode,
    dedup,
    doctor,
    dynamic,
    dynamic_resnet,
    embed,
    feed,
    ingest,
    ledger,
    ledger_actors,
    metrics,
    mimic,
    mimic_clip,
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
from jobs.command import was_stopped
from jobs.demo_race import NUM_STEPS
from jobs.exit_codes import EXIT_FAILED, EXIT_OK


def _ledger(*, pairs: int, tiny: bool) -> dict[str, Any]:
    alone = ledger.in_process(pairs=pairs, tiny=tiny)
    actors = ledger_actors.through_actors(pairs=pairs, tiny=tiny)
    return {**provenance(), "benchmark": "ledger", "in_process": alone, "through_actors": actors}


def _plan(
    *,
    samples: float | None,
    hours: float,
    rates: Path,
    prices: Path,
    samples_per_shard: int,
    keep_fraction: float,
    tiny: bool,
) -> dict[str, Any]:
    if samples is None:
        return plan.benchmark(tiny=tiny)
    how = {"samples_per_shard": samples_per_shard, "keep_fraction": keep_fraction}
    try:
        return capacity.priced(rates, prices, samples=samples, hours=hours, **how)
    except (ValueError, OverflowError, OSError) as error:  # nothing has run: what was asked for is wrong
        _parser().error(f"plan: {error}")


BENCHMARKS: dict[str, Callable[..., dict[str, Any]]] = {
    "ablate": ablate.benchmark,
    "agreement": agreement.benchmark,
    "alchemist": alchemist.benchmark,
    "alchemist_models": alchemist_models.benchmark,
    "chaos": chaos.benchmark,
    "dedup": dedup.benchmark,
    "decode": decode.benchmark,
    "doctor": doctor.benchmark,
    "dynamic": dynamic.benchmark,
    "dynamic_resnet": dynamic_resnet.benchmark,
    "embed": embed.benchmark,
    "feed": feed.benchmark,
    "ingest": ingest.benchmark,
    "ledger": _ledger,
    "metrics": metrics.benchmark,
    "mimic": mimic.benchmark,
    "mimic_clip": mimic_clip.benchmark,
    "online": online.benchmark,
    "plan": _plan,
    "race": race.benchmark,
    "scale": scale.benchmark,
    "select": select.benchmark,
    "subsample": subsample.benchmark,
    "subsets": subsets.benchmark,
}
"""Each takes those flags that its parameters are called by."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = _parser()
    given = parser.parse_args(arguments)
    taken = {name: list(inspect.signature(BENCHMARKS[name]).parameters) for name in dict.fromkeys(given.names)}
    of_none = vars(given).keys() - {"names", "json", "tiny"}.union(*taken.values())
    if idle := sorted(flag for flag in of_none if getattr(given, flag) != parser.get_default(flag)):
        parser.error(f"{', '.join(taken)}: no benchmark for --{idle[0].replace('_', '-')}")
    if given.tiny:
        given.pairs = given.seeds = 1
    try:
        figures = {name: BENCHMARKS[name](**{flag: getattr(given, flag) for flag in taken[name]}) for name in taken}
    except Interrupted as error:
        return was_stopped(error)
    if given.json:
        told = figures if len(figures) > 1 else next(iter(figures.values()))
        given.json.write_text(json.dumps(told, indent=1) + "\n")
    return EXIT_FAILED if any(told.get("failed") for told in figures.values()) else EXIT_OK


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be seconds, 0 or more, got {text}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m jobs.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def flag(name: str, about: str, **how: Any) -> None:
        """A flag, and in its help the benchmarks that take it."""
        takers = [of for of, run in BENCHMARKS.items() if name in inspect.signature(run).parameters]
        parser.add_argument(f"--{name.replace('_', '-')}", help=f"{', '.join(takers)}: {about}", **how)

    parser.add_argument("names", nargs="+", choices=sorted(BENCHMARKS), metavar="NAME")
    flag("shards", "a pool to measure on; a demo pool is made if none is named")
    flag("pairs", "interleaved pairs of runs (7)", type=int, default=7)
    flag("seeds", "runs of each arm (3)", type=int, default=3)
    flag("track", "the pool it is run on (demo)", choices=sorted(TRACKS), default="demo")
    flag("tracks", "the pools (all)", nargs="+", choices=["planted", *POOL_TRACKS])
    flag("arms", "the arms to run (all)", nargs="+")
    flag("steps", "of each run (300)", type=int, default=NUM_STEPS)
    flag("processes", "side by side, one thread each (as many as CPUs)", type=int, default=0)
    flag("folder", "where the runs go, or are (out/race)", type=Path, default=Path("out/race"))
    flag("actors", "sizes of the actor pool (1 2 4 8 16 32 64)", type=int, nargs="+")
    flag("minutes", "begin no round after so long (20)", type=float, default=20.0)
    flag("seed", "of its moments and order (0)", type=int, default=0)
    flag("faults", "these only (all)", nargs="+", choices=sorted(chaos.FAULTS))
    flag("output", "a folder or URL that every node can write (out/doctor)", default="out/doctor")
    flag("wait_for_nodes_s", "ask the autoscaler for nodes, and wait so long (0)", type=_seconds, default=0.0)
    flag("samples", "price a run over so many samples, as in 5.85e9", type=float)
    flag("hours", "to be done within, or to begin nothing after (24)", type=float, default=24.0)
    flag("rates", "measured rates (cluster/rates.json)", type=Path, default=Path("cluster/rates.json"))
    flag("prices", "what is paid (cluster/prices.json)", type=Path, default=Path("cluster/prices.json"))
    flag("samples_per_shard", "(10000)", type=int, default=10_000)
    flag("keep_fraction", "share that is written out again (0.3)", type=float, default=0.3)
    parser.add_argument("--tiny", action="store_true", help="the smallest size")
    parser.add_argument("--json", type=Path, help="write the raw figures there; several benchmarks' by name")
    return parser


if __name__ == "__main__":
    sys.exit(main())
