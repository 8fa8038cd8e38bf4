"""`python -m jobs.benchmark metrics`: seconds and memory of what judges a selection, at 10,000 x 1,024 and 1M x 512.

Each measure runs in a process of its own with one thread, and tells CPU seconds and the most memory that it held, the
two sets of features among it. At a million rows the Fréchet distance is measured whole. The others take the square of
the rows: there the first 2,048 rows go through the same code against all rows, and the seconds of the whole are
extrapolated from them, which the code's blocks make fair: each block of queries costs the same. Memory is measured,
for it is held by the sets and a block.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from curation.evaluation.compare import Reference
from curation.evaluation.fid import frechet_distance
from curation.evaluation.manifold import manifold_metrics
from curation.evaluation.memorisation import memorisation
from curation.evaluation.retrieval import retrieval_recall
from curation.numerics.distances import nearest_keys
from jobs.benchmarks.pairs import provenance

SIZES = ((10_000, 1_024), (1_000_000, 512))
WHOLE_ROWS = 20_000
"""Up to so many rows all is measured whole."""
PART_ROWS = 2_048
PASSES = {"precision, recall, density, coverage": 3, "memorisation": 3, "retrieval": 2}
"""How often each row meets each row. What takes less than the square of the rows is not among them."""


class Run(NamedTuple):
    """What is run, and by how much its seconds are multiplied."""

    work: Callable[[], object]
    times: float


def benchmark(*, tiny: bool) -> dict[str, Any]:
    """All figures of this benchmark."""
    told: dict[str, Any] = {}
    for rows, width in ((400, 16), (30_000, 16)) if tiny else SIZES:
        for measure in ("fréchet distance", "all of one arm's, 256 directions", *PASSES):
            if rows > WHOLE_ROWS and measure.startswith("all"):
                continue
            name = f"{measure}, {rows:,} x {width:,}"
            told[name] = once = _in_a_process(measure, rows, width)
            how = "" if once["measured_share"] == 1 else f" (from {once['measured_share']:.2%} of the rows)"
            print(f"{name:<66} {once['cpu_seconds']:12,.1f} CPU s{how}, {once['peak_mib']:,.0f} MiB", flush=True)
    return {**provenance(), "benchmark": "metrics", "threads": 1, "measures": told}


def _in_a_process(measure: str, rows: int, width: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "jobs.benchmarks.metrics", measure, str(rows), str(width)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"{measure}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _run_of(measure: str, a_ND: Tensor, b_ND: Tensor) -> Run:
    rows = len(a_ND)
    if measure == "fréchet distance":
        return Run(lambda: frechet_distance(a_ND, b_ND), 1)
    if measure not in PASSES:
        return Run(lambda: Reference(b_ND).compare({"arm": a_ND}, seed=0), 1)
    if rows > WHOLE_ROWS and measure == "retrieval":
        # So many images share all captions: both ways, each of these rows meets all.
        image_of_text = torch.arange(rows) % PART_ROWS
        return Run(lambda: retrieval_recall(a_ND[:PART_ROWS], b_ND, image_of_text=image_of_text), rows / PART_ROWS)
    if rows > WHOLE_ROWS:
        # The shared part of both: blocks of distances to all rows, and the few nearest of each.
        return Run(lambda: nearest_keys(a_ND[:PART_ROWS], b_ND, 5), PASSES[measure] * rows / PART_ROWS)
    whole: dict[str, Callable[[], object]] = {
        "memorisation": lambda: memorisation(a_ND, b_ND),
        "retrieval": lambda: retrieval_recall(a_ND, b_ND),
    }
    return Run(whole.get(measure, lambda: manifold_metrics(a_ND, b_ND)), 1)


def main(measure: str, rows: int, width: int) -> None:
    """One measure, told as JSON."""
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(0)
    a_ND, b_ND = (torch.randn(rows, width, generator=rng) for _ in range(2))
    run = _run_of(measure, a_ND, b_ND)
    before = time.process_time()
    run.work()
    seconds = time.process_time() - before
    share = PART_ROWS / rows if run.times > 1 else 1.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"cpu_seconds": seconds * run.times, "measured_share": share, "peak_mib": peak}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
