"""kill -9 at random moments, then the same command: the bytes of a run that was never stopped, nothing done twice."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from curation.distributed import bucket_select
from jobs import curate

pytestmark = pytest.mark.slow

SHARDS, SAMPLES = 6, 60
TIMEOUT_S = 240


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, write_shard: Callable[..., Path]) -> Path:
    root = tmp_path_factory.mktemp("kill-pool")
    for number in range(SHARDS):
        write_shard(root / f"{number:05d}.tar", count=SAMPLES, seed=number, broken=[number])
    return root


def arguments(pool: Path, output: Path, *, actors: int, mode: str) -> list[str]:
    return [
        *("debug", "--pool.shards", str(pool), "--output", str(output)),
        *(
            "--compute.mode",
            mode,
            "--compute.actors",
            str(actors),
            "--compute.decode-threads",
            "1",
            "--write.samples-per-shard",
            "40",
        ),
    ]


def start(pool: Path, output: Path, *, actors: int, mode: str) -> subprocess.Popen[str]:
    # A session of its own, so that what is left of a killed run can be ended, and nothing else.
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.curate", *arguments(pool, output, actors=actors, mode=mode)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def results(output: Path) -> dict[str, str]:
    files = [p for folder in ("samples", "selection", "shards") for p in (output / folder).rglob("*") if p.is_file()]
    return {str(p.relative_to(output)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def committed(output: Path) -> dict[str, int]:
    """Committed pieces and when each was."""
    folder = output / "manifest" / "embed"
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")} if folder.exists() else {}


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    begun = time.monotonic()
    while not condition():
        assert process.poll() is None, f"the run ended first: {process.communicate()[0]}"
        assert time.monotonic() - begun < TIMEOUT_S
        time.sleep(0.02)


def descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    found = [int(child) for child in children.read_text().split()] if children.exists() else []
    return found + [below for child in found for below in descendants(child)]


def actors_of(pid: int) -> list[int]:
    """Processes of embedding actors below a driver, of either mode."""
    alive = [child for child in descendants(pid) if Path(f"/proc/{child}/cmdline").exists()]
    names = {child: Path(f"/proc/{child}/cmdline").read_bytes() for child in alive}
    return [child for child, name in names.items() if b"ShardEmbed" in name or b"PartEmbed" in name]


@pytest.fixture(scope="module")
def unstopped(ray_session: None, pool: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a run that is never stopped leaves; one actor, in this process."""
    output = tmp_path_factory.mktemp("unstopped")
    assert curate.main(arguments(pool, output, actors=1, mode="fused")) == 0
    return results(output)


@pytest.mark.parametrize("mode", ["fused", "staged"])
def test_a_killed_actor_costs_nothing_but_time_and_a_killed_driver_is_resumed_to_the_same_bytes(
    pool: Path, unstopped: dict[str, str], tmp_path: Path, mode: str
) -> None:
    process = start(pool, tmp_path, actors=2, mode=mode)
    wait_for(lambda: len(committed(tmp_path)) >= 1 and bool(actors_of(process.pid)), process)
    os.kill(actors_of(process.pid)[0], signal.SIGKILL)
    at_kill = committed(tmp_path)
    wait_for(lambda: len(committed(tmp_path)) > len(at_kill), process)  # the run has gone on
    time.sleep(random.Random(mode).uniform(0, 0.3))
    process.kill()
    process.communicate()
    before = committed(tmp_path)
    assert at_kill.items() <= before.items()
    # The same command, in this process, whose Ray is there already.
    assert curate.main(arguments(pool, tmp_path, actors=2, mode=mode)) == 0
    assert before.items() <= committed(tmp_path).items()
    assert results(tmp_path) == unstopped
    assert all(path.name.startswith(".") for path in tmp_path.rglob("*.tmp"))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["read"] == SHARDS * SAMPLES == summary["embedded"] + sum(summary["dropped"].values())


SLOW_BUCKETS = """
import sys, time
from curation.distributed import bucket_select
decide = bucket_select._decide_run
def slow(*arguments):
    time.sleep(0.5)
    return decide(*arguments)
bucket_select._decide_run, bucket_select.ROWS_PER_RUN = slow, 1
from jobs import curate
sys.exit(curate.main(sys.argv[1:]))
"""
"""A task for each bucket, each slow enough to be caught in the middle."""
BUCKETS = {"exact_rows": 60, "bucket_rows": 30}
STEPS = [
    # Pictures of noise are near one another to a random model: nine in ten have no neighbour as near as this.
    {"method": {"name": "semantic_dedup", "min_cosine": 0.995, **BUCKETS}},
    {"method": {"name": "coreset", **BUCKETS}, "keep": 40},
]


def decided(output: Path, done: set[Path]) -> set[Path]:
    """Decided runs of buckets of steps that have no verdict yet; those that have one are added to `done`."""
    steps = output / "selection" / "steps"
    folders = set(steps.iterdir()) if steps.exists() else set()
    done |= {folder for folder in folders if (folder / "begins.npy").exists()}
    return {path for folder in folders - done for path in (folder / "kept").glob("*.json")}


def test_a_run_killed_in_the_middle_of_its_buckets_has_the_survivors_of_one_that_was_not(
    ray_session: None, pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Buckets by the thousand rows a task, as ever; the run that is killed has a task for each.
    chosen = ["--selection", json.dumps(STEPS), "--write.no-tars"]
    assert curate.main([*arguments(pool, tmp_path / "whole", actors=1, mode="fused"), *chosen]) == 0
    killed = [*arguments(pool, tmp_path / "killed", actors=1, mode="fused"), *chosen]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_BUCKETS, *killed],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    done: set[Path] = set()  # the verdict on duplicates is there, the coreset's is not
    wait_for(lambda: len(decided(tmp_path / "killed", done)) >= 2 and len(done) == 1, process)
    process.kill()
    process.communicate()
    here = decided(tmp_path / "killed", done)
    assert len(done) == 1 and len(here) >= 2
    verdict = next(iter(done)) / "begins.npy"
    ends = {path: path.stat().st_mtime_ns for path in (*here, verdict)}
    monkeypatch.setattr(bucket_select, "ROWS_PER_RUN", 1)
    assert curate.main(killed) == 0
    assert all(path.stat().st_mtime_ns == end for path, end in ends.items())
    wanted, found = (
        {n: d for n, d in results(tmp_path / name).items() if "steps" not in n} for name in ("whole", "killed")
    )
    assert found == wanted
    account = json.loads((tmp_path / "killed" / "summary.json").read_text())
    assert account["selected"] == 40 and account["decoded_now"] == 0
