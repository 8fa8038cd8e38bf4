"""One pass over a run's sample tables: what became of each row, and which rows to show, in bounded memory.

Counts (by what became of a row, by group) are exact for any pool. Scores are kept for the rows with the smallest hash
of their address, all of them up to SAMPLE_ROWS and a uniform sample beyond; `Scan.rows` against `Scan.embedded` says
which. Rows to show are the smallest by a key (that hash, or the distance from the cut), so they are the same each time.

n rows of a shard.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.addresses import row_of, shard_of
from curation.columns import JSON_PREFIX
from curation.data import derived_columns, storage, tables
from curation.data.derived_columns import DERIVED, sources_of
from curation.numerics.sampling import hash_words
from curation.recipe import OneOf, Select, Step, Threshold

SAMPLE_ROWS = 1_000_000
SHOWN = 24
"""Rows that are remembered for each thing to show."""
MAX_GROUPS = 20_000
"""Values of a column that are told apart; what comes later is counted as OTHER."""
MAX_SCORES = 12
NOT_SELECTED = "not selected"
JUST_KEPT, JUST_CUT = "just kept", "just cut"
"""Rows next to the cut of the last selector."""
DUPLICATE = "duplicate_uid"
OTHER = "(all other values)"
UNKNOWN = "(no value)"
MIN_SIDES = (0, 64, 128, 256, 512, 1024, 2048)
LANGUAGES = ("language", "lang", "LANGUAGE")
URLS = ("url", "URL")


class Shown(NamedTuple):
    """A row to show, with the key by which it was chosen."""

    key: float
    address: int


@dataclass
class Picks:
    """For each thing to show, the SHOWN rows with the smallest keys."""

    chosen: dict[Any, list[Shown]] = field(default_factory=lambda: defaultdict(list))

    def add(self, what: Any, keys_n: np.ndarray, addresses_n: np.ndarray) -> None:
        """Offer rows (n,) with their keys; rows whose key is not finite are never shown."""
        finite = np.flatnonzero(np.isfinite(keys_n))
        nearest = finite[np.argsort(keys_n[finite], kind="stable")[:SHOWN]]
        offered = [Shown(float(keys_n[place]), int(addresses_n[place])) for place in nearest]
        self.chosen[what] = sorted([*self.chosen[what], *offered])[:SHOWN]

    def addresses(self, what: Any, count: int = SHOWN) -> list[int]:
        """The addresses of what is shown, nearest first."""
        return [shown.address for shown in self.chosen.get(what, [])[:count]]


class Group(NamedTuple):
    """Embedded rows that share a value of a column, and how many of them were kept."""

    value: str
    rows: int
    kept: int


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
    is_kept: np.ndarray
    addresses: np.ndarray
    embedded: int
    """Rows of the pool that were embedded; `addresses` are all of these, or a sample."""
    copies: list[list[int]]
    """Addresses of rows that share a uid."""
    alike: list[list[int]]
    """Addresses of rows of the sample that share the bytes of their image."""


def scan(
    run: str,
    numbers: Sequence[int],
    *,
    steps: Sequence[Step],
    beside: Mapping[str, Callable[[int], np.ndarray]] | None = None,
    group_by: Sequence[str] = (),
) -> Scan:
    """Read the tables of the shards `numbers`. `beside`: more scores, name -> (shard number -> its rows' values).

    `group_by`: further columns whose values rows are grouped by. ValueError if a column that is asked for is not there.
    """
    plan = _plan(run, numbers, steps, group_by)
    kept, passed = _Kept(run), _Sample()
    outcomes: Counter[str] = Counter()
    picks, copies = Picks(), _Copies(run)
    counts: dict[str, Counter[str]] = {name: Counter() for name in plan.groups}
    kept_counts: dict[str, Counter[str]] = {name: Counter() for name in plan.groups}
    for number in numbers:
        table = _read(run, number, plan.columns)
        addresses = table["address"].to_numpy()
        hashes = _hash(addresses)
        is_kept = kept.among(addresses)
        what = _outcome(table, steps, is_kept=is_kept, is_copy=copies.among(addresses))
        outcomes.update(what.tolist())
        for name in set(what.tolist()):
            here = what == name
            picks.add(name, hashes[here], addresses[here])
        ok = np.asarray(table["status"].to_pylist()) == "ok"
        values = {name: derived_columns.numbers(table, name).astype(np.float32) for name in plan.scores}
        for name, read in (beside or {}).items():
            found = read(number)
            values[name] = found if len(found) == len(addresses) else np.full(len(addresses), np.nan, np.float32)
        _near_the_cut(picks, plan.ranked_by, values, what, addresses, cut_by=last_selector(steps))
        copies.note(table["uid"].to_pylist(), addresses)
        digests = _digests(table["sha256"])
        passed.add(hashes[ok], addresses[ok], is_kept[ok], digests[ok], {n: v[ok] for n, v in values.items()})
        for name, group_of in plan.groups.items():
            labels = np.asarray(group_of(table), dtype=object)
            _count(counts[name], labels[ok])
            _count(kept_counts[name], labels[is_kept], known=counts[name])
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
        is_kept=is_kept,
        addresses=addresses,
        embedded=passed.seen,
        copies=copies.groups(),
        alike=_alike(digests, addresses),
    )


GroupOf = Callable[[pa.Table], list[str]]


class _Plan(NamedTuple):
    columns: list[str]
    scores: list[str]
    ranked_by: str | None
    groups: dict[str, GroupOf]


def score_column(steps: Sequence[Step]) -> str | None:
    """The column by which the last selector ranks, if it is one; None if there is no such selector."""
    for step in reversed(steps):
        if isinstance(step, Select):
            name = getattr(step.selector(), "column", "clip_score" if step.name == "clip_score" else None)
            return name if isinstance(name, str) else None
    return None


def _plan(run: str, numbers: Sequence[int], steps: Sequence[Step], group_by: Sequence[str]) -> _Plan:
    """Which columns to read, by what the first tables have."""
    types: dict[str, pa.DataType] = {}
    for number in numbers[:: max(1, len(numbers) // 64)]:
        types |= _types(run, number)
    floats = [name for name, dtype in types.items() if pa.types.is_floating(dtype) and "." in name]
    ranked_by = score_column(steps)
    wanted = ["clip_score"] if "clip_score" in types else []
    wanted += [ranked_by] if ranked_by in types else []
    scores = list(dict.fromkeys([*wanted, *sorted(floats, key=lambda name: (name.startswith(JSON_PREFIX), name))]))
    groups = _groups(types, group_by)
    tested = {name for step in steps if isinstance(step, Threshold | OneOf) for name in step.test().needs}
    sources = {source for names, _ in groups.values() for source in names}
    needed = ["address", "uid", "status", "reason", "sha256", *sorted(tested | sources), *scores[:MAX_SCORES]]
    return _Plan(
        list(dict.fromkeys(needed)),
        scores[:MAX_SCORES],
        ranked_by if ranked_by in scores else None,
        {name: group_of for name, (_, group_of) in groups.items()},
    )


def _types(run: str, number: int) -> dict[str, pa.DataType]:
    found = tables.read(run, number, rows=range(1)).schema
    types = {entry.name: entry.type for entry in found}
    for name in tables.column_names(run, number):
        if name not in types and name != "address":
            types[name] = tables.read(run, number, [name], rows=range(1)).schema.field(name).type
    return types


def _groups(types: Mapping[str, pa.DataType], group_by: Sequence[str]) -> dict[str, tuple[tuple[str, ...], GroupOf]]:
    """Group -> the columns that it is made of, and a row's value."""
    found: dict[str, tuple[tuple[str, ...], GroupOf]] = {}
    for title, names in (("language", LANGUAGES), ("domain", ("domain",))):
        if column := next((name for name in map(JSON_PREFIX.__add__, names) if name in types), None):
            found[title] = ((column,), lambda table, column=column: _texts(table, column))
    if column := next((name for name in map(JSON_PREFIX.__add__, URLS) if name in types), None):
        found.setdefault(
            "domain", ((column,), lambda table, column=column: [_host(url) for url in _texts(table, column)])
        )
    for column in sorted(types):
        if column.rpartition(".")[2] in ("cluster", "concept"):
            found[column] = ((column,), lambda table, column=column: _texts(table, column))
    found["shorter side"] = (sources_of("min_side"), _sides)
    for column in group_by:
        if column not in types and column not in DERIVED:
            raise ValueError(f"--by {column!r}: no table has such a column, they have {sorted(types)}")
        found[column] = (sources_of(column), lambda table, column=column: _texts(table, column))
    return found


def _texts(table: pa.Table, column: str) -> list[str]:
    if column in DERIVED:
        return [UNKNOWN if np.isnan(value) else f"{value:g}" for value in derived_columns.numbers(table, column)]
    return [UNKNOWN if value is None or value == "" else str(value) for value in table[column].to_pylist()]


def _host(url: str) -> str:
    """The host of a URL, without the `www.` in front of it."""
    if url == UNKNOWN:
        return url
    try:
        host = urlsplit(url).hostname
    except ValueError:  # brackets that are no IPv6 address
        return UNKNOWN
    return host.removeprefix("www.") if host else UNKNOWN


def _sides(table: pa.Table) -> list[str]:
    """The power-of-two range that the shorter side lies in."""
    sides = derived_columns.numbers(table, "min_side")
    names = [f"{low}–{high - 1} px" for low, high in pairwise(MIN_SIDES)]
    names.append(f"{MIN_SIDES[-1]} px and more")
    places = np.searchsorted(MIN_SIDES, np.nan_to_num(sides), side="right") - 1
    return [UNKNOWN if np.isnan(side) else names[place] for side, place in zip(sides, places, strict=True)]


def _read(run: str, number: int, columns: Sequence[str]) -> pa.Table:
    """The columns of one shard's table; a later column that this shard lacks is null."""
    known = set(tables.column_names(run, number))
    there = [name for name in columns if name in known or name.startswith(JSON_PREFIX)]
    table = tables.read(run, number, there)
    for name in columns:
        if name not in there:
            table = table.append_column(name, pa.nulls(table.num_rows))
    return table


def _outcome(table: pa.Table, steps: Sequence[Step], *, is_kept: np.ndarray, is_copy: np.ndarray) -> np.ndarray:
    """What became of each row, (n,) objects: its drop reason, DUPLICATE, the step that cut it, or "kept".

    A row is charged to the first filter that it does not pass, and otherwise to the last selector.
    """
    what = np.full(table.num_rows, last_selector(steps), dtype=object)
    for step in reversed([step for step in steps if isinstance(step, Threshold | OneOf)]):
        what[~step.test().passes(table)] = step.name
    what[is_copy] = DUPLICATE
    what[is_kept] = "kept"
    reasons = np.asarray(table["reason"].to_pylist(), dtype=object)
    dropped = np.asarray(table["status"].to_pylist()) != "ok"
    what[dropped] = reasons[dropped]
    return what


def last_selector(steps: Sequence[Step]) -> str:
    """What a row is charged to that passes all filters and was not kept."""
    return next((step.name for step in reversed(steps) if isinstance(step, Select)), NOT_SELECTED)


def _near_the_cut(
    picks: Picks,
    ranked_by: str | None,
    values: Mapping[str, np.ndarray],
    what: np.ndarray,
    addresses: np.ndarray,
    *,
    cut_by: str,
) -> None:
    """Offer the lowest of what was kept, and the highest of what the selector cut."""
    if ranked_by is None:
        return
    score = values[ranked_by].astype(np.float64)
    picks.add(JUST_KEPT, np.where(what == "kept", score, np.nan), addresses)
    picks.add(JUST_CUT, np.where(what == cut_by, -score, np.nan), addresses)


class _Kept:
    """The addresses of the kept rows, read along with the shards; both go up."""

    def __init__(self, run: str):
        self._batches = self._read(storage.join(run, "selection", "selected.parquet"))
        self._waiting = np.zeros(0, np.int64)

    def among(self, addresses_n: np.ndarray) -> np.ndarray:
        """Which of a shard's rows were kept, (n,) bool. Shards must come in order of their numbers."""
        last = addresses_n[-1] if len(addresses_n) else -1
        while not len(self._waiting) or self._waiting[-1] <= last:
            more = next(self._batches, None)
            if more is None:
                break
            self._waiting = np.concatenate([self._waiting, more])
        is_kept = np.isin(addresses_n, self._waiting)
        self._waiting = self._waiting[np.searchsorted(self._waiting, last, side="right") :]
        return is_kept

    @staticmethod
    def _read(url: str) -> Iterator[np.ndarray]:
        if not storage.exists(url):
            return
        with storage.open_read(url) as file:
            for batch in pq.ParquetFile(file).iter_batches(columns=["address"]):
                yield batch.column(0).to_numpy()


class _Copies:
    """Later copies of a uid, and the groups of the first few."""

    def __init__(self, run: str):
        url = storage.join(run, "selection", "duplicates.npy")
        self._addresses = np.zeros(0, np.int64)
        if storage.exists(url):
            with storage.open_read(url) as file:
                self._addresses = np.load(file, allow_pickle=False)
        self._wanted: set[str] = set()
        for address in self._addresses[:SHOWN].tolist():
            row = row_of(np.array([address]))[0]
            here = tables.read(run, int(shard_of(np.array([address]))[0]), ["uid"], rows=range(row, row + 1))
            self._wanted.update(here["uid"].to_pylist())
        self._found: dict[str, list[int]] = defaultdict(list)

    def among(self, addresses_n: np.ndarray) -> np.ndarray:
        return np.isin(addresses_n, self._addresses)

    def note(self, uids: list[str], addresses_n: np.ndarray) -> None:
        if self._wanted:
            for uid, address in zip(uids, addresses_n.tolist(), strict=True):
                if uid in self._wanted:
                    self._found[uid].append(address)

    def groups(self) -> list[list[int]]:
        return [found for found in self._found.values() if len(found) > 1]


class _Sample:
    """Rows with the smallest hashes: all of them, or a uniform sample of at least half SAMPLE_ROWS."""

    def __init__(self) -> None:
        self.seen = 0
        self._parts: list[dict[str, np.ndarray]] = []
        self._size = 0
        self._below = np.inf

    def add(
        self,
        hashes: np.ndarray,
        addresses: np.ndarray,
        is_kept: np.ndarray,
        digests: np.ndarray,
        scores: Mapping[str, np.ndarray],
    ) -> None:
        self.seen += len(hashes)
        part = {"hash": hashes, "address": addresses, "kept": is_kept, "digest": digests}
        part |= {f"score:{name}": values for name, values in scores.items()}
        self._take({name: column[hashes < self._below] for name, column in part.items()})
        if self._size > SAMPLE_ROWS:
            whole = self._joined()
            self._below = float(np.median(whole["hash"]))
            self._parts, self._size = [], 0
            self._take({name: column[whole["hash"] < self._below] for name, column in whole.items()})

    def _take(self, part: dict[str, np.ndarray]) -> None:
        self._parts.append(part)
        self._size += len(part["hash"])

    def _joined(self) -> dict[str, np.ndarray]:
        if not self._parts:
            return {
                "hash": np.zeros(0),
                "address": np.zeros(0, np.int64),
                "kept": np.zeros(0, bool),
                "digest": np.zeros(0, np.uint64),
            }
        return {name: np.concatenate([part[name] for part in self._parts]) for name in self._parts[0]}

    def all(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        whole = self._joined()
        scores = {name.removeprefix("score:"): values for name, values in whole.items() if name.startswith("score:")}
        known = {name: values for name, values in scores.items() if np.isfinite(values).any()}
        return whole["address"], whole["kept"], whole["digest"], known


def _hash(addresses_n: np.ndarray) -> np.ndarray:
    """A number in [0, 1) for each address, the same for ever."""
    words = np.stack([np.zeros(len(addresses_n), np.uint64), addresses_n.astype(np.uint64)], axis=1)
    return hash_words(words, seed=0).astype(np.float64) / 2**64


def _digests(column: pa.ChunkedArray) -> np.ndarray:
    """64 bits of each sha256 (n,) uint64; 0 where there is none."""
    return np.array([int(value[:16], 16) if value else 0 for value in column.to_pylist()], np.uint64)


def _alike(digests: np.ndarray, addresses: np.ndarray) -> list[list[int]]:
    """Groups of rows with the same image bytes, the largest first."""
    values, counts = np.unique(digests[digests != 0], return_counts=True)
    repeated = sorted(zip(counts.tolist(), values.tolist(), strict=True), reverse=True)
    return [addresses[digests == np.uint64(value)].tolist() for count, value in repeated[:SHOWN] if count > 1]


def _count(counter: Counter[str], labels: np.ndarray, known: Counter[str] | None = None) -> None:
    """Count values; once there are MAX_GROUPS of them, a new one counts as OTHER. `known`: the values told apart."""
    known = counter if known is None else known
    for label, count in Counter(labels.tolist()).items():
        counter[label if label in known or len(known) < MAX_GROUPS else OTHER] += count
