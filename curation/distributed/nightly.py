"""A night: curate what is new, say what changed against the promoted night, and promote the result if it did not drift.

A night that changes nothing of the kept set leaves no folder, nor one that comes to what an earlier night came to that
waits to be promoted. A kept set that was rolled back is not promoted again by itself. A night that was killed is done
again under a new name; what it left behind has no night.json and is never pointed at.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation import addresses
from curation.data import drift, manifest, nights, storage, tables
from curation.data.drift import Change
from curation.data.json_columns import as_text
from curation.data.lease import Lease
from curation.data.pieces import Pieces, Record
from curation.distributed.account import Summary
from curation.distributed.column_checks import check_columns
from curation.distributed.embed import STAGE as EMBED_STAGE
from curation.distributed.pipeline import Plan, Watch, curate
from curation.distributed.resources import cluster, cpus_wanted
from curation.distributed.stopping import Stop
from curation.distributed.tasks import in_groups, ordered
from curation.numerics.quantiles import count_bits, quantiles_from_counts
from curation.recipe.nightly import NightlyRecipe

MAX_VALUES = 1000
"""Values of a watched column beyond which it is no column of few values."""


@dataclass(frozen=True)
class Night:
    """The outcome of a night. `name` is None if there is nothing to promote, or if the curation did not end well."""

    summary: Summary
    name: str | None = None
    against: str | None = None
    """The promoted night it was held against."""
    changes: tuple[Change, ...] = ()
    held_back: tuple[Change, ...] = ()
    """The changes for which it was not promoted."""
    rolled_back: str | None = None
    """The night with the same kept set that was taken back: what is current stays."""


def nightly(recipe: NightlyRecipe, *, watch: Watch | None = None, stop: Stop | None = None) -> Night:
    """Do a night. Errors as in `curate`; ValueError too if no shard has a field that is to be watched."""
    watch, stop = watch or Watch(), stop or Stop()
    if not recipe.curate.output:
        raise ValueError("output is empty: name a folder or URL for the nights, as in --output DIR")
    output = storage.absolute(recipe.curate.output)
    run = recipe.curate.model_copy(update={"output": nights.run_url(output)})
    with Lease(output), cluster(num_cpus=cpus_wanted(run.compute)), stop.on_sigterm(interrupts=True):
        heard = _Heard(watch)
        summary = curate(run, watch=heard, stop=stop)
        if summary.failures or summary.stopped:
            return Night(summary)
        watched = {**dict.fromkeys(recipe.scores, "scores"), **dict.fromkeys(recipe.shares, "shares")}
        check_columns(run.output, in_groups(heard.pool), watched)
        before = nights.current(output)
        then = nights.read(output, before) if before else None
        kept = storage.sha256_of(storage.join(run.output, "selection", "selected.parquet"))
        is_unchanged = then is not None and kept == then["kept_sha256"]
        since = then["last_shard"] if then else -1
        if is_unchanged and max(heard.pool, default=-1) <= since:
            return Night(summary, against=before)
        if taken_back := None if is_unchanged else nights.rolled_back(output, kept):
            return Night(summary, against=before, rolled_back=taken_back)
        watch.stage("compare")
        now = _statistics(recipe, run.output, heard.pool, since=since)
        found = drift.changes(then, now) if then else []
        held_back = drift.beyond(found, recipe.drift.model_dump())
        if is_unchanged and not held_back:  # new shards may all be broken: nothing of them is kept, and it is told
            return Night(summary, against=before)
        about = {
            **now,
            "kept_sha256": kept,
            "against": before,
            "changes": [change._asdict() for change in found],
            "held_back": [change._asdict() for change in held_back],
            "summary": dataclasses.asdict(summary),
        }
        name = nights.waiting(output, about)
        if name is None:
            name = nights.new_name(output)
            nights.keep(output, name, about)
        if not held_back:
            nights.promote(output, name)
    return Night(summary, name, before, tuple(found), tuple(held_back))


class _Heard(Watch):
    """Passes on what it hears, and remembers which shards the night's pool has: the run may know others."""

    def __init__(self, watch: Watch):
        self._watch = watch
        self.pool: list[int] = []

    def planned(self, plan: Plan) -> None:
        self.pool = sorted(shard.number for shard in plan.pool)
        self._watch.planned(plan)

    def committed(self, record: Record) -> None:
        self._watch.committed(record)

    def stage(self, name: str) -> None:
        self._watch.stage(name)

    def stalled(self, lines: list[str]) -> None:
        self._watch.stalled(lines)


def _statistics(recipe: NightlyRecipe, run: str, pool: Sequence[int], *, since: int) -> dict[str, Any]:
    """What night.json says of the rows of the shards `pool`. Exact; each quantile is another pass over its column."""
    pieces = manifest.committed(run, EMBED_STAGE)
    there = [number for number in pool if number in pieces]
    numbers = {"pool": there, "new": [number for number in there if number > since]}
    numbers["kept"] = numbers["pool"]
    return {
        "last_shard": max(pieces, default=-1),  # a shard that left the pool and comes back is not new
        "groups": {
            group: {
                **_account(pieces, numbers[group] if group != "kept" else []),
                "rows": sum(ordered(_rows, _inputs(run, numbers[group], group))),
                "quantiles": {column: _quantiles(run, numbers[group], group, column) for column in recipe.scores},
                "shares": {column: _shares(run, numbers[group], group, column) for column in recipe.shares},
            }
            for group in drift.GROUPS
        },
    }


def _account(pieces: Pieces, numbers: Sequence[int]) -> dict[str, Any]:
    dropped: Counter[str] = Counter()
    for number in numbers:
        dropped.update(pieces[number]["dropped"])
    return {
        "read": sum(pieces[number]["read"] for number in numbers),
        "dropped": dict(sorted(dropped.items())),
        "decoded": sum(pieces[number]["decoded"] for number in numbers),
        "actor_seconds": sum(sum(pieces[number]["seconds"].values()) for number in numbers),
    }


def _inputs(run: str, numbers: Sequence[int], group: str, *more: Any) -> list[tuple[Any, ...]]:
    return [(run, shards, group, *more) for shards in in_groups(numbers)]


def _quantiles(run: str, numbers: Sequence[int], group: str, column: str) -> list[float | None]:
    def counts_of(prefix: int | None) -> np.ndarray:
        return sum(ordered(_bits, _inputs(run, numbers, group, column, prefix)), start=count_bits(_NONE, prefix=prefix))

    values = quantiles_from_counts(counts_of, drift.QUANTILES)
    return [None if np.isnan(value) else float(value) for value in values]


def _shares(run: str, numbers: Sequence[int], group: str, column: str) -> dict[str, int]:
    counts = sum(ordered(_values, _inputs(run, numbers, group, column)), start=Counter())
    if len(counts) > MAX_VALUES:
        raise ValueError(f"shares: {column!r} has {len(counts):,} values, more than {MAX_VALUES:,}: too many to watch")
    return dict(sorted(counts.items()))


# What runs in a task.

_NONE = np.zeros(0, np.float32)


def _rows(run: str, numbers: list[int], group: str) -> int:
    return sum(len(_table(run, number, group, [])) for number in numbers)


def _bits(run: str, numbers: list[int], group: str, column: str, prefix: int | None) -> np.ndarray:
    values = [tables.as_numbers(_table(run, number, group, [column])[column], name=column) for number in numbers]
    whole = np.concatenate([_NONE, *values]).astype(np.float32)
    return count_bits(whole[np.isfinite(whole)], prefix=prefix)


def _values(run: str, numbers: list[int], group: str, column: str) -> Counter[str]:
    counts: Counter[str] = Counter()
    for number in numbers:
        texts = as_text(_table(run, number, group, [column])[column]).to_pylist()
        counts.update("(none)" if text is None else text for text in texts)
    return counts


def _table(run: str, number: int, group: str, columns: list[str]) -> pa.Table:
    """The group's rows of a shard; of the kept ones, those that selected.parquet names."""
    table = tables.read(run, number, ["address", "status", *columns])
    rows = table["status"].to_numpy() == "ok"
    if group == "kept":
        first = int(addresses.pack(number, np.zeros(1, np.int64))[0])
        last = int(addresses.pack(number + 1, np.zeros(1, np.int64))[0])
        with storage.open_read(storage.join(run, "selection", "selected.parquet")) as file:
            limits = [("address", ">=", first), ("address", "<", last)]
            kept = pq.read_table(file, columns=["address"], filters=limits)["address"].to_numpy()
        rows &= np.isin(table["address"].to_numpy(), kept)
    return table.filter(pa.array(rows))
