"""`python -m jobs.benchmark plan`: a pool of 600,000 shards is listed, planned and resumed, in time and memory.

The pool is of empty files and the manifests are written here, of the size that embedding gives them: what is measured
is the driver's work for a run, not the shards' content. Each start of a run is a process of its own, so its peak memory
is its own. The last figure is a short wave through Ray, of shards that are committed, so that their actors only look.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from curation.columns import FORMAT_VERSION
from curation.data import manifest, shard_list, storage
from curation.data.pieces import Pieces
from curation.distributed.embed import STAGE, EmbedSpec
from curation.distributed.pipeline import embed_shards, make_plan
from curation.distributed.resources import Placement, cluster
from curation.recipe import Compute, CurateRecipe, Embed, Pool
from jobs.benchmarks.pairs import provenance

SHARDS, WAVE, ROWS = 600_000, 2000, 10_000
TARGET_SECONDS, TARGET_GIB = 300, 4
MADE_BY = {f"embed.field_{place}": "a value of some length" for place in range(20)}
"""As many fields as decide what an embedding is."""


def benchmark(*, tiny: bool) -> dict[str, Any]:
    """All figures of this benchmark. AssertionError if a plan is wrong."""
    shards, wave = (3000, 20) if tiny else (SHARDS, WAVE)
    with tempfile.TemporaryDirectory(prefix="curation-plan-") as folder:
        root = Path(folder)
        make_pool(root, shards)
        starts = {"a fresh run": _start("fresh", root)}
        commit_all(root, range(0, shards, 2))
        starts["half committed, no index"] = _start("resume", root)
        commit_all(root, range(1, shards, 2))
        starts["all committed, half of them indexed"] = _start("resume", root)
        starts["all committed and indexed"] = _start("resume", root)
        starts["one shard more"] = _with_one_more(root, shards)
        through_ray = _start("wave", root, wave)
    todo = [start["todo"] for start in starts.values()]
    assert todo == [shards, shards // 2, 0, 0, 1], f"shards to do are {todo}"
    print(f"{shards:,} shards, listed, planned and resumed (target {TARGET_SECONDS} s and {TARGET_GIB} GiB)")
    for name, start in starts.items():
        print(f"  {name:<38} {start['seconds']:7.1f} s ({start['cpu_seconds']:.1f} s of a core)", end="")
        print(f" {start['peak_mib']:8,.0f} MiB  {start['todo']:>9,} to do")
    print(f"  one wave of {wave:,} through Ray            {through_ray['seconds']:7.1f} s", end="")
    print(f" {through_ray['peak_mib']:8,.0f} MiB  first answer after {through_ray['first_s']:.1f} s")
    met = all(start["seconds"] < TARGET_SECONDS and start["peak_mib"] < 1024 * TARGET_GIB for start in starts.values())
    print(f"target {'met' if met else 'MISSED'}")
    figures = {"shards": shards, "starts": starts, "wave": through_ray, "met": met}
    return {**provenance(), "benchmark": "plan", "load": os.getloadavg(), **figures}


def make_pool(root: Path, shards: int) -> None:
    """Empty shards, a thousand to a folder."""
    for number in range(shards):
        if number % 1000 == 0:
            (root / "pool" / f"{number // 1000:04d}").mkdir(parents=True)
        (root / "pool" / f"{number // 1000:04d}" / f"{number:08d}.tar").touch()


def commit_all(root: Path, numbers: range) -> None:
    """Manifests as embedding leaves them, without the fsync of each."""
    known = shard_list.load(str(root / "out"))
    key = manifest.digest(MADE_BY)
    for number in numbers:
        shard = known[number]
        record = {
            "format_version": FORMAT_VERSION,
            "key": key,
            "made_by": MADE_BY,
            "shard": number,
            "url": shard.url,
            "fingerprint": shard.fingerprint,
            "sha256": f"{number:064x}",
            "bytes": 0,
            "read": ROWS,
            "embedded": ROWS - 10,
            "dropped": {"image:decode_failed": 10},
            "decoded": ROWS,
            "warnings": {},
            "batch_size": 256,
            "logit_scale": 100.0,
            "logit_bias": 0.0,
            "seconds": {"wait": 1.2345, "decode": 98.7654, "forward": 12.3456, "write": 0.1234},
        }
        path = Path(manifest.url_of(str(root / "out"), STAGE, number))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1))


def _with_one_more(root: Path, shards: int) -> dict[str, Any]:
    (root / "pool" / "0000" / f"{shards:08d}.tar").touch()
    return _start("resume", root)


def _start(side: str, root: Path, count: int = 0) -> dict[str, Any]:
    command = [sys.executable, "-m", "jobs.benchmarks.plan", side, str(root), str(count)]
    told = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    print(f"{side}: {told}", file=sys.stderr)
    return told


def _recipe(root: Path) -> CurateRecipe:
    return CurateRecipe(
        pool=Pool(shards=f"{root}/pool/*/*.tar"),
        embed=Embed(model="nano"),
        compute=Compute(device="cpu", actors=1),
        output=str(root / "out"),
    )


def _resume(root: Path) -> dict[str, Any]:
    """What a run does before its first shard and, where none is left, after its last."""
    recipe = _recipe(root)
    plan = make_plan(recipe)
    manifest.check_same_run(plan.committed.one_of_each_run(), MADE_BY)
    shard_list.save(recipe.output, plan.shards)
    pieces = Pieces(plan.committed)
    manifest.index(recipe.output, STAGE, pieces)
    read = sum(pieces[shard.number]["read"] for shard in plan.pool if shard.number in pieces)
    assert read == ROWS * len(pieces)
    return {"todo": len(plan.todo)}


def _wave(root: Path, count: int) -> dict[str, Any]:
    """So many committed shards through Ray Data: each call finds its manifest and returns."""
    spec = EmbedSpec(
        output=str(root / "out"),
        model="nano",
        pretrained=None,
        checkpoint=None,
        seed=0,
        precision="float32",
        device="cpu",
        batch_size=8,
        decode_threads=1,
        torch_threads=1,
        max_pixels=1 << 20,
        resize="exact",
        staged=False,
        rules=Pool().read_rules(),
        made_by=MADE_BY,
    )
    known = shard_list.load(storage.absolute(str(root / "out")))[:count]
    with cluster(num_cpus=2):
        begun = time.perf_counter()
        answers = embed_shards(known, spec, Placement("cpu", "float32", 1, 1.0, 0.0))
        next(answers)
        first_s = time.perf_counter() - begun
        assert sum(1 for _ in answers) == count - 1
    return {"first_s": first_s, "shards": count}


def main(side: str, root: Path, count: int) -> None:
    """One start of a run, told as JSON."""
    sides: dict[str, Callable[[], dict[str, Any]]] = {
        "fresh": lambda: _resume(root),
        "resume": lambda: _resume(root),
        "wave": lambda: _wave(root, count),
    }
    begun, cpu_begun = time.perf_counter(), time.process_time()
    told = sides[side]()
    seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - cpu_begun
    print(json.dumps({**told, "seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mib": _peak_mib()}))


def _peak_mib() -> float:
    """Of this process. (getrusage's figure begins with that of the process which started it.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
