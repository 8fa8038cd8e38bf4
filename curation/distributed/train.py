"""A training run from end to end: check everything, start ledger and workers, gather the log, keep the account.

A run that was killed goes on from its newest checkpoint, with any number of workers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig

from curation.columns import FORMAT_VERSION
from curation.data import manifest, offered, step_log, storage
from curation.data.lease import Lease
from curation.data.offered import OfferedShard
from curation.distributed.learners import LearnerSpec
from curation.distributed.ledger_actor import LedgerHandles, start_ledger
from curation.distributed.ledger_client import LedgerClient
from curation.distributed.notices import note_url, passed_on
from curation.distributed.ready_batches import LoopSpec
from curation.distributed.resources import cluster, grown
from curation.distributed.run_ledger import LEDGER, ledger_specs
from curation.distributed.scoring_pool import close_pool, start_pool
from curation.distributed.stopping import Stop
from curation.distributed.train_loop import alignment_url, held_out_url, progress_url, settings_of, train_loop
from curation.distributed.train_plan import TrainPlan, checked, commit_to, pool_url, resolved
from curation.distributed.train_stalls import Stall
from curation.ledger import gini
from curation.models.clip import Precision
from curation.recipe import TrainRecipe

CHECKPOINTS_KEPT = 2
REPORT_POLL_S = "0.2"
PROGRESS_EVERY_S = 2.0


class TrainFailed(RuntimeError):
    """The workers could not go on."""


@dataclass(frozen=True)
class TrainSummary:
    """The account of a training run, as train/summary.json holds it. `failures` is empty if and only if all is well."""

    steps: int
    samples_loaded: int
    """Rows of all super-batches. A super-batch may span two rounds, so none is loaded without being in one."""
    samples_trained: int
    samples_not_decoded: int
    """Of those loaded: could be decoded when they were curated, and cannot now. They are never trained on; where a step
    takes every row, or a round has chosen them, it is that much smaller."""
    rounds: float
    seconds: float
    """Of this start of the run, all told; the steps' own are in train/steps.parquet."""
    flops: float
    last: dict[str, Any]
    """The last evaluation, or the last step's figures if there was none."""
    ledger: dict[str, Any]
    weights: str
    held_out: dict[str, int] = field(default_factory=dict)
    """`evaluated` samples and how many of them are `held_by_the_pool`, by uid or equal bytes; empty if none were."""
    failures: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    """What makes the result doubtful though all went well, such as a reference that does not fit the learner."""
    stopped: str | None = None
    """Why the run ended before its last step, without fault, after a checkpoint."""
    format_version: int = FORMAT_VERSION


class TrainWatch:
    """Hears how a training run gets on. This one is silent; jobs print."""

    def planned(self, recipe: TrainRecipe, *, rows: int, done: int) -> None:
        """All was checked; the pool offers `rows` rows, `done` steps were done before."""

    def held_out(self, told: dict[str, int]) -> None:
        """How many samples are measured on (`evaluated`), and how many of them the pool has (`held_by_the_pool`)."""

    def progress(self, noted: dict[str, Any]) -> None:
        """What rank 0 noted last."""

    def stalled(self, lines: list[str]) -> None:
        """No step was taken for a long time; on whom the run waits."""


def train(recipe: TrainRecipe, *, watch: TrainWatch | None = None, stop: Stop | None = None) -> TrainSummary:
    """Run a recipe. ValueError or OtherRun if it cannot run as it is, OutputInUse, TrainFailed if it does not end well.

    A run that is done is not done again. Asked to stop, it saves a checkpoint and ends.
    """
    watch, stop = watch or TrainWatch(), stop or Stop()
    recipe = resolved(recipe)
    with stop.on_sigterm(interrupts=True), Lease(recipe.output):
        plan = checked(recipe)
        commit_to(recipe, plan)
        if finished := _finished(recipe):
            return finished
        shards = offered.load(pool_url(recipe))
        watch.planned(recipe, rows=sum(shard.offered for shard in shards), done=_steps_done(recipe))
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", REPORT_POLL_S)
        for url in (note_url(recipe.output), held_out_url(recipe.output)):
            storage.delete(url)
        with (
            cluster(num_cpus=_cpus_wanted(recipe)),
            stop.on_sigterm(interrupts=False),
        ):
            summary = _run(recipe, plan, shards, watch, stop)
        storage.write_bytes(_summary_url(recipe), json.dumps(dataclasses.asdict(summary), indent=1).encode())
    return summary


def check(recipe: TrainRecipe) -> int:
    """Rows that the pool offers. ValueError if the recipe cannot run as it is; nothing is touched."""
    return sum(shard.offered for shard in checked(resolved(recipe)).shards)


def _run(
    recipe: TrainRecipe, plan: TrainPlan, shards: list[OfferedShard], watch: TrainWatch, stop: Stop
) -> TrainSummary:
    """Workers and ledger, until the last step or a stop. TrainFailed if they give up."""
    begun = time.time()
    device = _device(recipe)
    spec = loop_spec(recipe, plan, device=device)
    ledger = spec.ledger
    folder = storage.join(recipe.output, "train")
    # On a disk Ray opens it by itself: workers of a run with a filesystem of its own begin in another working folder.
    filesystem, path = (None, folder) if storage.is_local(folder) else storage.arrow_filesystem(folder)
    trainer = ray.train.torch.TorchTrainer(
        train_loop,
        train_loop_config={"spec": spec},
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if device == "cuda" else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=recipe.compute.workers,
            use_gpu=device == "cuda",
            # No CPUs: on CPUs too they are left to the feed, which waits for them without a word if a worker has them.
            resources_per_worker={"GPU": 1.0} if device == "cuda" else {"CPU": 0.001},
        ),
        run_config=RunConfig(
            name="checkpoints",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=recipe.compute.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=CHECKPOINTS_KEPT),
        ),
    )
    try:
        with passed_on(stop, recipe.output), _watched(recipe, watch):
            result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        storage.write_bytes(storage.join(recipe.output, "train", "error.txt"), _whole_story(error).encode())
        raise TrainFailed(f"{cause_of(error)}. The whole story is in {recipe.output}/train/error.txt") from error
    finally:
        if spec.pool is not None:
            close_pool(spec.pool)
        remembered = _remembered(ledger)
        ledger.close()
    return _account(recipe, shards, result, remembered, seconds=time.time() - begun, stopped=stop.reason)


def loop_spec(recipe: TrainRecipe, plan: TrainPlan, *, device: str) -> LoopSpec:
    """What workers are told; the ledger has been started, and the scoring pool if there is one."""
    ledger = start_ledger(
        recipe.output,
        _shard_sizes(offered.load(pool_url(recipe))),
        ledger_specs(recipe),
        num_actors=recipe.ledger.actors,
    )
    precision: Precision = "bfloat16" if device == "cuda" else "float32"
    if recipe.train.precision != "auto":
        precision = recipe.train.precision
    learner = LearnerSpec(
        recipe=recipe,
        precision=precision,
        rules=plan.rules,
        num_features=plan.num_features,
        classes=plan.classes,
        reference_scale=plan.reference_scale,
        reference_bias=plan.reference_bias,
    )
    spec = LoopSpec(learner=learner, columns=plan.columns, ledger=ledger)
    if recipe.train.scoring == "pool":
        spec = dataclasses.replace(spec, pool=start_pool(spec, settings_of(recipe), device=device))
    return spec


def _remembered(ledger: LedgerHandles) -> dict[str, Any]:
    """What the ledger knows at the end of a run."""
    client = LedgerClient(ledger, writer="driver", attempt=ledger.attempt())
    usage = client.usage_histogram()
    return {
        "samples_scored": client.known(LEDGER),
        "samples_used": int(usage[1:].sum()),
        "uses": int((usage * np.arange(len(usage))).sum()),
        "usage_gini": round(gini(usage), 6),
        "saturated": sum(client.saturated().values()),
    }


def _device(recipe: TrainRecipe) -> str:
    """cuda or cpu. ValueError if the cluster lacks the GPUs that the recipe asks for."""
    compute = recipe.compute
    scorers = compute.scoring_actors if recipe.train.scoring == "pool" else 0
    bundle = {"CPU": float(compute.feed_actors), **({"GPU": 1.0} if compute.device == "cuda" else {})}
    gpus = int(grown(bundle, compute.workers + scorers, wait_s=compute.wait_for_nodes_s).get("GPU", 0))
    device = compute.device if compute.device != "auto" else ("cuda" if gpus else "cpu")
    # One scorer is enough: the others come when there is room for them.
    if device == "cuda" and gpus < compute.workers + min(scorers, 1):
        needed = f"compute.workers={compute.workers}" + (" and a scoring actor" if scorers else "")
        raise ValueError(f"{needed} need a GPU each, the cluster has {gpus}")
    return device


def _cpus_wanted(recipe: TrainRecipe) -> int:
    compute = recipe.compute
    is_pool = recipe.train.scoring == "pool"
    return compute.scoring_actors if is_pool else compute.workers * compute.feed_actors


def _shard_sizes(shards: list[OfferedShard]) -> np.ndarray:
    sizes = np.zeros(max(shard.number for shard in shards) + 1, np.int64)
    for shard in shards:
        sizes[shard.number] = shard.rows
    return sizes


@contextlib.contextmanager
def _watched(recipe: TrainRecipe, watch: TrainWatch) -> Iterator[None]:
    """Tells `watch` what rank 0 notes, from a thread, for as long as the block runs."""
    url, over = progress_url(recipe.output), threading.Event()

    def tell_held_out() -> bool:
        told = _held_out(recipe)
        if told:
            watch.held_out(told)
        return bool(told)

    def look() -> None:
        seen = None
        stall = Stall(recipe.output, recipe.compute)
        is_told = not (recipe.evaluate.shards or recipe.evaluate.run)
        while not over.wait(PROGRESS_EVERY_S):
            with contextlib.suppress(OSError, ValueError):  # not there yet, or being replaced: the next look tells
                is_told = is_told or tell_held_out()
                noted = json.loads(storage.read_bytes(url))
                if is_told and noted != seen:  # not before that, also not what a former start noted
                    watch.progress(noted)
                    stall.moved()
                    seen = noted
            if lines := stall.lines():
                watch.stalled(lines)
        with contextlib.suppress(OSError):
            if not is_told:  # the run was over before the next look
                tell_held_out()

    thread = threading.Thread(target=look, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _whole_story(error: Exception) -> str:
    """Every failed worker's traceback."""
    failures = getattr(error, "worker_failures", {})
    return "\n\n".join([str(error), *(f"rank {rank}: {failure}" for rank, failure in sorted(failures.items()))])


def cause_of(error: Exception) -> str:
    """What the first worker that failed said, in one line."""
    failures = getattr(error, "worker_failures", {})
    for rank, failure in sorted(failures.items()):
        lines = re.findall(r"^[\w.]+(?:Error|Exception|Table|Taken|Attempt): .*$", str(failure), re.MULTILINE)
        own = [line for line in lines if not line.startswith("ray.exceptions.")] or lines  # what Ray wraps, not how
        return f"rank {rank}: {own[-1] if own else repr(failure)}"
    return str(error).strip().splitlines()[-1]


def _account(
    recipe: TrainRecipe,
    shards: list[OfferedShard],
    result: Any,
    ledger: dict[str, Any],
    *,
    seconds: float,
    stopped: str | None,
) -> TrainSummary:
    steps = step_log.merge(recipe.output, "steps")
    evaluations = step_log.merge(recipe.output, "evaluations")
    done = steps["step"].to_pylist()[-1] if len(steps) else 0
    failures = _failures(recipe, done, stopped)
    last = (evaluations if len(evaluations) else steps).to_pylist()[-1:]
    is_done = done == recipe.train.num_steps
    if is_done and result.checkpoint is not None:
        _save_learner(recipe, result.checkpoint)
    return TrainSummary(
        steps=done,
        samples_loaded=done * recipe.train.super_batch,
        samples_trained=int(steps["samples_trained"].to_pylist()[-1]) if len(steps) else 0,
        samples_not_decoded=sum(steps["not_decoded"].to_pylist()) if len(steps) else 0,
        rounds=round(done * recipe.train.super_batch / sum(shard.offered for shard in shards), 4),
        seconds=round(seconds, 3),
        flops=steps["flops"].to_pylist()[-1] if len(steps) else 0.0,
        last=last[0] if last else {},
        ledger=ledger,
        weights=learner_url(recipe.output),
        held_out=_held_out(recipe),
        failures=failures,
        warnings=_warnings(recipe),
        stopped=None if is_done or failures else stopped,
    )


def _held_out(recipe: TrainRecipe) -> dict[str, int]:
    url = held_out_url(recipe.output)
    return json.loads(storage.read_bytes(url)) if storage.exists(url) else {}


def _warnings(recipe: TrainRecipe) -> list[str]:
    told = _held_out(recipe)
    warnings = []
    if absent := manifest.read(storage.join(recipe.output, "recipe.json")).get("absent"):
        warnings.append(f"{len(absent):,} shards have left the pool, with what they offered, such as {absent[0]}")
    if held := told.get("held_by_the_pool", 0):
        warnings.append(
            f"{held:,} of the {told['evaluated']:,} held-out samples are in the pool that was trained on: what is "
            "measured on them may have been learnt by heart"
        )
    if recipe.mimics and storage.exists(alignment_url(recipe.output)):
        complaint = manifest.read(alignment_url(recipe.output))["complaint"]
        warnings += [complaint] if complaint else []
    return warnings


def _failures(recipe: TrainRecipe, done: int, stopped: str | None) -> list[str]:
    """What ended the run before its last step, if nobody asked for it; an account of it is in train/failure/."""
    if done == recipe.train.num_steps:
        return []
    folder = storage.join(recipe.output, "train", "failure")
    told = [manifest.read(storage.join(folder, name)) for name in storage.names_in(folder) if name.endswith(".json")]
    if stopped and not told:
        return []
    first = sorted(told, key=lambda failure: (failure["rows"] == [], failure["rank"]))[:1]
    return [
        f"step {failure['step']}, rank {failure['rank']}: {failure['why']}. The batch's addresses are in "
        f"{folder}/rank-{failure['rank']}.json"
        for failure in first
    ] or [f"{done} of {recipe.train.num_steps} steps were done"]


def _save_learner(recipe: TrainRecipe, newest: ray.train.Checkpoint) -> None:
    """The learner's weights as open_clip and `--embed.checkpoint` load them."""
    with newest.as_directory() as folder:
        state = torch.load(Path(folder) / "state.pt", weights_only=True, map_location="cpu")
    with storage.write_atomic(learner_url(recipe.output)) as file:
        torch.save(state["network"], file)


def _finished(recipe: TrainRecipe) -> TrainSummary | None:
    """The account of a run that came to its last step."""
    if not storage.exists(_summary_url(recipe)):
        return None
    summary = TrainSummary(**manifest.read(_summary_url(recipe)))
    return summary if summary.steps == recipe.train.num_steps and not summary.failures else None


def _steps_done(recipe: TrainRecipe) -> int:
    steps = step_log.read_parts(recipe.output, "steps")["step"]
    return steps[-1].as_py() if len(steps) else 0


def learner_url(output: str) -> str:
    """Where a run leaves the learner's weights."""
    return storage.join(output, "train", "learner.pt")


def _summary_url(recipe: TrainRecipe) -> str:
    return storage.join(recipe.output, "train", "summary.json")
