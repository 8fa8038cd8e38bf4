"""One pass over a run's sample tables: what became of each row, and which rows to show, in bounded memory.

Counts (by what became of a row, by group) are exact for any pool. Scores are kept for the rows with the smallest hash
of their address, all of them up to SAMPLE_ROWS and a uniform sample beyond; `Scan.rows` against `Scan.embedded` says
which. Rows to show are the smallest by a key (that hash, or the distance from the cut), so they are the same each time.

n rows of a shard.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from curation.columns import JSON_PREFIX
from curation.data import derived_columns, tables
from curation.recipe import OneOf, Step, Threshold
from curation.report.groups import UNKNOWN, Group, GroupOf, count, groupings
from curation.report.outcomes import Copies, KeptRows, Ranking, last_selector, outcomes_of, ranking
from curation.report.picks import Picks, RowSample, alike, digests_of, hash_of, offer_near_the_cut

MAX_SCORES = 12
"""Scores that are read unasked."""
NO_SCORES = frozenset(
    {"id", "uid", "key", "hash", "seed", "index", "idx", "row", "offset", "size", "timestamp", "width", "height"}
    | {"label", "class", "cluster", "concept"}
)
"""Whole numbers of these names, or with such an ending (`image_id`), say which sample it is, where it lies, how large
it is, or name a group: they rank nothing."""


@dataclass
class Scan:
    """What the tables say."""

    outcomes: Counter[str]
    """Rows by what became of them: "kept", a step's name, DUPLICATE, or a drop reason."""
    picks: Picks
    groups: dict[str, list[Group]]
    """Column -> its groups, largest first."""
    scores: dict[str, np.ndarray]
    """Score -> its values (m,) float32 for the rows of the sample."""
    unread: list[str]
    """Scores that the tables have too, beyond MAX_SCORES."""
    is_kept: np.ndarray
    addresses: np.ndarray
    embedded: int
    """Rows of the pool that were embedded; `addresses` are all of these, or a sample."""
    copies: list[list[int]]
    """Addresses of rows that share a uid."""
    alike: list[list[int]]
    """Addresses of rows of the sample that share the bytes of their image."""
    ranked: Ranking | None
    """How the last selector ranks, if that is by one of the scores."""

    @property
    def shown_score(self) -> str | None:
        """The score that stands under a sample: the one that it was ranked by, or the first."""
        return self.ranked.column if self.ranked is not None else next(iter(self.scores), None)


def scan(
    run: str,
    numbers: Sequence[int],
    *,
    steps: Sequence[Step],
    beside: Mapping[str, Callable[[int], np.ndarray]] | None = None,
    group_by: Sequence[str] = (),
    wanted: Sequence[str] = (),
) -> Scan:
    """Read the tables of the shards `numbers`. `beside`: more scores, name -> (shard number -> its rows' values).

    `group_by`: further columns whose values rows are grouped by. ValueError if a column that is asked for is not there.
    `wanted`: columns of numbers that are read as scores in any case, where the tables have them.
    """
    plan = _plan(run, numbers, steps, group_by, wanted)
    kept, passed = KeptRows(run), RowSample()
    outcomes: Counter[str] = Counter()
    picks, copies = Picks(), Copies(run)
    counts: dict[str, Counter[str]] = {name: Counter() for name in plan.groups}
    kept_counts: dict[str, Counter[str]] = {name: Counter() for name in plan.groups}
    for number in numbers:
        table = _read(run, number, plan.columns)
        addresses = table["address"].to_numpy()
        hashes = hash_of(addresses)
        is_kept = kept.among(addresses)
        what = outcomes_of(table, steps, is_kept=is_kept, is_copy=copies.among(addresses))
        outcomes.update(what.tolist())
        for name in set(what.tolist()):
            here = what == name
            picks.add(name, hashes[here], addresses[here])
        ok = np.asarray(table["status"].to_pylist()) == "ok"
        values = {name: derived_columns.numbers(table, name).astype(np.float32) for name in plan.scores}
        for name, read in (beside or {}).items():
            found = read(number)
            values[name] = found if len(found) == len(addresses) else np.full(len(addresses), np.nan, np.float32)
        if plan.ranked is not None and plan.ranked.has_cut:
            offer_near_the_cut(picks, values[plan.ranked.column], what, addresses, cut_by=last_selector(steps))
        copies.note(table["uid"].to_pylist(), addresses)
        digests = digests_of(table["sha256"])
        passed.add(hashes[ok], addresses[ok], is_kept[ok], digests[ok], {n: v[ok] for n, v in values.items()})
        for name, group_of in plan.groups.items():
            labels = np.asarray(group_of(table), dtype=object)
            count(counts[name], labels[ok])
            count(kept_counts[name], labels[is_kept], known=counts[name])
    groups = {
        name: [Group(value, rows, kept_counts[name][value]) for value, rows in counted.most_common()]
        for name, counted in counts.items()
    }
    addresses, is_kept, digests, scores = passed.all()
    return Scan(
        outcomes=outcomes,
        picks=picks,
        groups={name: rows for name, rows in groups.items() if any(group.value != UNKNOWN for group in rows)},
        scores=scores,
        unread=plan.unread,
        is_kept=is_kept,
        addresses=addresses,
        embedded=passed.seen,
        copies=copies.groups(),
        alike=alike(digests, addresses),
        ranked=plan.ranked if plan.ranked is not None and plan.ranked.column in scores else None,
    )


class _Plan(NamedTuple):
    columns: list[str]
    scores: list[str]
    unread: list[str]
    ranked: Ranking | None
    groups: dict[str, GroupOf]


def _plan(
    run: str, numbers: Sequence[int], steps: Sequence[Step], group_by: Sequence[str], wanted: Sequence[str]
) -> _Plan:
    """Which columns to read, by what the first tables have."""
    types: dict[str, pa.DataType] = {}
    for number in numbers[:: max(1, len(numbers) // 64)]:
        found = _types(run, number)
        types |= {name: dtype for name, dtype in found.items() if name not in types or not pa.types.is_null(dtype)}
    ranked = ranking(steps)
    asked = ["clip_score", *([ranked.column] if ranked else []), *wanted]
    first = [name for name in asked if name in types and _is_number(types[name])]
    others = sorted(name for name, dtype in types.items() if _is_score(name, dtype))
    others.sort(key=lambda name: (name.startswith(JSON_PREFIX), pa.types.is_integer(types[name])))
    all_scores = list(dict.fromkeys([*first, *others]))
    num_read = max(MAX_SCORES, len({*first}))
    scores, unread = all_scores[:num_read], all_scores[num_read:]
    groups = groupings(types, group_by)
    tested = {name for step in steps if isinstance(step, Threshold | OneOf) for name in step.test().needs}
    sources = {source for names, _ in groups.values() for source in names}
    needed = ["address", "uid", "status", "reason", "sha256", *sorted(tested | sources), *scores]
    return _Plan(
        list(dict.fromkeys(needed)),
        scores,
        unread,
        ranked if ranked is not None and ranked.column in scores else None,
        {name: group_of for name, (_, group_of) in groups.items()},
    )


def _is_number(dtype: pa.DataType) -> bool:
    return pa.types.is_floating(dtype) or pa.types.is_integer(dtype)


def _is_score(name: str, dtype: pa.DataType) -> bool:
    """True for the pool's own numbers and those of later columns, but for NO_SCORES."""
    ending = name.rpartition(".")[2].rpartition("_")[2].lower()
    return "." in name and (pa.types.is_floating(dtype) or (pa.types.is_integer(dtype) and ending not in NO_SCORES))


def _types(run: str, number: int) -> dict[str, pa.DataType]:
    found = tables.read(run, number, rows=range(1)).schema
    types = {entry.name: entry.type for entry in found}
    for name in tables.column_names(run, number):
        if name not in types and name != "address":
            types[name] = tables.read(run, number, [name], rows=range(1)).schema.field(name).type
    return types


def _read(run: str, number: int, columns: Sequence[str]) -> pa.Table:
    """The columns of one shard's table; a later column that this shard lacks is null."""
    known = set(tables.column_names(run, number))
    there = [name for name in columns if name in known or name.startswith(JSON_PREFIX)]
    table = tables.read(run, number, there)
    for name in columns:
        if name not in there:
            table = table.append_column(name, pa.nulls(table.num_rows))
    return table
