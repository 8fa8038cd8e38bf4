"""A run's folder, read back: what `jobs.curate` and `jobs.train` left, as the report needs it.

Nothing here computes: accounts are those that the run wrote, tables are read where they are wanted. What a folder does
not hold is None or empty, never an error, so that a run which was stopped half way has a report too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.addresses import pack, row_of, shard_of
from curation.data import manifest, offered, score_log, shard_list, step_log, storage
from curation.data.pieces import Pieces
from curation.data.shard_list import Shard
from curation.ledger import Ledger, LedgerSpec
from curation.methods import load_selector

EMBED_STAGE = "embed"
WHOLE_SELECTION = -1
"""The step of audit.parquet that stands for all of them."""
DIVIDING_FIELDS = ("seed", "name", "output")
"""Fields of a training recipe in which the seeds of one arm may differ, and the learner's seed."""


@dataclass(frozen=True)
class CurationRun:
    """A run of `jobs.curate`: its account, its recipe, and the shards whose tables are there."""

    url: str
    label: str
    summary: Mapping[str, Any]
    """Empty if the run did not come to its account."""
    whole_recipe: Mapping[str, Any]
    shards: list[Shard]
    records: Pieces

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The recipe's fields, without versions and digests."""
        return self.whole_recipe.get("recipe", {})

    @cached_property
    def numbers(self) -> list[int]:
        """Shards of the pool, in order of their numbers, that are committed and not retired."""
        return [shard.number for shard in self.shards if not shard.retired and shard.number in self.records]


@dataclass(frozen=True)
class TrainingRun:
    """A run of `jobs.train`: its account, its recipe, and what it noted."""

    url: str
    label: str
    summary: Mapping[str, Any]
    """Empty if the run did not come to its account."""
    whole_recipe: Mapping[str, Any]
    steps: pa.Table
    evaluations: pa.Table
    """Both as far as the run noted them; without rows if it noted none."""

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The recipe's fields, without versions and digests."""
        return self.whole_recipe.get("recipe", {})

    @cached_property
    def arm(self) -> str:
        """A digest of all that the seeds of one arm have in common."""
        shared = {name: value for name, value in self.recipe.items() if name not in DIVIDING_FIELDS}
        learner = {name: value for name, value in shared.get("learner", {}).items() if name != "seed"}
        return manifest.digest({**shared, "learner": learner})


Run = CurationRun | TrainingRun


def load(url: str) -> list[Run]:
    """The runs in a folder: one, or two if it was curated and trained in. ValueError if it holds none."""
    url = storage.absolute(url)
    found: list[Run] = []
    if storage.exists(storage.join(url, "shards.parquet")):
        found.append(_curation(url))
    if storage.exists(storage.join(url, "train", "pool.parquet")) or storage.names_in(storage.join(url, "train")):
        found.append(_training(url))
    if not found:
        raise ValueError(
            f"{url} is no run's folder: it has neither shards.parquet (jobs.curate) nor train/ (jobs.train)"
        )
    return found


def _curation(url: str) -> CurationRun:
    shards = shard_list.load(url)
    records = manifest.committed(url, EMBED_STAGE)
    return CurationRun(url, _label(url), _json(url, "summary.json"), _json(url, "recipe.json"), shards, records)


def _training(url: str) -> TrainingRun:
    tables = [_log(url, name) for name in ("steps", "evaluations")]
    return TrainingRun(url, _label(url), _json(url, "train", "summary.json"), _json(url, "recipe.json"), *tables)


def _label(url: str) -> str:
    """The last two parts of a path: enough to tell the runs of one report apart."""
    return "/".join(PurePosixPath(url).parts[-2:]).lstrip("/")


def _json(*parts: str) -> Mapping[str, Any]:
    url = storage.join(*parts)
    return manifest.read(url) if storage.exists(url) else {}


def _log(url: str, name: str) -> pa.Table:
    """A training log as far as it is written; without rows if nothing is.

    A run merges its parts when it ends. One that was killed before has parts alone, or parts that begin after what an
    earlier end had merged.
    """
    whole = storage.join(url, "train", f"{name}.parquet")
    if not storage.exists(whole):
        return step_log.read_parts(url, name)
    merged = _table(whole)
    parts = [part for part in storage.names_in(storage.join(url, "train", name)) if part.endswith(".parquet")]
    newest = max((int(part.removesuffix(".parquet")) for part in parts), default=0)
    last = merged["step"][-1].as_py() if len(merged) else 0
    return step_log.read_parts(url, name) if newest > last else merged


def _table(url: str) -> pa.Table:
    with storage.open_read(url) as file:
        return pq.read_table(file)


class StepCount(NamedTuple):
    """What a step of the selection did, and some of the rows that it removed."""

    name: str
    rows_in: int
    rows_out: int
    examples: Sequence[int] | None
    """Addresses; None if the run did not note them."""


def waterfall(run: CurationRun) -> list[StepCount]:
    """The steps of a run's selection, from selection/waterfall.parquet, or else from its account."""
    url = storage.join(run.url, "selection", "waterfall.parquet")
    if storage.exists(url):
        rows = _table(url).to_pylist()
        return [StepCount(row["name"], row["rows_in"], row["rows_out"], row["examples"]) for row in rows]
    return [StepCount(name, before, after, None) for name, before, after in run.summary.get("waterfall", [])]


class AuditedGroup(NamedTuple):
    """Rows that share a value of a column, over the whole selection, as the run's own audit has them."""

    column: str
    value: str | None
    rows: int
    kept: int


def audited(run: CurationRun) -> list[AuditedGroup]:
    """The groups of selection/audit.parquet over all steps; empty if there is none."""
    url = storage.join(run.url, "selection", "audit.parquet")
    rows = _table(url).to_pylist() if storage.exists(url) else []
    return [
        AuditedGroup(row["column"], row["group"], row["rows_in"], row["rows_out"])
        for row in rows
        if row["step"] == WHOLE_SELECTION
    ]


@dataclass(frozen=True)
class Remembered:
    """What a training run's ledger knew at its newest snapshot."""

    usage: np.ndarray
    """usage[u]: how many of the offered samples were trained on u times, int64."""
    sizes: np.ndarray
    owners: np.ndarray
    ledgers: list[Ledger]

    def scores_of(self, number: int) -> np.ndarray:
        """The scores of a shard's rows (n,) float32, NaN where there is none; empty for a shard that it never knew."""
        size = int(self.sizes[number]) if number < len(self.sizes) else 0
        if not size:
            return np.zeros(0, np.float32)
        ledger = self.ledgers[self.owners[number]]
        return ledger.read(ledger.names[0], pack(number, np.arange(size)))["ledger_value"]


def scored_by(run: TrainingRun, memory: Remembered) -> tuple[str, Callable[[int], np.ndarray]]:
    """What a run's method scored each row last: its name, and shard number -> its rows' values (n,), NaN where none.

    The ledger of a method that compares losses keeps those. Then the scores are the score log's, if the run kept one;
    else the name says that they are losses.
    """
    method = run.recipe.get("method", {})
    name = str(method.get("name"))
    if not method or getattr(load_selector(**method), "records", "score") == "score":
        return name, memory.scores_of
    if not storage.names_in(score_log.folder_of(run.url)):
        return f"{name}'s loss", memory.scores_of
    last = {number: np.full(size, np.nan, np.float32) for number, size in enumerate(memory.sizes.tolist()) if size}
    for step in score_log.read_steps(run.url):
        numbers, rows = shard_of(step.addresses), row_of(step.addresses)
        for number in np.unique(numbers).tolist():
            last[number][rows[numbers == number]] = step.scores[numbers == number]
    return name, lambda number: last.get(number, np.zeros(0, np.float32))


def remembered(run: TrainingRun) -> Remembered | None:
    """The ledger of a run, from its files; None if there is no whole snapshot of it."""
    folder = storage.join(run.url, "ledger")
    pool = storage.join(run.url, "train", "pool.parquet")
    if not storage.exists(storage.join(folder, "shards.npy")) or not storage.exists(pool):
        return None
    with storage.open_read(storage.join(folder, "shards.npy")) as file:
        sizes, owners = np.load(file, allow_pickle=False)
    ledgers: list[Ledger] = []
    for actor in range(int(owners.max(initial=-1)) + 1):
        ledger = _newest(storage.join(folder, f"actor-{actor:05d}"), np.where(owners == actor, sizes, 0))
        if ledger is None:
            return None
        ledgers.append(ledger)
    usage = np.stack([ledger.usage_histogram() for ledger in ledgers]).sum(axis=0, dtype=np.int64)
    usage = usage[: np.flatnonzero(usage).max(initial=0) + 1]
    usage[0] = sum(shard.offered for shard in offered.load(pool)) - usage[1:].sum()
    return Remembered(usage, sizes, owners, ledgers)


def _newest(folder: str, sizes: np.ndarray) -> Ledger | None:
    """The ledger of one actor as its newest named snapshot has it."""
    head = _json(folder, "HEAD.json")
    if not head.get("snapshots"):
        return None
    newest = max(snapshot["generation"] for snapshot in head["snapshots"].values())
    specs = {name: LedgerSpec(**fields) for name, fields in head["specs"].items()}
    snapshot = storage.join(folder, "snapshots", f"{newest:08d}")
    return Ledger.load(lambda name: storage.open_read(storage.join(snapshot, name)), sizes, specs)
