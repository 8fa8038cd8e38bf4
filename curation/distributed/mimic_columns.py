"""Grad-Mimic's offline stage: a training run's score log in, columns of the curated run that it trained on out.

The log is streamed once. Rows are put into rounds by how often they have come; a round's votes go to a temporary file
as soon as it is over, and the aggregator reads those files again. Memory is a few numbers per row of the pool, whatever
the number of steps. The columns are pieces like any other, so a selection filters by them beside the clip score:

    NAME.keep     1 for a row of the retained set, 0 for one that is called mislabelled
    NAME.useful   the verdict's probability: share of the rounds, or the one-coin model's
    NAME.score    mean raw mimic score
    NAME.rank     share of the rows with a lower mean score; `at_least` 0.15 drops the lowest 15%

N rows of the pool.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from curation.addresses import flat_positions, prefix_sums
from curation.data import manifest, offered, storage, tables
from curation.data.lease import Lease
from curation.data.score_log import read_steps
from curation.distributed.columns import checked_run
from curation.distributed.embed import STAGE as EMBED_STAGE
from curation.numerics.votes import Binariser, RoundVotes, Verdict, aggregate, binarise
from curation.recipe.columns import MimicRecipe


class MimicSummary(NamedTuple):
    """The account: the retained set, and with it an estimate of the pool's quality."""

    rows: int
    """Rows that the log knows."""
    steps: int
    rounds: int
    kept: int
    kept_share: float
    """The quality of the pool, as the paper estimates it."""
    mean_score: float
    accuracies: list[float] | None
    """Of the rounds, by the one-coin model."""


class VoteRounds:
    """Steps in, rounds of votes out: each row's k-th coming is in round k, and a round's votes lie in a file.

    At most three rounds are open: a super-batch may span two, and rows that are left over begin the next one.
    """

    def __init__(self, folder: Path, *, num_rows: int, by: Binariser, over: str):
        """`over` "step": a step's rows are binarised among themselves; "round": all of a round's."""
        self._folder, self._over = folder, over
        self._by: Binariser = by
        self._comings = np.zeros(num_rows, np.int64)
        self._first_open = 0
        self._open: dict[int, np.ndarray] = {}
        self._num_rows, self.num_rounds = num_rows, 0

    def add(self, places: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> None:
        """One step's rows: places in [0, N), raw scores, and weights of mean 1 within the step."""
        values = np.stack([scores, weights], axis=1)
        if self._over == "step":
            values = binarise(scores, weights, by=self._by)[:, None].astype(np.float32)
        while len(places):
            # A super-batch that spans two rounds may hold a row twice: its first coming, then the rest.
            _, first = np.unique(places, return_index=True)
            self._place(places[first], values[first])
            places, values = np.delete(places, first), np.delete(values, first, axis=0)

    def _place(self, places: np.ndarray, values: np.ndarray) -> None:
        # A row that missed rounds comes in the first one that is still open.
        comings = np.maximum(self._comings[places], self._first_open)
        self._comings[places] = comings + 1
        for coming in np.unique(comings).tolist():
            here = comings == coming
            if coming not in self._open:
                self._open[coming] = np.full((self._num_rows, values.shape[1]), np.nan, np.float32)
            self._open[coming][places[here]] = values[here]
        for over in sorted(coming for coming in self._open if coming < int(comings.max()) - 2):
            self._write(over)
            self._first_open = over + 1

    def close(self) -> None:
        """The rounds that are still open are over."""
        for coming in sorted(self._open):
            self._write(coming)

    def _write(self, coming: int) -> None:
        values = self._open.pop(coming)
        rows = np.flatnonzero(~np.isnan(values[:, 0]))
        known = values[rows]
        votes = known[:, 0] > 0.5 if self._over == "step" else binarise(known[:, 0], known[:, 1], by=self._by)
        np.savez(self._folder / f"{coming:06d}.npz", rows=rows, votes=votes)
        self.num_rounds = max(self.num_rounds, coming + 1)

    def __call__(self) -> Iterator[RoundVotes]:
        """The closed rounds in order."""
        for path in sorted(self._folder.glob("*.npz")):
            with np.load(path, allow_pickle=False) as stored:
                yield RoundVotes(stored["rows"], stored["votes"])


def add_mimic_columns(recipe: MimicRecipe) -> MimicSummary:
    """Make what is not made yet. ValueError or OtherRun if the recipe cannot run, OutputInUse if the run is held."""
    recipe = checked_mimic(recipe)
    with Lease(recipe.run):
        embedded = manifest.committed(recipe.run, EMBED_STAGE)
        shards = offered.load(storage.join(recipe.log, "train", "pool.parquet"))
        sizes = np.zeros(max(shard.number for shard in shards) + 1, np.int64)
        for shard in shards:
            sizes[shard.number] = shard.rows
        offsets = prefix_sums(sizes)
        made_by = {
            "log": recipe.log,
            "steps": _steps_done(recipe.log),
            **{name: getattr(recipe, name) for name in ("binariser", "aggregator", "over")},
        }
        stage = tables.piece_stage(recipe.column)
        made = manifest.committed(recipe.run, stage)
        for number, record in made.items():
            as_now = {**made_by, "samples": embedded[number]["key"]}
            manifest.check_same(record["made_by"], as_now, what=f"the column {recipe.column!r} of shard {number}")
        todo = [shard for shard in shards if shard.number not in made]
        if not todo:
            return MimicSummary(**made[shards[0].number]["quality"])
        found = _judged(recipe, offsets)
        for shard in todo:
            columns = _columns(recipe.column, found, slice(offsets[shard.number], offsets[shard.number + 1]))
            tables.write_piece(recipe.run, recipe.column, shard.number, columns)
            samples = embedded[shard.number]["key"]
            record = {"shard": shard.number, "samples": samples, "rows": shard.rows, "quality": found.account._asdict()}
            manifest.commit(recipe.run, stage, shard.number, record, made_by={**made_by, "samples": samples})
    return found.account


def checked_mimic(recipe: MimicRecipe) -> MimicRecipe:
    """The recipe with URLs that every node may open. ValueError if it cannot run; nothing is touched."""
    run = checked_run(recipe.run, recipe.column)
    log = storage.absolute(recipe.log) if recipe.log else ""
    url = storage.join(log, "recipe.json")
    trainer = manifest.read(url)["recipe"] if log and storage.exists(url) else {}
    if "data" not in trainer:  # a curated run has a recipe.json too
        raise ValueError(f"log: {recipe.log!r} is no run of jobs.train; name one, as in --log runs/mimic")
    trained_on = trainer["data"]["run"]
    if trained_on != run:
        raise ValueError(f"log: {log} was trained on {trained_on}, so its addresses are not those of {run}")
    if next(read_steps(log), None) is None:
        raise ValueError(f"log: {log} has no score log; train with --method grad_mimic, or --ledger.score-log on")
    return recipe.model_copy(update={"run": run, "log": log})


class _Judged(NamedTuple):
    """What the log says of the pool's rows, by their flat positions."""

    verdict: Verdict
    scores: np.ndarray
    ranks: np.ndarray
    is_known: np.ndarray
    account: MimicSummary


def _judged(recipe: MimicRecipe, offsets: np.ndarray) -> _Judged:
    num_rows = int(offsets[-1])
    totals, counts, steps = np.zeros(num_rows), np.zeros(num_rows, np.int64), 0
    with tempfile.TemporaryDirectory() as folder:
        rounds = VoteRounds(Path(folder), num_rows=num_rows, by=recipe.binariser, over=recipe.over)
        for step, addresses, scores, weights in read_steps(recipe.log, last_step=_steps_done(recipe.log)):
            places = flat_positions(addresses, offsets)
            np.add.at(totals, places, scores)
            np.add.at(counts, places, 1)
            rounds.add(places, scores, weights)
            steps = step
        rounds.close()
        verdict = aggregate(rounds, num_rows=num_rows, by=recipe.aggregator)
        num_rounds = rounds.num_rounds
    is_known = counts > 0
    means = np.divide(totals, counts, out=np.full(num_rows, np.nan), where=is_known)
    kept = int(verdict.keep.sum())
    account = MimicSummary(
        rows=int(is_known.sum()),
        steps=steps,
        rounds=num_rounds,
        kept=kept,
        kept_share=kept / int(is_known.sum()),
        mean_score=float(means[is_known].mean()),
        accuracies=None if verdict.accuracies is None else verdict.accuracies.tolist(),
    )
    ordered = np.sort(means[is_known])
    ranks = np.searchsorted(ordered, means, side="left") / len(ordered)
    return _Judged(verdict, means, ranks, is_known, account)


def _columns(name: str, found: _Judged, rows: slice) -> dict[str, pa.Array]:
    values: dict[str, Any] = {
        "keep": found.verdict.keep,
        "useful": found.verdict.useful,
        "score": found.scores,
        "rank": found.ranks,
    }
    known = found.is_known[rows]
    return {
        f"{name}.{part}": tables.spread(value[rows][known].astype(np.float32), known) for part, value in values.items()
    }


def _steps_done(log: str) -> int | None:
    """Steps of a run that has ended; None if it has not, and its log is taken as far as it goes."""
    url = storage.join(log, "train", "summary.json")
    return manifest.read(url)["steps"] if storage.exists(url) else None
