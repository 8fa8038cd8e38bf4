"""Sub-batches that are ready to be trained on, step after step: this worker scores its own share of each super-batch.

`scoring_pool` is the other way to the same: there actors of their own score, and this worker pulls what they chose.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn

from curation.data import offered, storage
from curation.data.offered import Rounds
from curation.data.step_log import Row
from curation.distributed.feed import DECODE_SECONDS, ENCODED, LOW_PIXELS, Block, FeedSpec, Share, blocks
from curation.distributed.late_decode import LateDecode
from curation.distributed.learners import LearnerSpec
from curation.distributed.ledger_actor import LedgerHandles
from curation.distributed.round_selection import RoundFeed
from curation.recipe import TrainRecipe
from curation.selector import Rows
from curation.training.collectives import ranks
from curation.training.learner import RowFlops
from curation.training.picking import Picked, Picker, Stopwatch, SubBatch
from curation.training.step import NotFinite


@dataclass(frozen=True)
class LoopSpec:
    """What every worker is told: small values only."""

    learner: LearnerSpec
    columns: tuple[tuple[str, str], ...]
    """Columns of the run's tables that travel with the rows: each one's name there, and in the rows."""
    ledger: LedgerHandles
    pool: Any = None
    """The scoring pool's actor, where one scores."""

    @property
    def recipe(self) -> TrainRecipe:
        """The whole recipe."""
        return self.learner.recipe

    @property
    def feed(self) -> FeedSpec:
        """What is read for a row."""
        recipe = self.recipe
        return FeedSpec(
            run=recipe.data.run,
            model=recipe.learner.model,
            pretrained=recipe.learner.pretrained,
            features=recipe.data.features,
            label=recipe.data.label,
            classes=self.learner.classes,
            columns=self.columns,
            max_pixels=recipe.data.max_pixels,
            rules=self.learner.rules,
            decode_threads=recipe.compute.decode_threads,
            low_size=recipe.low_resolution.image_size,
        )

    def stream(self) -> tuple[list[offered.OfferedShard], Rounds]:
        """The pool as it was when the run began, and the order of its rows."""
        recipe = self.recipe
        shards = offered.load(storage.join(recipe.output, "train", "pool.parquet"))
        sizes = np.array([shard.offered for shard in shards])
        return shards, Rounds(sizes, segment_rows=recipe.data.segment_rows, seed=recipe.seed)


class Ready(NamedTuple):
    """A step's sub-batch, and what is known of the super-batch that it was chosen from."""

    number: int
    picked: Picked
    sub_batch: SubBatch | None
    """None if the whole super-batch is trained on, from the forward pass that scored it."""
    addresses: torch.Tensor
    """(n,) int64 of this rank's rows of the super-batch."""
    ok: torch.Tensor
    """(n,) bool: which of them could be decoded."""
    row_flops: RowFlops
    watch: Stopwatch
    noted: Row
    """For the log."""


class ReadyBatches(Protocol):
    """Where a training worker gets its sub-batches."""

    def ready(self, steps: range) -> Iterator[Ready]:
        """The steps' sub-batches, in order. NotFinite where the learner's embeddings are not finite."""
        ...

    def trained(self, done: int) -> None:
        """`done` steps have been taken: the learner's weights are new ones."""
        ...


class OwnScoring:
    """Each worker reads and scores its own share of the super-batch; the choice among all is collective."""

    def __init__(
        self,
        spec: LoopSpec,
        picker: Picker,
        *,
        model: nn.Module | None = None,
        before_first: Callable[[Rows], None] | None = None,
        rounds: RoundFeed | None = None,
    ):
        """`model` is the learner's network, or wraps it; None where the training step is not ours.

        `before_first` is called with the run's first rows. `rounds` says what is read where a method chooses by the
        round.
        """
        self._rounds = rounds
        self._spec, self._model, self._before_first = spec, model, before_first
        self._chooser = Chooser(spec, picker)

    def ready(self, steps: range) -> Iterator[Ready]:
        """As in ReadyBatches."""
        compute, rank, world_size = self._spec.recipe.compute, *ranks()
        share = Share(self._spec.recipe.train.super_batch, rank, world_size)
        if self._rounds is not None:
            stream = self._rounds.blocks(share, from_step=steps.start)
        else:
            stream = blocks(
                self._spec.feed,
                *self._spec.stream(),
                share,
                steps=steps,
                actors=compute.feed_actors,
                prefetch=compute.prefetch,
            )
        for number in steps:
            begun = time.perf_counter()
            block = next(stream)
            waited = time.perf_counter() - begun
            encoded, rows = block.pop(ENCODED, None), as_rows(block)
            if number == 0 and self._before_first is not None:
                self._before_first(rows)
            ready = self._chooser.choose(number, rows, encoded, model=self._model)
            yield ready._replace(noted={"seconds_wait": waited, **ready.noted})

    def trained(self, done: int) -> None:
        """Nothing to do: the weights that score are those that are trained."""


class Chooser:
    """From a block of the feed to what is trained on of it."""

    def __init__(self, spec: LoopSpec, picker: Picker):
        self._spec, self._picker = spec, picker
        self._late_decode = None if spec.feed.low_size is None else LateDecode(spec.feed)
        self._row_flops: RowFlops | None = None

    def choose(self, number: int, rows: Rows, encoded: np.ndarray | None, *, model: nn.Module | None) -> Ready:
        """Score, choose, and bring together what is trained on; `encoded` as in a Block. Collective.

        NotFinite, with all addresses, where the learner's embeddings are not finite.
        """
        decode_seconds = float(rows.pop(DECODE_SECONDS).sum()) if DECODE_SECONDS in rows else None
        late, in_full = self._late_decode, None
        if late is not None and encoded is not None:
            in_full = late.of(encoded, rows[LOW_PIXELS])
        progress = number / self._spec.recipe.train.num_steps
        watch = Stopwatch()
        try:
            picked, sub_batch = self._picker.choose(
                number, rows, progress=progress, model=model, in_full=in_full, watch=watch
            )
        except NotFinite as error:
            error.addresses = rows["address"].tolist()
            raise
        noted: Row = {"decode_seconds": decode_seconds}
        if late is not None and decode_seconds is not None:
            noted["decode_seconds"] = decode_seconds + late.seconds
            noted["decode_seconds_saved"] = late.saved(num_rows=len(rows["ok"]), low_seconds=decode_seconds)
        if self._row_flops is None:
            self._row_flops = self._picker.learner.flops(rows, self._spec.recipe.step_selector().needs)
        return Ready(number, picked, sub_batch, rows["address"], rows["ok"], self._row_flops, watch, noted)


def as_rows(block: Block) -> Rows:
    """The feed's block as tensors that may be written to."""
    return {name: torch.from_numpy(np.array(column)) for name, column in block.items()}
