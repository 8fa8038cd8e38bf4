"""Runs that are harmed: a curation and a training, how they are given, how far they are, what they must leave."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow.parquet as pq

from jobs.benchmarks.nodes import Nodes

RUN_LIMIT_S = 420
TELLING = ("error", "FAILED", "stopped", "warning", "killed")
"""What a line of a run begins with that says what is wrong."""
STEPS, SUB_BATCH, CHECKPOINT_EVERY = 60, 24, 5
STALL_S = 30.0
SAME = ["step", "loss", "learnability", "samples_loaded", "flops"]
"""Columns of a training's log that harm must not change."""

Kind = Literal["curate", "train"]


class Case(NamedTuple):
    """What is run: the pool, how much of it there is to commit, and for a training the curated run it reads."""

    kind: Kind
    pool: str
    shards: int
    curated: Path

    @property
    def words(self) -> list[str]:
        """The job and its flags, without the output."""
        if self.kind == "curate":
            words = ["jobs.curate", "debug", "--pool.shards", self.pool, "--compute.actors", "2"]
            words += ["--compute.decode-threads", "1", "--max-drop-fraction", "1"]
            return [*words, "--compute.stall-s", str(STALL_S)]
        words = ["jobs.train", "debug", "--data.run", str(self.curated), "--train.num-steps", str(STEPS)]
        words += ["--train.sub-batch", str(SUB_BATCH), "--train.filter-ratio", "0.5", "--train.score-batch", "48"]
        words += ["--checkpoint-every", str(CHECKPOINT_EVERY), "--compute.workers", "2"]
        return [*words, "--compute.max-failures", "5", "--compute.stall-s", str(STALL_S), "--ledger.actors", "2"]

    @property
    def actors(self) -> tuple[bytes, ...]:
        """What the command lines of the run's actors say."""
        return (b"ShardEmbed",) if self.kind == "curate" else (b"RayTrainWorker", b"ReadShare", b"LedgerActor")

    @property
    def whole(self) -> int:
        """How many pieces a run commits."""
        return self.shards if self.kind == "curate" else STEPS // CHECKPOINT_EVERY


@dataclass
class Round:
    """A run that is being harmed: its output, the process of its driver, the cluster, and what was noted."""

    case: Case
    output: Path
    nodes: Nodes
    rng: random.Random
    process: subprocess.Popen[str] = field(init=False)
    notes: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    """What should have happened and did not."""
    harmed: bool = False
    """The run was alive when the harm came; some end before."""

    def start(self) -> subprocess.Popen[str]:
        """Give the command."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", *self.case.words, "--output", str(self.output)],
            env={**os.environ, **self.nodes.environment},
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
        telling = [line for line in said.splitlines() if line.startswith(TELLING)]
        self.notes += [f"exit {process.returncode}", *telling[-3:]]
        return process.returncode

    def committed(self) -> dict[str, int]:
        """What is committed, and when each piece was: shards, or the newest checkpoint's step."""
        if self.case.kind == "curate":
            folder = self.output / "manifest" / "embed"
            return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")} if folder.exists() else {}
        saved = (self.output / "train" / "checkpoints").glob("step-*/position.json")
        newest = max((int(path.parent.name.partition("-")[2]) for path in saved), default=0)
        return {str(step): 0 for step in range(CHECKPOINT_EVERY, newest + 1, CHECKPOINT_EVERY)}

    def wait_for_a_moment(self) -> None:
        """Wait until some pieces are committed and some are not, or the run ended."""
        count = self.rng.randint(1, max(1, self.case.whole // 2))
        while len(self.committed()) < count and self.process.poll() is None:
            time.sleep(0.02)
        self.harmed = self.process.poll() is None

    def results(self) -> dict[str, str]:
        """What must not depend on harm: sha256 of every table, selection and tar; or of a training's curve."""
        if self.case.kind == "train":
            log = self.output / "train" / "steps.parquet"
            return (
                {"steps": _digest(str(pq.read_table(log, columns=SAME).to_pydict()).encode())} if log.exists() else {}
            )
        folders = (self.output / name for name in ("samples", "selection", "shards"))
        files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and path.name[0] != "."]
        return {str(path.relative_to(self.output)): _digest(path.read_bytes()) for path in files}

    def balances(self, summary: dict[str, Any]) -> bool:
        """True if nothing is lost and nothing is doubled, by the run's own account."""
        if self.case.kind == "curate":
            return summary["read"] == summary["embedded"] + sum(summary["dropped"].values())
        return (
            summary["steps"] == STEPS and summary["ledger"]["uses"] == summary["samples_trained"] == STEPS * SUB_BATCH
        )


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
