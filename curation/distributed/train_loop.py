"""What each Ray Train worker runs: pull a super-batch, score it, select, step, tell the ledger; now and then measure.

All workers go through the same steps. What differs is what they hold: their share of each super-batch, and rank 0 the
log, the evaluation and the checkpoints. A worker group that starts again goes on from the newest checkpoint, and takes
the ledger back to it.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch

from curation.columns import LEDGER_COLUMNS
from curation.data import step_log, storage
from curation.data.event_files import write_events
from curation.data.held_out import HeldOut, held_by_pool
from curation.data.step_log import Row
from curation.distributed import checkpoint, energy
from curation.distributed.checkpoint import Position, tag_of
from curation.distributed.comparison import comparison_of
from curation.distributed.energy import MILLIJOULES, EnergyMeter
from curation.distributed.evaluate import Evaluation
from curation.distributed.learners import build_learner, load_evaluation, load_held_out
from curation.distributed.metrics import RunMetrics
from curation.distributed.notices import Notice, Notices
from curation.distributed.pool_scoring import PoolScoring
from curation.distributed.ready_batches import LoopSpec, OwnScoring, Ready, ReadyBatches
from curation.distributed.round_selection import RoundFeed
from curation.distributed.run_ledger import RunLedger, barrier
from curation.distributed.step_notes import StepNotes
from curation.distributed.train_stalls import StallGuard
from curation.recipe import TrainRecipe
from curation.selector import Rows
from curation.training.collectives import gather, ranks
from curation.training.contrastive import make_optimizer
from curation.training.online_step import OnlineSettings, OnlineTrainer
from curation.training.picking import Stopwatch
from curation.training.step import NotFinite, StepReport

PROGRESS_EVERY_S = 5.0
NOT_COUNTED = -1
_LOG = logging.getLogger(__name__)


def progress_url(output: str) -> str:
    """Where rank 0 notes how far it is, for whoever watches."""
    return storage.join(output, "train", "progress.json")


def held_out_url(output: str) -> str:
    """Where it is noted how many of the held-out samples the pool holds, before any figure of theirs."""
    return storage.join(output, "train", "held_out.json")


def alignment_url(output: str) -> str:
    """Where it is noted how well the reference's mimic layer fits the learner."""
    return storage.join(output, "train", "alignment.json")


def train_loop(told: dict[str, Any]) -> None:
    """Run one worker from the newest checkpoint to the last step, or to a notice's. `told` is {"spec": LoopSpec}."""
    spec: LoopSpec = told["spec"]
    torch.set_num_threads(spec.recipe.compute.torch_threads)
    worker = _Worker(spec)
    num_steps, every = spec.recipe.train.num_steps, spec.recipe.checkpoint_every
    stall_guard = StallGuard(spec.recipe.output, ranks().rank, stall_s=spec.recipe.compute.stall_s)
    with stall_guard as guard, worker.metrics:
        begun = worker.begin()
        for ready in worker.ready():
            if not worker.step(ready, begun=begun):
                return
            guard.moved()
            done = ready.number + 1
            if done == num_steps or _is_due(done, spec.recipe.evaluate.every_steps):
                worker.evaluate(done)
                guard.moved()
            if done == num_steps or _is_due(done, every) or worker.notice in (Notice.SAVE, Notice.END):
                worker.checkpoint(done)
                guard.moved()
            if worker.notice is Notice.END:
                break
            begun = worker.begin()
        worker.close()


def _is_due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


class _Worker:
    """One rank: its learner, its feed, its way to the ledger, and what it notes."""

    def __init__(self, spec: LoopSpec):
        recipe = spec.recipe
        self._spec, self._output = spec, recipe.output
        self._rank, self._world_size = ranks()
        learner = build_learner(spec.learner, ray.train.torch.get_device())
        optimizer = make_optimizer(
            learner.network,
            learning_rate=recipe.train.learning_rate,
            weight_decay=recipe.train.weight_decay,
            betas=(0.9, recipe.train.beta2),
        )
        self._notices = Notices(recipe.output)
        self.notice = Notice.GO_ON
        """What is to be done after the last step that was taken."""
        self._position = Position(0, None)
        totals: dict[str, float] = {}
        if newest := ray.train.get_checkpoint():
            with newest.as_directory() as folder:
                self._position, totals = checkpoint.load(Path(folder), learner.saved, optimizer)
        self._ledger = RunLedger(spec, tag=self._position.tag, device=ray.train.torch.get_device())
        selector = recipe.step_selector()
        self._trainer = OnlineTrainer(
            learner,
            optimizer,
            selector,
            settings_of(recipe),
            recall=self._ledger.recall if selector.needs & LEDGER_COLUMNS else None,
            compare=comparison_of(spec.learner, learner),
        )
        self._done = self._position.step
        self._pool = None
        if spec.pool is not None:
            self._pool = PoolScoring(spec.pool, spec, learner.network, device=self._trainer.device)
        self._batches: ReadyBatches = self._pool or OwnScoring(
            spec,
            self._trainer.picker,
            model=self._trainer.model,
            before_first=self._look_at_first,
            rounds=self._rounds() if recipe.is_round_wise else None,
        )
        self._steps: list[Row] = []
        self._evaluations: list[Row] = []
        self._evaluation = self._load_evaluation() if self._rank == 0 else None
        self._notes = StepNotes(recipe, totals) if self._rank == 0 else None
        self._next_progress = 0.0
        self.metrics = RunMetrics(self._output)
        """Rank 0 tells of the run; to be closed when this worker has ended."""
        self._meter = EnergyMeter(ray.train.torch.get_device())

    def _load_evaluation(self) -> Evaluation | None:
        """What is measured on, if anything is; first it is noted what of it the pool holds."""
        held_out = load_held_out(self._spec.learner)
        if held_out is None:
            return None
        self._note_held_out(held_out)
        return load_evaluation(self._spec.learner, held_out)

    def _note_held_out(self, held_out: HeldOut) -> None:
        url = held_out_url(self._output)
        if storage.exists(url):  # a worker group before this one did
            return
        shards = [shard.number for shard in self._spec.stream()[0]]
        held = held_by_pool(held_out.uids, held_out.sha256s, self._spec.recipe.data.run, shards)
        told = {"evaluated": len(held_out.uids), "held_by_the_pool": held}
        storage.write_bytes(url, json.dumps(told).encode())

    def _rounds(self) -> RoundFeed:
        """What the run's rounds choose from the whole pool."""
        return RoundFeed(
            self._spec.recipe,
            self._spec.stream()[0],
            self._spec.feed,
            settle=self._ledger.settle,
            recall=self._ledger.remembered,
            device=self._trainer.device,
        )

    def begin(self) -> float:
        """Seconds and joules from here on are the next step's."""
        self._meter.used()
        return time.perf_counter()

    def ready(self) -> Iterator[Ready]:
        """The steps that are left, each with what this rank trains on. Ends early where a batch is bad."""
        steps = range(self._position.step, self._spec.recipe.train.num_steps)
        if self._rank == 0:
            self.metrics.begins(steps.start)
        if self._pool is not None:
            if self._rank == 0:
                self._pool.begin(steps.start)
            barrier()
        try:
            yield from self._batches.ready(steps)
        except NotFinite as error:
            self._save_failure(self._done, error)

    def step(self, ready: Ready, *, begun: float) -> bool:
        """Take one step and note it. False if the run cannot go on: what was wrong is saved in train/failure.json."""
        number, watch = ready.number, Stopwatch()
        try:
            outcome = self._trainer.train_on(number, ready.sub_batch, ready.picked, watch=ready.watch)
        except NotFinite as error:
            error.addresses = ready.addresses.tolist()
            self._save_failure(number, error)
            return False
        self._done = number + 1
        self._batches.trained(self._done)
        with watch("ledger"):
            self._ledger.record(ready)
        says, num_bad, joules = self._agreed(ready.ok)
        self.notice = self._notices.heard(says)
        if self._notes is not None:
            self._note(self._notes, ready, outcome.report, watch.seconds, num_bad=num_bad, joules=joules, begun=begun)
        return True

    def evaluate(self, done: int) -> None:
        """Measure the learner after `done` steps."""
        if self._evaluation is None or self._notes is None:
            return
        begun = time.perf_counter()
        measured = self._evaluation.measure(self._trainer.learner.network)
        totals = dict(self._notes.totals)
        seconds = time.perf_counter() - begun
        self._evaluations.append({"step": done, **totals, **measured, "evaluate_seconds": seconds})

    def checkpoint(self, done: int) -> None:
        """Save everything after `done` steps, the ledger first. Collective."""
        tag = tag_of(done)
        self._ledger.save(tag)
        if self._notes is None:
            ray.train.report({"step": done}, checkpoint=None, checkpoint_dir_name=tag)
            return
        for name, rows in (("steps", self._steps), ("evaluations", self._evaluations)):
            step_log.write_part(self._output, name, rows)
            write_events(self._output, name, rows)
        last = {"step": done, "loss": self._steps[-1]["loss"] if self._steps else None}
        self._steps, self._evaluations = [], []
        with tempfile.TemporaryDirectory() as folder:
            trainer = self._trainer
            saved = trainer.learner.saved
            checkpoint.save(Path(folder), saved, trainer.optimizer, Position(done, tag), self._notes.totals)
            ray.train.report(last, checkpoint=ray.train.Checkpoint.from_directory(folder), checkpoint_dir_name=tag)
        _LOG.info("checkpoint after step %d", done, extra={"facts": last})
        # The newest checkpoint that Ray knows of may still be the one before.
        self._ledger.forget_old()

    def close(self) -> None:
        """Wait until the ledger has all that was recorded."""
        self._ledger.close()

    def _look_at_first(self, rows: Rows) -> None:
        """Measure once, before the first step, whether the reference's layer fits; say so where it does not."""
        if self._rank or not self._spec.recipe.mimics:
            return
        measured = self._trainer.learner.alignment(rows)
        if measured is None:
            return
        if complaint := measured.complaint:
            warnings.warn(complaint, stacklevel=1)
        # NaN, for a reference that knows nothing, is no JSON.
        surviving = None if math.isnan(measured.surviving) else measured.surviving
        told = {**measured._asdict(), "surviving": surviving, "complaint": measured.complaint}
        storage.write_bytes(alignment_url(self._output), json.dumps(told).encode())

    def _agreed(self, ok: torch.Tensor) -> tuple[Notice, int, float | None]:
        """Rank 0's word after this step; of all ranks the undecodable rows and the joules, if known. Collective."""
        says = self._notices.rank_0_says() if self._rank == 0 else Notice.GO_ON
        used = self._meter.used()
        millijoules = NOT_COUNTED if used is None else round(used * MILLIJOULES)
        told_W3 = gather(torch.tensor([[says, int((~ok).sum()), millijoules]], device=self._trainer.device))
        joules = energy.total(None if each == NOT_COUNTED else each / MILLIJOULES for each in told_W3[:, 2].tolist())
        return Notice(int(told_W3[0, 0])), int(told_W3[:, 1].sum()), joules

    def _note(
        self,
        notes: StepNotes,
        ready: Ready,
        report: StepReport,
        seconds: dict[str, float],
        *,
        num_bad: int,
        joules: float | None,
        begun: float,
    ) -> None:
        """One row of the log. The figures are of the whole step, over all ranks; seconds are rank 0's."""
        reference_loss = ready.picked.reference_loss
        row: Row = {
            **notes.of(ready),
            "loss": report.loss,
            "accuracy": report.accuracy,
            "grad_norm": report.grad_norm,
            "logit_scale": report.logit_scale,
            "learnability": None if reference_loss is None else report.mean_loss - reference_loss,
            "not_decoded": num_bad,
            **{f"seconds_{name}": value for name, value in seconds.items()},
            **({} if joules is None else {"joules": joules}),
        }
        step_seconds = time.perf_counter() - begun
        notes.totals["seconds"] += step_seconds
        self._steps.append({**row, "seconds": notes.totals["seconds"], "step_seconds": step_seconds})
        self._tell_progress()
        train = self._spec.recipe.train
        self.metrics.step(self._steps[-1], loaded=train.super_batch, trained=train.sub_batch)

    def _tell_progress(self) -> None:
        if time.monotonic() >= self._next_progress:
            self._next_progress = time.monotonic() + PROGRESS_EVERY_S
            storage.write_bytes(progress_url(self._output), json.dumps(self._steps[-1]).encode())

    def _save_failure(self, number: int, error: NotFinite) -> None:
        about = {
            "step": number,
            "rank": self._rank,
            "why": str(error),
            "rows": error.rows,
            "addresses": error.addresses,
        }
        url = storage.join(self._output, "train", "failure", f"rank-{self._rank}.json")
        storage.write_bytes(url, json.dumps(about).encode())


def settings_of(recipe: TrainRecipe) -> OnlineSettings:
    """What a recipe says of choosing and stepping."""
    train = recipe.train
    return OnlineSettings(
        keep=train.sub_batch,
        num_steps=train.num_steps,
        seed=recipe.seed,
        scope=train.scope,
        quota=train.quota,
        low_share=recipe.low_resolution.share,
        learning_rate=train.learning_rate,
        schedule=train.schedule,
        warmup=train.warmup,
        cooldown=train.cooldown,
        floor=train.floor,
        max_grad_norm=train.max_grad_norm,
        compiled=train.compile,
    )
