"""`python -m jobs.benchmark chaos --minutes N`: faults at random moments on several Ray nodes on this machine.

Each round curates a pool anew, or trains anew on a curated one, and does it one harm while it runs; then the same
command is given until it ends well. What it leaves must be what a run without harm left: a curation's files byte for
byte, a training's curve digit for digit, and each sample used as often. What was committed before the harm must not
have been touched; and the harmed run must have ended or gone on with a message, never in silence.

Nodes are as `nodes.py` makes them: with a network of their own where this machine allows it, so that a cut is a cut. A
full disk is a small tmpfs, which needs root: without it that fault is left out.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jobs.benchmarks.chaos_runs import Case, Kind, Round
from jobs.benchmarks.nodes import Nodes, commands, is_below, start_nodes
from jobs.benchmarks.pairs import provenance
from jobs.demo_pool import make_pool

NODES = 2
SAMPLES, SAMPLES_PER_SHARD = 1200, 100
CUT_S = 15.0
"""Longer than HEARTBEAT lets a node be silent."""
SMALL_DISK = {"curate": "160k", "train": "100m"}
"""Room for a few tables; for one checkpoint of the nano model, or two."""
DISK, LARGE_DISK = "disk", "2g"
IN_USE, FAILED = 3, 1
ATTEMPTS = 3
"""Of the same command after the harm: a node that is being given up can cost one."""


def kill_an_actor(run: Round) -> None:
    """SIGKILL one of the run's actors: one that embeds; or that trains, reads ahead, or keeps the ledger."""
    _signal_one(run, run.case.actors, signal.SIGKILL)
    run.ended()


def stop_an_actor(run: Round) -> None:
    """SIGSTOP an actor that embeds or a rank that trains, for good: it hangs, and the run must see that itself."""
    _signal_one(run, run.case.actors[:1], signal.SIGSTOP)
    run.ended()


def _signal_one(run: Round, names: tuple[bytes, ...], what: signal.Signals) -> None:
    run.start()
    run.wait_for_a_moment()
    pids = [pid for pid, said in commands() if any(name in said for name in names) and is_below(pid, os.getpid())]
    run.harmed = run.harmed and bool(pids)
    if pids:
        os.kill(run.rng.choice(pids), what)


def kill_the_driver(run: Round) -> None:
    """SIGKILL the job's own process."""
    run.start()
    run.wait_for_a_moment()
    run.process.kill()
    run.ended()


def kill_a_node(run: Round) -> None:
    """SIGKILL a worker node, raylet and all; another joins."""
    run.start()
    run.wait_for_a_moment()
    run.nodes.kill_one(run.rng)
    run.ended()


def cut_a_node(run: Round) -> None:
    """Cut a node off for longer than a heartbeat, then heal; Ray ends it then, and another joins."""
    run.start()
    run.wait_for_a_moment()
    run.nodes.cut_one(run.rng, CUT_S)
    run.ended()
    run.nodes.replace_cut()


def kill_the_head(run: Round) -> None:
    """SIGKILL the head with the control store; the job ends, and is given again on a new cluster."""
    run.start()
    run.wait_for_a_moment()
    run.nodes.kill_head()
    run.ended()
    run.nodes.close()
    run.nodes = start_nodes(NODES)


def fill_the_disk(run: Round) -> None:
    """The output is on a disk that is full after a few pieces; then the disk grows."""
    disk = run.output.parent / DISK
    for old in disk.iterdir():
        shutil.rmtree(old)
    run.output = disk / run.output.name
    _resize(disk, SMALL_DISK[run.case.kind])
    run.start()
    run.harmed = run.ended() == FAILED
    if not run.harmed:
        run.wrong.append("a full disk did not fail the run")
    _resize(disk, LARGE_DISK)


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """A disk of its own at the folder, for as long as the block runs. Mounted later, no node would see it."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={LARGE_DISK}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _resize(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def start_twice(run: Round) -> None:
    """A second run on the same output, while the first runs."""
    first = run.start()
    run.wait_for_a_moment()
    if run.ended(run.start()) != IN_USE:
        run.wrong.append("the second run was not refused")
    run.ended(first)


FAULTS: dict[str, Callable[[Round], None]] = {
    "kill an actor": kill_an_actor,
    "stop an actor": stop_an_actor,
    "kill the driver": kill_the_driver,
    "kill a node": kill_a_node,
    "cut a node": cut_a_node,
    "kill the head": kill_the_head,
    "fill the disk": fill_the_disk,
    "start twice": start_twice,
}


def benchmark(*, minutes: float, seed: int, tiny: bool, faults: list[str] | None = None) -> dict[str, Any]:
    """Rounds until the time is over, each fault on each kind of run in an order of chance; the log of all of them."""
    possible = [fault for fault in FAULTS if fault != "fill the disk" or os.geteuid() == 0]
    chosen = faults or (["kill the driver"] if tiny else possible)
    with contextlib.ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(prefix="curation-chaos-"))
        if "fill the disk" in chosen:
            stack.enter_context(_disk(Path(name) / DISK))
        nodes = start_nodes(NODES)
        chaos = _Chaos(Path(name), nodes, random.Random(seed), tiny=tiny)
        try:
            rounds = chaos.rounds(chosen, minutes=minutes)
        finally:
            chaos.nodes.close()
    harmed = sum(told["harmed"] for told in rounds)
    failed = [told for told in rounds if not told["passed"]]
    print(f"{len(rounds)} rounds in {chaos.minutes:.1f} minutes, {harmed} of them harmed in time, {len(failed)} failed")
    return {
        **provenance(),
        "benchmark": "chaos",
        "nodes": nodes.kind,
        "seed": seed,
        "minutes": chaos.minutes,
        "load": os.getloadavg(),
        "rounds": rounds,
        "failed": len(failed),
    }


class _Chaos:
    """Rounds on a cluster that a round may replace."""

    def __init__(self, folder: Path, nodes: Nodes, rng: random.Random, *, tiny: bool):
        self._folder, self.nodes, self._rng, self._tiny = folder, nodes, rng, tiny
        self._begun = time.monotonic()

    @property
    def minutes(self) -> float:
        """Since the cluster was there."""
        return (time.monotonic() - self._begun) / 60

    def rounds(self, faults: list[str], *, minutes: float) -> list[dict[str, Any]]:
        """Until so many minutes are over; one round of a curation, if tiny."""
        samples = 300 if self._tiny else SAMPLES
        pool = make_pool(self._folder / "pool", samples=samples, samples_per_shard=SAMPLES_PER_SHARD).shards
        quiet = self._folder / "curate"
        kinds: tuple[Kind, ...] = ("curate",) if self._tiny else ("curate", "train")
        cases = [Case(kind, pool, -(-samples // SAMPLES_PER_SHARD), quiet) for kind in kinds]
        wanted = {case.kind: self._without_harm(case) for case in cases}
        told: list[dict[str, Any]] = []
        while True:
            rounds = [(fault, case) for fault in faults for case in cases]
            for fault, case in self._rng.sample(rounds, len(rounds)):
                run = Round(case, self._folder / f"round-{len(told)}", self.nodes, self._rng)
                told.append(judged(fault, run, wanted[case.kind]))
                self.nodes = run.nodes
                print(json.dumps(told[-1]), flush=True)
                if self._tiny or self.minutes > minutes:
                    return told

    def _without_harm(self, case: Case) -> dict[str, str]:
        quiet = Round(case, self._folder / case.kind, self.nodes, self._rng)
        quiet.start()
        if quiet.ended() != 0:
            raise RuntimeError(f"the run without harm failed: {quiet.notes}")
        return quiet.results()


def judged(fault: str, run: Round, wanted: dict[str, str]) -> dict[str, Any]:
    """Do a run one harm, give its command until it ends well, and compare what it leaves."""
    begun, code = time.monotonic(), -1
    FAULTS[fault](run)
    before = run.committed()
    for _ in range(ATTEMPTS):
        run.start()
        code = run.ended()
        if code == 0:
            break
    there, kept = run.results(), before.items() <= run.committed().items()
    summary = json.loads(_summary(run).read_text()) if code == 0 else {}
    balanced = bool(summary) and run.balances(summary)
    return {
        "fault": fault,
        "run": run.case.kind,
        "seconds": time.monotonic() - begun,
        "committed_before_the_last_run": len(before),
        "harmed": run.harmed,
        "exit": code,
        "identical": there == wanted,
        "nothing_redone": kept,
        "balanced": balanced,
        "wrong": run.wrong,
        "notes": run.notes,
        "passed": code == 0 and there == wanted and kept and balanced and not run.wrong,
    }


def _summary(run: Round) -> Path:
    return run.output / "summary.json" if run.case.kind == "curate" else run.output / "train" / "summary.json"
