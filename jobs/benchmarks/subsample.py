"""`python -m jobs.benchmark subsample`: offline selection against the packages that offer it, and as pools grow.

    typicality   20-NN typicality of 20,000 x 512, ours / lightly-mundig's; equal numbers are checked
    k-center     1,000 of them, ours / lightly-mundig's diversity; equal choices are checked
    coverage     250 of 5,000: facility location by submodlib and apricot against our rules, quality and time
    near copies  pairs that an exact FAISS scan finds, and how many a bucketed search finds at how many distances
    growth       typicality over 20k, 100k and 1M rows of synthetic tables: seconds, peak memory, fitted exponents

Each side runs in a process of its own with one thread and tells CPU seconds, not wall seconds: other work on the
machine then costs a side little. The rivals are the extras `bench` and `rivals`.
"""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from jobs.benchmarks.pairs import interleaved, paired_ratio, provenance

ROWS, WIDTH, KEEP = 20_000, 512, 1_000
COVERAGE_ROWS, COVERAGE_KEEP = 5_000, 250
NEAR_ROWS, NEAR_BUCKET, NEAR_COSINE = 50_000, 1_000, 0.95
GROWTH, GROWTH_WIDTH, GROWTH_KEEP = (20_000, 100_000, 1_000_000), 64, 0.01
ROWS_PER_TABLE = 10_000
NEIGHBOURS = 20
TARGETS = {"typicality": 30.0, "k-center": 3.0, "recall": 0.99, "distances": 0.1}
THREADS = ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


def benchmark(*, pairs: int, tiny: bool) -> dict[str, Any]:
    """All figures of this benchmark."""
    rows, keep = (400, 40) if tiny else (ROWS, KEEP)
    figures: dict[str, Any] = {**provenance(), "benchmark": "subsample", "rows": rows, "width": WIDTH, "keep": keep}
    for name in ("typicality", "k-center"):
        figures[name] = _against_lightly(name, rows, keep, pairs=pairs)
    figures["coverage"] = _coverage(*((200, 20) if tiny else (COVERAGE_ROWS, COVERAGE_KEEP)))
    figures["near copies"] = _answer("near", 2_000 if tiny else NEAR_ROWS, 0)
    found = figures["near copies"]
    print(
        f"near copies at {NEAR_COSINE}: recall {found['recall']:.4f} of {found['pairs']:,} pairs at "
        f"{found['distances']:.4f} of the distances (targets {TARGETS['recall']}, {TARGETS['distances']})"
    )
    figures["growth"] = _growth((1_000, 2_000) if tiny else GROWTH)
    return figures


def _against_lightly(name: str, rows: int, keep: int, *, pairs: int) -> dict[str, Any]:
    told: dict[str, list[dict[str, Any]]] = {"ours": [], "lightly": []}

    def run(side: str) -> float:
        told[side].append(_answer(f"{name} {side}", rows, keep))
        return told[side][-1]["cpu_seconds"]

    figures = interleaved(lambda: run("ours"), lambda: run("lightly"), pairs=pairs)
    ratio = paired_ratio([(theirs, ours) for ours, theirs in figures])
    ours, theirs = (np.array(told[side][0].pop("result")) for side in ("ours", "lightly"))
    agreement = (
        {"largest_difference": float(np.abs(ours - theirs).max())} if name == "typicality" else agree(ours, theirs)
    )
    for side in told.values():
        for once in side:
            once.pop("result", None)
    print(
        f"{name} {rows:,} x {WIDTH}: lightly-mundig / ours, CPU seconds: {ratio} (target {TARGETS[name]}); {agreement}"
    )
    return {"speedup": ratio._asdict(), **agreement, **told}


def agree(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """Of two sequences of picks: how many are equal before the first that differs, and the share that both chose."""
    differ = np.flatnonzero(ours != theirs)
    return {
        "equal_before_first_difference": int(differ[0]) if len(differ) else len(ours),
        "chosen_by_both": len({*ours.tolist()} & {*theirs.tolist()}) / len(ours),
    }


def _coverage(rows: int, keep: int) -> dict[str, Any]:
    """Mean cosine of a row to the nearest chosen one, which facility location maximises, and CPU seconds."""
    vectors = clustered(rows, WIDTH, seed=1)
    told = {}
    for side in ("submodlib", "apricot", "typicality", "coreset", "uniform"):
        answer = _answer(f"coverage {side}", rows, keep)
        chosen = torch.tensor(answer.pop("result"))
        assert len(set(chosen.tolist())) == keep, f"{side} chose {len(set(chosen.tolist()))} of {keep}"
        told[side] = {**answer, "mean_cosine": float((vectors @ vectors[chosen].T).amax(dim=1).mean())}
        print(f"coverage {side:<11} {told[side]['mean_cosine']:.4f} in {answer['cpu_seconds']:8.2f} CPU s", flush=True)
    return told


def _growth(sizes: tuple[int, ...]) -> dict[str, Any]:
    told = [_answer("growth", rows, 0) for rows in sizes]
    for once in told:
        print(f"growth {once['rows']:>9,} rows: {once['cpu_seconds']:8.1f} CPU s, {once['peak_mib']:,.0f} MiB at most")
    exponents = {
        what: float(np.polyfit(np.log(sizes), np.log([once[what] for once in told]), 1)[0])
        for what in ("cpu_seconds", "peak_mib")
    }
    print(f"fitted exponents over {sizes}: {exponents}")
    return {"width": GROWTH_WIDTH, "runs": told, "exponents": exponents}


def _answer(side: str, rows: int, keep: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "jobs.benchmarks.subsample", side, str(rows), str(keep)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **dict.fromkeys(THREADS, "1")})
    if done.returncode:
        raise RuntimeError(f"{side}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def clustered(rows: int, width: int, *, seed: int) -> Tensor:
    """Unit rows (rows, width) as a pool's are: clusters of unequal size and spread."""
    rng = torch.Generator().manual_seed(seed)
    num_clusters = max(8, math.isqrt(rows) // 2)
    centres = F.normalize(torch.randn(num_clusters, width, generator=rng), dim=1)
    weights = torch.rand(num_clusters, generator=rng) ** 2 + 0.01
    cluster = torch.multinomial(weights, rows, replacement=True, generator=rng)
    spread = (0.4 + 0.8 * torch.rand(num_clusters, generator=rng))[cluster, None] / width**0.5
    return F.normalize(centres[cluster] + spread * torch.randn(rows, width, generator=rng), dim=1)


# What runs in a process of its own.


def _typicality_ours(vectors: Tensor, keep: int) -> Callable[[], Any]:
    from curation.methods.typicality import exponential_typicality
    from curation.numerics.neighbors import nearest_distances

    return lambda: exponential_typicality(nearest_distances(vectors, NEIGHBOURS)).tolist()


def _typicality_lightly(vectors: Tensor, keep: int) -> Callable[[], Any]:
    from lightly_mundig import Typicality  # pyright: ignore[reportAttributeAccessIssue]

    theirs = Typicality(vectors.tolist())  # taking the lists over is not timed: it is no part of the computation
    return lambda: theirs.calculate_typicality(NEIGHBOURS)


def _k_center_ours(vectors: Tensor, keep: int) -> Callable[[], Any]:
    from curation.numerics.greedy import k_center

    return lambda: k_center(vectors, keep=keep, first=0).tolist()


def _k_center_lightly(vectors: Tensor, keep: int) -> Callable[[], Any]:
    from lightly_mundig import Selection  # pyright: ignore[reportAttributeAccessIssue]

    theirs = Selection()
    theirs.add_diversifying_strategy(vectors.tolist(), 1.0)
    return lambda: list(theirs.run_selection([], len(vectors), keep))


def _by_method(name: str) -> Callable[[Tensor, int], Callable[[], Any]]:
    def side(vectors: Tensor, keep: int) -> Callable[[], Any]:
        from curation.methods import load_selector

        uid = torch.arange(2 * len(vectors)).reshape(-1, 2)
        rows, rng = {"image_embedding": vectors, "uid": uid}, torch.Generator().manual_seed(0)
        return lambda: load_selector(name).select(rows, keep, 0.0, rng).indices.tolist()

    return side


def _submodlib(vectors: Tensor, keep: int) -> Callable[[], Any]:
    from submodlib import FacilityLocationFunction  # pyright: ignore[reportMissingImports]

    similarity = (vectors @ vectors.T).clamp_min(0).numpy()

    def run() -> list[int]:
        theirs = FacilityLocationFunction(n=len(vectors), mode="dense", sijs=similarity, separate_rep=False)
        return [int(row) for row, _ in theirs.maximize(budget=keep, optimizer="LazyGreedy", show_progress=False)]

    return run


def _apricot(vectors: Tensor, keep: int) -> Callable[[], Any]:
    from apricot import FacilityLocationSelection  # pyright: ignore[reportMissingImports]

    similarity: NDArray[np.float64] = (vectors @ vectors.T).clamp_min(0).double().numpy()

    def run() -> list[int]:
        # Its functions are compiled at the first call, which is not timed.
        chosen: Any = FacilityLocationSelection(keep, metric="precomputed", optimizer="lazy").fit(similarity)
        return chosen.ranking.tolist()

    FacilityLocationSelection(5, metric="precomputed", optimizer="lazy").fit(similarity[:50, :50])
    return run


SIDES: dict[str, Callable[[Tensor, int], Callable[[], Any]]] = {
    "typicality ours": _typicality_ours,
    "typicality lightly": _typicality_lightly,
    "k-center ours": _k_center_ours,
    "k-center lightly": _k_center_lightly,
    "coverage typicality": _by_method("typicality"),
    "coverage coreset": _by_method("coreset"),
    "coverage uniform": _by_method("uniform"),
    "coverage submodlib": _submodlib,
    "coverage apricot": _apricot,
}


def near_copies(rows: int) -> dict[str, Any]:
    """A bucketed search for pairs at NEAR_COSINE or more, held against an exact FAISS scan.

    A tenth of the rows are near copies of others, at cosines of 0.93 to 1. Counted are distances: the fit's, the
    assignment's and those within buckets, against all pairs.
    """
    from curation.numerics import bucketing
    from curation.numerics.neighbors import ROWS_PER_CLUSTER, similar_pairs

    vectors, rng = clustered(rows, WIDTH, seed=2), torch.Generator().manual_seed(3)
    originals = torch.randperm(rows, generator=rng)[: rows // 10]
    noise = 0.4 * torch.rand(len(originals), 1, generator=rng) * torch.randn(len(originals), WIDTH, generator=rng)
    copies = torch.randperm(rows, generator=rng)[: rows // 10]
    vectors[copies] = F.normalize(vectors[originals] + noise / WIDTH**0.5, dim=1)
    first, second = similar_pairs(vectors, min_cosine=NEAR_COSINE).numpy().T
    num_clusters = bucketing.num_clusters_for(rows, bucket_rows=NEAR_BUCKET)
    sampled = min(rows, ROWS_PER_CLUSTER * num_clusters)
    cutting = bucketing.fit_cutting(
        vectors[torch.randperm(rows, generator=rng)[:sampled]],
        num_clusters=num_clusters,
        num_rows=rows,
        most_rows=20 * NEAR_BUCKET,
        seed=0,
    )
    words = np.arange(2 * rows, dtype=np.uint64).reshape(-1, 2)
    bucket = bucketing.buckets_by_cluster(cutting, vectors, words)
    sizes = np.bincount(bucket)
    fitted = 20 * sampled * num_clusters
    compared = fitted + rows * num_clusters + int((sizes * (sizes - 1) // 2).sum())
    return {
        "rows": rows,
        "buckets": int(cutting.num_buckets),
        "pairs": len(first),
        "recall": float((bucket[first] == bucket[second]).mean()),
        "distances": compared / (rows * (rows - 1) / 2),
    }


def growth(rows: int) -> dict[str, Any]:
    """A selection of typicality over synthetic tables on Ray: CPU seconds and peak memory of all its processes."""
    from curation import addresses
    from curation.data import tables
    from curation.distributed import select
    from curation.distributed.resources import cluster
    from curation.recipe import Select
    from jobs.benchmarks.embed import PeakMemory

    with tempfile.TemporaryDirectory(prefix="curation-growth-") as folder, cluster(num_cpus=1):
        numbers = range(-(-rows // ROWS_PER_TABLE))
        for number in numbers:
            n = min(ROWS_PER_TABLE, rows - number * ROWS_PER_TABLE)
            vectors = clustered(n, GROWTH_WIDTH, seed=number).half().numpy()
            columns: dict[str, Any] = dict.fromkeys(("reason", "caption", "width", "height", "sha256"), [None] * n)
            columns |= {
                "address": addresses.pack(number, np.arange(n)),
                "uid": [f"{number:016x}{row:016x}" for row in range(n)],
                "key": [str(row) for row in range(n)],
                "shard": [f"{number}.tar"] * n,
                "offset": np.arange(n),
                "status": ["ok"] * n,
                "image_embedding": vectors,
                "text_embedding": vectors,
                "clip_score": np.zeros(n, np.float32),
            }
            tables.write(folder, number, tables.sample_table(columns, [{}] * n))
        step = Select(method={"name": "typicality"}, keep_fraction=GROWTH_KEEP)
        peak, before, begun = PeakMemory(os.getpid()), _cpu_seconds(), time.perf_counter()
        selected = select.select(folder, list(numbers), embedded=rows, steps=[step], seed=0)
        seconds, cpu = time.perf_counter() - begun, _cpu_seconds() - before
        peak.stop()
        assert selected.rows == round(rows * GROWTH_KEEP)
    return {"rows": rows, "seconds": seconds, "cpu_seconds": cpu, "peak_mib": peak.mib, "kept": selected.rows}


def _cpu_seconds() -> float:
    """Of this process and all its descendants that are alive."""
    from jobs.benchmarks.embed import family

    ticks = 0
    for pid in family(os.getpid()):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
        ticks += sum(map(int, fields[11:15]))  # its own, and its ended children's, in user and kernel mode
    return ticks / os.sysconf("SC_CLK_TCK")


def main(side: str, rows: int, keep: int) -> None:
    """One side's run, told as JSON."""
    torch.set_num_threads(1)
    if side in ("near", "growth"):
        print(json.dumps({"near": near_copies, "growth": growth}[side](rows)))
        return
    run = SIDES[side](clustered(rows, WIDTH, seed=1), keep)
    begun, before = time.perf_counter(), time.process_time()
    result = run()
    cpu, seconds = time.process_time() - before, time.perf_counter() - begun
    print(json.dumps({"cpu_seconds": cpu, "seconds": seconds, "peak_mib": _peak_mib(), "result": result}))


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
