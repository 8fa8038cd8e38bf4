"""What each Ray Train worker runs: pull a super-batch, score it, select, step, tell the ledger; now and then measure.

All workers go through the same steps. What differs is what they hold: their share of each super-batch, and rank 0 the
log, the evaluation and the checkpoints. A worker group that starts again goes on from the newest checkpoint, and takes
the ledger back to it.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from curation.columns import LEDGER_COLUMNS
from curation.data import offered, score_log, step_log, storage
from curation.data.event_files import write_events
from curation.data.offered import Rounds
from curation.data.score_log import LoggedStep, ScoreLog
from curation.data.step_log import Row
from curation.distributed import checkpoint
from curation.distributed.checkpoint import Position, tag_of
from curation.distributed.feed import Block, FeedSpec, Share, blocks
from curation.distributed.learners import LearnerSpec, build_learner, load_evaluation
from curation.distributed.ledger_actor import LedgerHandles
from curation.distributed.ledger_client import LedgerClient
from curation.distributed.metrics import RunMetrics
from curation.distributed.notices import Notice, Notices
from curation.numerics.sampling import uid_words
from curation.recipe import TrainRecipe
from curation.selector import Rows
from curation.training.collectives import gather, ranks
from curation.training.contrastive import make_optimizer
from curation.training.flops import TRAINING_PASS
from curation.training.online_step import OnlineSettings, OnlineTrainer, Outcome, Stopwatch
from curation.training.step import NotFinite
from curation.training.step_facts import KnownJunk, facts_of, fit_clusters

PROGRESS_EVERY_S = 5.0
SNAPSHOTS_KEPT = 2
LEDGER = "score"
"""The name of the run's ledger."""
TOTALS = ("samples_loaded", "samples_trained", "flops", "seconds")


@dataclass(frozen=True)
class LoopSpec:
    """What every worker is told: small values only."""

    learner: LearnerSpec
    columns: tuple[tuple[str, str], ...]
    """Columns of the run's tables that travel with the rows: each one's name there, and in the rows."""
    ledger: LedgerHandles

    @property
    def recipe(self) -> TrainRecipe:
        """The whole recipe."""
        return self.learner.recipe


def progress_url(output: str) -> str:
    """Where rank 0 notes how far it is, for whoever watches."""
    return storage.join(output, "train", "progress.json")


def alignment_url(output: str) -> str:
    """Where it is noted how well the reference's mimic layer fits the learner."""
    return storage.join(output, "train", "alignment.json")


def train_loop(told: dict[str, Any]) -> None:
    """Run one worker from the newest checkpoint to the last step, or to a notice's. `told` is {"spec": LoopSpec}."""
    spec: LoopSpec = told["spec"]
    torch.set_num_threads(spec.recipe.compute.torch_threads)
    worker = _Worker(spec)
    num_steps, every = spec.recipe.train.num_steps, spec.recipe.checkpoint_every
    for number, block in worker.feed():
        if not worker.step(number, block):
            return
        done = number + 1
        if done == num_steps or _is_due(done, spec.recipe.evaluate.every_steps):
            worker.evaluate(done)
        if done == num_steps or _is_due(done, every) or worker.notice in (Notice.SAVE, Notice.END):
            worker.checkpoint(done)
        if worker.notice is Notice.END:
            break
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
        self._totals: dict[str, float] = dict.fromkeys(TOTALS, 0.0)
        if newest := ray.train.get_checkpoint():
            with newest.as_directory() as folder:
                self._position, totals = checkpoint.load(Path(folder), learner.saved, optimizer)
                self._totals |= totals
        self._ledger = self._open_ledger()
        self._score_log = self._open_score_log() if recipe.logs_scores else None
        selector = recipe.selector()
        self._trainer = OnlineTrainer(
            learner,
            optimizer,
            selector,
            _settings(spec),
            recall=self._recall if selector.needs & LEDGER_COLUMNS else None,
        )
        self._steps: list[Row] = []
        self._evaluations: list[Row] = []
        self._evaluation = load_evaluation(spec.learner) if self._rank == 0 else None
        self._junk = _load_junk(recipe) if self._rank == 0 else None
        self._centroids: torch.Tensor | None = None
        self._flops_per_step: float | None = None
        self._next_progress = 0.0
        self._metrics = RunMetrics(self._output)

    def feed(self) -> Iterator[tuple[int, Block]]:
        """The steps that are left, each with this rank's rows."""
        recipe = self._spec.recipe
        shards = offered.load(storage.join(self._output, "train", "pool.parquet"))
        rounds = Rounds(
            np.array([shard.offered for shard in shards]), segment_rows=recipe.data.segment_rows, seed=recipe.seed
        )
        feed = FeedSpec(
            run=recipe.data.run,
            model=recipe.learner.model,
            pretrained=recipe.learner.pretrained,
            features=recipe.data.features,
            label=recipe.data.label,
            classes=self._spec.learner.classes,
            columns=self._spec.columns,
            max_pixels=recipe.data.max_pixels,
            rules=self._spec.learner.rules,
            decode_threads=recipe.compute.decode_threads,
        )
        steps = range(self._position.step, recipe.train.num_steps)
        share = Share(recipe.train.super_batch, self._rank, self._world_size)
        stream = blocks(
            feed,
            shards,
            rounds,
            share,
            steps=steps,
            actors=recipe.compute.feed_actors,
            prefetch=recipe.compute.prefetch,
        )
        for number in steps:
            begun = time.perf_counter()
            block = next(stream)
            self._waited = time.perf_counter() - begun
            yield number, block

    def step(self, number: int, block: Block) -> bool:
        """Take one step and note it. False if the run cannot go on: what was wrong is saved in train/failure.json."""
        begun, watch = time.perf_counter(), Stopwatch()
        rows = _as_rows(block)
        if number == 0 and self._rank == 0 and self._spec.recipe.mimics:
            self._note_alignment(rows)
        try:
            outcome = self._trainer.step(number, rows)
        except NotFinite as error:
            self._save_failure(number, rows, error)
            return False
        with watch("ledger"):
            addresses, values = outcome.recorded
            self._ledger.record(LEDGER, addresses.numpy(), values.numpy(), step=number, used=outcome.trained.numpy())
            if self._score_log is not None:
                self._score_log.add(_logged(number + 1, rows, outcome))
        says, num_bad = self._agreed(rows)
        self.notice = self._notices.heard(says)
        self._note(number, rows, outcome, watch.seconds, num_bad=num_bad)
        if self._steps:
            seconds = self._waited + time.perf_counter() - begun
            self._totals["seconds"] += seconds
            self._steps[-1] |= {"seconds": self._totals["seconds"], "step_seconds": seconds}
            self._tell_progress()
            train = self._spec.recipe.train
            self._metrics.step(self._steps[-1], loaded=train.super_batch, trained=train.sub_batch)
        return True

    def evaluate(self, done: int) -> None:
        """Measure the learner after `done` steps."""
        if self._evaluation is None:
            return
        begun = time.perf_counter()
        measured = self._evaluation.measure(self._trainer.learner.network)
        totals = {name: self._totals[name] for name in TOTALS}
        seconds = time.perf_counter() - begun
        self._evaluations.append({"step": done, **totals, **measured, "evaluate_seconds": seconds})

    def checkpoint(self, done: int) -> None:
        """Save everything after `done` steps, the ledger first. Collective."""
        tag = tag_of(done)
        self._ledger.flush()
        if self._score_log is not None:
            self._score_log.flush()
        _barrier()
        if self._rank:
            ray.train.report({"step": done}, checkpoint=None, checkpoint_dir_name=tag)
            return
        self._ledger.snapshot(tag)
        for name, rows in (("steps", self._steps), ("evaluations", self._evaluations)):
            step_log.write_part(self._output, name, rows)
            write_events(self._output, name, rows)
        last = {"step": done, "loss": self._steps[-1]["loss"] if self._steps else None}
        self._steps, self._evaluations = [], []
        with tempfile.TemporaryDirectory() as folder:
            trainer = self._trainer
            saved = trainer.learner.saved
            checkpoint.save(Path(folder), saved, trainer.optimizer, Position(done, tag), self._totals)
            ray.train.report(last, checkpoint=ray.train.Checkpoint.from_directory(folder), checkpoint_dir_name=tag)
        # The newest checkpoint that Ray knows of may still be the one before.
        self._ledger.forget(self._spec.ledger.states()[0]["tags"][:-SNAPSHOTS_KEPT])

    def close(self) -> None:
        """Wait until the ledger has all that was recorded."""
        self._ledger.close()

    def _open_ledger(self) -> LedgerClient:
        """A way to the ledger, taken back to the checkpoint; whatever the former attempt still sends is refused."""
        ledger = self._spec.ledger
        begun = LedgerClient.restore(ledger, self._position.tag) if self._rank == 0 else 0
        attempt = int(gather(torch.tensor([begun], device=ray.train.torch.get_device()))[0])
        client = LedgerClient(ledger, writer=f"rank-{self._rank}", attempt=attempt)
        client.open()
        _barrier()  # an ema waits for all that have opened, so all open before any records
        return client

    def _open_score_log(self) -> ScoreLog:
        """This rank's way into the log, under an attempt's number that all ranks share."""
        begun = score_log.next_attempt(self._output) if self._rank == 0 else 0
        attempt = int(gather(torch.tensor([begun], device=ray.train.torch.get_device()))[0])
        return ScoreLog(self._output, rank=self._rank, attempt=attempt)

    def _note_alignment(self, rows: Rows) -> None:
        """Measure once, before the first step, whether the reference's layer fits; say so where it does not."""
        measured = self._trainer.learner.alignment(rows)
        if measured is None:
            return
        if complaint := measured.complaint:
            warnings.warn(complaint, stacklevel=1)
        # NaN, for a reference that knows nothing, is no JSON.
        surviving = None if math.isnan(measured.surviving) else measured.surviving
        told = {**measured._asdict(), "surviving": surviving, "complaint": measured.complaint}
        storage.write_bytes(alignment_url(self._output), json.dumps(told).encode())

    def _recall(self, addresses: torch.Tensor) -> Rows:
        # The columns must hold what all ranks recorded in the step before.
        self._ledger.flush()
        _barrier()
        columns = self._ledger.read(LEDGER, addresses.numpy())
        return {name: torch.from_numpy(column.astype(np.float32)) for name, column in columns.items()}

    def _agreed(self, rows: Rows) -> tuple[Notice, int]:
        """Rank 0's word after this step, and how many rows could not be decoded on all ranks. Collective."""
        says = self._notices.rank_0_says() if self._rank == 0 else Notice.GO_ON
        mine = torch.tensor([[says, int((~rows["ok"]).sum())]], device=self._trainer.device)
        told_W2 = gather(mine)
        return Notice(int(told_W2[0, 0])), int(told_W2[:, 1].sum())

    def _note(self, number: int, rows: Rows, outcome: Outcome, seconds: dict[str, float], *, num_bad: int) -> None:
        """One row of the log, on rank 0. The figures are of the whole step, over all ranks; seconds are rank 0's."""
        train = self._spec.recipe.train
        selected = outcome.chosen.selected
        if self._rank:
            return
        self._totals["samples_loaded"] += train.super_batch
        self._totals["samples_trained"] += train.sub_batch
        self._totals["flops"] += self._step_flops(rows)
        report = outcome.report
        addresses = selected["address"]
        learnability = None if outcome.reference_loss is None else report.mean_loss - outcome.reference_loss
        self._steps.append(
            {
                "step": number + 1,
                "loss": report.loss,
                "accuracy": report.accuracy,
                "grad_norm": report.grad_norm,
                "logit_scale": report.logit_scale,
                "learnability": learnability,
                **facts_of(selected, centroids_KD=self._clusters(selected), junk=self._junk),
                "not_decoded": num_bad,
                "repeated_samples": len(addresses) - len(addresses.unique()),
                **{name: self._totals[name] for name in TOTALS if name != "seconds"},
                "seconds_wait": self._waited,
                **{f"seconds_{name}": value for name, value in (outcome.seconds | seconds).items()},
            }
        )

    def _tell_progress(self) -> None:
        if time.monotonic() >= self._next_progress:
            self._next_progress = time.monotonic() + PROGRESS_EVERY_S
            storage.write_bytes(progress_url(self._output), json.dumps(self._steps[-1]).encode())

    def _clusters(self, selected: Rows) -> torch.Tensor | None:
        """The clusters in which the run counts diversity: fitted once, on the first super-batch's chosen rows."""
        if self._centroids is None and "reference_image_embedding" in selected:
            url = storage.join(self._output, "train", "clusters.npy")
            if not storage.exists(url):
                fitted = fit_clusters(selected["reference_image_embedding"].cpu(), seed=self._spec.recipe.seed)
                with storage.write_atomic(url) as file:
                    np.save(file, fitted.numpy())
            with storage.open_read(url) as file:
                self._centroids = torch.from_numpy(np.load(file, allow_pickle=False))
        return self._centroids

    def _step_flops(self, rows: Rows) -> float:
        """Floating-point operations of a step over all ranks: scoring, an online reference, and training."""
        if self._flops_per_step is None:
            train, trainer = self._spec.recipe.train, self._trainer
            per_row = trainer.learner.flops(rows, self._spec.recipe.selector().needs)
            scoring = per_row.learner if trainer.scores_learner and not trainer.reuses_forward else 0.0
            again = 1.0 if train.micro_batches > 1 else 0.0
            training = train.sub_batch * per_row.learner * (TRAINING_PASS + again)
            self._flops_per_step = train.super_batch * (scoring + per_row.reference) + training
        return self._flops_per_step

    def _save_failure(self, number: int, rows: Rows, error: NotFinite) -> None:
        about = {
            "step": number,
            "rank": self._rank,
            "why": str(error),
            "rows": error.rows,
            "addresses": rows["address"].tolist(),
        }
        url = storage.join(self._output, "train", "failure", f"rank-{self._rank}.json")
        storage.write_bytes(url, json.dumps(about).encode())


def _settings(spec: LoopSpec) -> OnlineSettings:
    train = spec.recipe.train
    return OnlineSettings(
        keep=train.sub_batch,
        num_steps=train.num_steps,
        seed=spec.recipe.seed,
        scope=train.scope,
        quota=train.quota,
        learning_rate=train.learning_rate,
        warmup=train.warmup,
        cooldown=train.cooldown,
        floor=train.floor,
        max_grad_norm=train.max_grad_norm,
        compiled=train.compile,
    )


def _as_rows(block: Block) -> Rows:
    """The feed's block as tensors that may be written to."""
    return {name: torch.from_numpy(np.array(column)) for name, column in block.items()}


def _logged(step: int, rows: Rows, outcome: Outcome) -> LoggedStep:
    """This rank's rows as the score log has them; those that could not be used are left out."""
    scores = outcome.chosen.scores.cpu()
    usable = torch.isfinite(scores) & rows["ok"]
    weights = outcome.chosen.row_weights.cpu()
    return LoggedStep(step, rows["address"][usable].numpy(), scores[usable].numpy(), weights[usable].numpy())


def _load_junk(recipe: TrainRecipe) -> KnownJunk | None:
    if recipe.data.truth is None:
        return None
    with storage.open_read(recipe.data.truth) as file:
        truth = pq.read_table(file, columns=["uid", recipe.data.truth_column])
    is_junk = truth[recipe.data.truth_column].to_numpy(zero_copy_only=False).astype(bool)
    return KnownJunk(uid_words(truth["uid"].to_pylist()), is_junk)


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
