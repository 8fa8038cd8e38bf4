"""`python -m jobs.benchmark chaos --minutes N`: faults at random moments on several raylets on this machine.

Each round curates a pool anew and does it one harm while it runs; then the same command is given until it ends well.
What it leaves must be, byte for byte, what a run without harm left; what was committed before the harm must not have
been touched; and the harmed run must have ended or gone on with a message, never in silence.

The cluster is Ray's own `Cluster`: one GCS, a raylet for each node, on one network. So a cut is a raylet that is
stopped (SIGSTOP) for longer than a heartbeat, then goes on: its workers are alive meanwhile, as behind a real cut,
but can reach the store, as they could not always there. A full disk is a small tmpfs, which needs root.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from jobs.benchmarks.pairs import provenance
from jobs.demo_pool import make_pool

NODES = 2
SAMPLES, SAMPLES_PER_SHARD = 1200, 100
RUN_LIMIT_S = 420
CUT_S = 12.0
"""Longer than HEARTBEAT lets a node be silent."""
SMALL_DISK, LARGE_DISK = "160k", "256m"
HEARTBEAT = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
}
IN_USE, FAILED = 3, 1
TELLING = ("error", "FAILED", "stopped", "warning", "killed")
"""What a line of a run begins with that says what is wrong."""


@dataclass
class Round:
    """A run that is being harmed: its output, the process of its driver, the cluster, and what was noted."""

    output: Path
    cluster: Cluster
    pool: str
    rng: random.Random
    process: subprocess.Popen[str] = field(init=False)
    shards: int
    notes: list[str] = field(default_factory=list)
    harmed: bool = False
    """The run was alive when the harm came; some end before."""

    def start(self) -> subprocess.Popen[str]:
        """Give the command."""
        command = [
            sys.executable,
            "-m",
            "jobs.curate",
            "debug",
            "--pool.shards",
            self.pool,
            "--output",
            str(self.output),
        ]
        command += ["--compute.actors", "2", "--compute.decode-threads", "1", "--max-drop-fraction", "1"]
        environment = {**os.environ, "RAY_ADDRESS": self.cluster.address}
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        return self.process

    def ended(self, process: subprocess.Popen[str] | None = None) -> int:
        """Wait for a run's end; its exit code, its last words noted. One that does not end is killed, and so failed."""
        process = process or self.process
        try:
            said, _ = process.communicate(timeout=RUN_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            said = process.communicate()[0] + f"\nkilled: no end within {RUN_LIMIT_S} s"
        telling = [
            line for line in said.splitlines() if line.startswith(("error", "FAILED", "stopped", "warning", "killed"))
        ]
        self.notes += [f"exit {process.returncode}", *telling[-3:]]
        return process.returncode

    def committed(self) -> dict[str, int]:
        """Committed pieces, and when each was."""
        folder = self.output / "manifest" / "embed"
        return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")} if folder.exists() else {}

    def wait_for_a_moment(self) -> None:
        """Wait until some pieces are committed and some are not, or the run ended."""
        count = self.rng.randint(1, max(1, self.shards // 2))
        while len(self.committed()) < count and self.process.poll() is None:
            time.sleep(0.02)
        self.harmed = self.process.poll() is None


def kill_an_actor(run: Round) -> None:
    """SIGKILL one of the embedding actors."""
    run.start()
    run.wait_for_a_moment()
    actors = [pid for pid, command in _commands() if b"ShardEmbed" in command and _is_below(pid, os.getpid())]
    run.harmed = run.harmed and bool(actors)
    if actors:
        os.kill(run.rng.choice(actors), signal.SIGKILL)
    run.ended()


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
    node = run.rng.choice(sorted(run.cluster.worker_nodes, key=lambda node: node.unique_id))
    run.cluster.remove_node(node, allow_graceful=False)
    add_node(run.cluster)
    run.ended()


def cut_a_node(run: Round) -> None:
    """Stop a raylet for longer than a heartbeat, then let it go on; Ray ends it then, and another joins."""
    run.start()
    run.wait_for_a_moment()
    node = run.rng.choice(sorted(run.cluster.worker_nodes, key=lambda node: node.unique_id))
    raylet = node.all_processes["raylet"][0].process
    raylet.send_signal(signal.SIGSTOP)
    time.sleep(CUT_S)
    raylet.send_signal(signal.SIGCONT)
    run.ended()
    run.cluster.remove_node(node, allow_graceful=False)
    add_node(run.cluster)


def kill_the_head(run: Round) -> None:
    """SIGKILL the head with the control store; the job ends, and is given again on a new cluster."""
    run.start()
    run.wait_for_a_moment()
    assert run.cluster.head_node is not None
    run.cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False)
    run.ended()
    with contextlib.suppress(Exception):  # most of it is dead already
        run.cluster.shutdown()
    run.cluster = new_cluster()


def fill_the_disk(run: Round) -> None:
    """The output is on a disk that is full after a few shards; then the disk grows."""
    run.output.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "tmpfs", str(run.output)], check=True)
    run.start()
    run.harmed = run.ended() == FAILED
    if not run.harmed:
        run.notes.append("a full disk did not fail the run")
    subprocess.run(["mount", "-o", f"remount,size={LARGE_DISK}", str(run.output)], check=True)


def start_twice(run: Round) -> None:
    """A second run on the same output, while the first runs."""
    first = run.start()
    run.wait_for_a_moment()
    if run.ended(run.start()) != IN_USE:
        run.notes.append("the second run was not refused")
    run.ended(first)


FAULTS: dict[str, Callable[[Round], None]] = {
    "kill an actor": kill_an_actor,
    "kill the driver": kill_the_driver,
    "kill a node": kill_a_node,
    "cut a node": cut_a_node,
    "kill the head": kill_the_head,
    "fill the disk": fill_the_disk,
    "start twice": start_twice,
}


def benchmark(*, minutes: float, seed: int, tiny: bool, faults: list[str] | None = None) -> dict[str, Any]:
    """Rounds until the time is over, each fault in turn in an order of chance; the log of all of them."""
    os.environ.update(HEARTBEAT)
    rng, begun, rounds = random.Random(seed), time.monotonic(), []
    chosen = faults or (["kill the driver"] if tiny else list(FAULTS))
    with tempfile.TemporaryDirectory(prefix="curation-chaos-") as name, cluster_of_ours() as holder:
        samples = 300 if tiny else SAMPLES
        pool = make_pool(Path(name) / "pool", samples=samples, samples_per_shard=SAMPLES_PER_SHARD).shards
        shards = -(-samples // SAMPLES_PER_SHARD)
        quiet = Round(Path(name) / "quiet", holder[0], pool, rng, shards)
        quiet.start()
        if quiet.ended() != 0:
            raise RuntimeError(f"the run without harm failed: {quiet.notes}")
        wanted = results(quiet.output)
        while not rounds or (not tiny and time.monotonic() - begun < 60 * minutes):
            for fault in rng.sample(chosen, len(chosen)):
                if rounds and not tiny and time.monotonic() - begun > 60 * minutes:
                    break
                run = Round(Path(name) / f"round-{len(rounds)}", holder[0], pool, rng, shards)
                rounds.append(_round(fault, run, wanted))
                holder[0] = run.cluster
                print(json.dumps(rounds[-1]), flush=True)
    failed = [told for told in rounds if not told["passed"]]
    harmed = sum(told["harmed"] for told in rounds)
    print(
        f"{len(rounds)} rounds in {(time.monotonic() - begun) / 60:.1f} minutes, {harmed} of them harmed in time, "
        f"{len(failed)} failed"
    )
    return {
        **provenance(),
        "benchmark": "chaos",
        "seed": seed,
        "minutes": (time.monotonic() - begun) / 60,
        "load": os.getloadavg(),
        "rounds": rounds,
        "failed": len(failed),
    }


def _round(fault: str, run: Round, wanted: dict[str, str]) -> dict[str, Any]:
    begun = time.monotonic()
    before: dict[str, int] = {}
    code = -1
    try:
        FAULTS[fault](run)
        before = run.committed()
        for _ in range(2):  # a node that is being given up can cost a first attempt
            run.start()
            code = run.ended()
            if code == 0:
                break
        there, kept = results(run.output), before.items() <= run.committed().items()
        summary = json.loads((run.output / "summary.json").read_text()) if code == 0 else {}
    finally:
        if fault == "fill the disk":
            subprocess.run(["umount", str(run.output)], check=False)
    balanced = bool(summary) and summary["read"] == summary["embedded"] + sum(summary["dropped"].values())
    return {
        "fault": fault,
        "seconds": time.monotonic() - begun,
        "committed_before_the_last_run": len(before),
        "harmed": run.harmed,
        "exit": code,
        "identical": there == wanted,
        "nothing_redone": kept,
        "balanced": balanced,
        "notes": run.notes,
        "passed": code == 0 and there == wanted and kept and balanced and not any("not " in n[:40] for n in run.notes),
    }


def results(output: Path) -> dict[str, str]:
    """sha256 of every table, selection and tar of a run."""
    files = [p for folder in ("samples", "selection", "shards") for p in (output / folder).rglob("*") if p.is_file()]
    return {str(p.relative_to(output)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files if p.name[0] != "."}


@contextlib.contextmanager
def cluster_of_ours() -> Iterator[list[Cluster]]:
    """A list of one cluster, which a round may replace."""
    holder = [new_cluster()]
    try:
        yield holder
    finally:
        holder[0].shutdown()


def new_cluster() -> Cluster:
    """A head without CPUs, and NODES nodes with two each."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(NODES):
        add_node(made)
    made.wait_for_nodes()
    return made


def add_node(cluster: Cluster) -> None:
    """One more node."""
    cluster.add_node(num_cpus=2, object_store_memory=200 << 20)


def _commands() -> Iterator[tuple[int, bytes]]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            yield int(path.parent.name), path.read_bytes()


def _is_below(pid: int, ancestor: int) -> bool:
    """True if a process was started, at any remove, by another: only our own are ever killed."""
    while pid > 1 and pid != ancestor:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return pid == ancestor
