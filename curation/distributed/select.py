"""Selection over committed tables: exact, resumable by redoing, in memory that does not grow with the pool.

A selection is a list of steps, each applied to what the one before it left. Every step boils down to a test of a row by
itself: a threshold on a column, or a selector's key against a cut that keeps exactly the top k. So what a task must
know of all earlier steps is a few numbers, and no mask of the pool is stored. Cuts come from `numerics.sampling`: two
passes over the key column in the usual case. Only a step that compares rows with one another (`bucket_select`) leaves
the addresses that it kept in a file, of which a task reads its shard's part. Repeats of a uid are folded first, by a
sort on disk: the lowest address stays.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from curation import addresses
from curation.columns import JSON_PREFIX
from curation.data import manifest, storage, tables, verdicts
from curation.data.json_columns import as_text
from curation.data.labels import URL_COLUMNS
from curation.data.row_tests import NotCopied, NotListed, RowTest
from curation.data.tallies import EXAMPLES, HaveOne, RemovedRows, Tally
from curation.data.uid_sort import UidSort, later_copies, splitters
from curation.data.verdicts import Verdict, stored_part
from curation.distributed import bucket_select
from curation.distributed.balance import within_quotas
from curation.distributed.column_checks import check_columns, check_numbers, columns_of, numbers_of
from curation.distributed.tasks import in_groups, ordered
from curation.numerics import sampling
from curation.numerics.sampling import Cut, CutSearch, Pass, PassCount
from curation.recipe import Balance, OneOf, Select, Step, Threshold
from curation.selector import BucketSelector, Rows

T = TypeVar("T")
LOWEST_SCORE = Cut(key_bits=1, tie=0)
"""Keeps every row that has a score: only NaN lies below it."""

DUPLICATES, DUPLICATES_FROM = "duplicates.npy", "duplicates_from.npy"
"""In selection/: addresses of all later copies, ascending, and where in that list each shard's begin (S + 1)."""
STEPS = "steps"
"""In selection/: a folder for each step that compares rows, called by the digest of all that can change its outcome."""
SAMPLED_SHARDS, SAMPLED_ROWS = 64, 1024
OFFLINE_PROGRESS = 0.0
KEPT_COLUMNS = ("address", "uid", "key", "shard", "offset", "sha256", "caption", "width", "height")
LICENSE_COLUMNS = tuple(JSON_PREFIX + name for name in ("license", "licence", "LICENSE"))


class Decided(NamedTuple):
    """A step whose outcome for any row is known: a test of the row, or a selector with the cut of its key."""

    step: RowTest | Select
    seed: int
    cut: Cut

    @property
    def needs(self) -> frozenset[str]:
        """Columns of the sample table that the test reads."""
        return self.step.selector().needs if isinstance(self.step, Select) else self.step.needs


class StepCount(NamedTuple):
    """What one step of the selection did; `examples` are addresses of rows that it removed, a sample of at most 8."""

    name: str
    rows_in: int
    rows_out: int
    examples: tuple[int, ...] = ()


class Selected(NamedTuple):
    """The outcome over a pool: `decided` tests a row, `counts` is the waterfall, `uid_bounds` part the uids evenly,
    `warnings` count the rows without what a step goes by."""

    decided: list[Decided]
    counts: list[StepCount]
    uid_bounds: np.ndarray
    warnings: dict[str, int]

    @property
    def rows(self) -> int:
        """How many rows are kept."""
        return self.counts[-1].rows_out


def select(
    output: str,
    numbers: Sequence[int],
    *,
    embedded: int,
    steps: Sequence[Step],
    seed: int,
    guards: Sequence[RowTest] = (),
    audited: Sequence[str] = (),
) -> Selected:
    """Decide all steps over the shards `numbers`, which hold `embedded` rows that were not dropped.

    `guards` come first; they do not move the steps' seeds. ValueError if no shard has a field that a step, or the
    audit by the columns `audited`, needs, or a field has no number where one is asked for, or no row has what a list or
    an evaluation set finds samples by.
    """
    groups = in_groups(numbers)
    check_columns(output, groups, {**dict.fromkeys(audited, "audit.groups"), **columns_of(steps)})
    check_numbers(output, groups, numbers_of(steps))
    bounds = _uid_bounds(output, numbers, embedded=embedded)
    later = _fold_duplicates(output, groups, bounds)
    rows = embedded - len(later)
    counts = [StepCount("duplicate_uid", embedded, rows, tuple(later[:EXAMPLES].tolist()))]
    decided: list[Decided] = []
    warnings: Counter[str] = Counter()
    for place, step in enumerate([*guards, *steps], start=-len(guards)):
        of_step = _seed_of_step(seed, place)
        if isinstance(step, NotListed | NotCopied):
            warnings["guards:no_value"] += _unfound(step, output, groups, decided)
        if isinstance(step, Balance):
            test = within_quotas(step, of_step, partial(tally, output, groups, decided))
        elif isinstance(step, Select) and isinstance(step.selector(), BucketSelector):
            test = _compared(step, output, groups, decided, rows=rows, seed=of_step, place=place)
            warnings["selection:no_vector"] += bucket_select.without_vector(test.folder)
        else:
            test = _test_of(step)
        now = Decided(test, of_step, sampling.KEEP_ALL)
        if isinstance(test, Select):
            now = now._replace(cut=_find_cut(test, output, groups, [*decided, now], rows))
        decided = [*decided, now]
        removed = tally(output, groups, decided, RemovedRows())
        rows_in, rows = rows, removed.rows if removed else 0
        counts.append(StepCount(step.name, rows_in, rows, tuple(removed.addresses.tolist()) if removed else ()))
    return Selected(decided, counts, bounds, dict(sorted((+warnings).items())))


def tally(output: str, groups: Sequence[list[int]], decided: Sequence[Decided], count: Tally[T]) -> T | None:
    """One pass over the candidates; None if there is no shard."""
    told = ordered(_tally, ((output, group, list(decided), count) for group in groups))
    return reduce(count.add, told) if groups else None


def kept_rows(output: str, numbers: Sequence[int], decided: Sequence[Decided]) -> Iterator[pa.Table]:
    """The kept rows in order of address, a group of shards at a time: KEPT_COLUMNS, score, license, url."""
    return ordered(_kept, ((output, group, list(decided)) for group in in_groups(numbers)))


def _unfound(test: NotListed | NotCopied, output: str, groups: list[list[int]], decided: list[Decided]) -> int:
    """How many of the rows that reach a test lack what it finds them by. ValueError if all do: it would do nothing."""
    if test.found_by == {"uid"}:
        return 0
    told = tally(output, groups, decided, HaveOne(test.found_by))
    found, unfound = (0, 0) if told is None else told.tolist()
    if unfound and not found:
        raise ValueError(test.blind(unfound))
    return unfound


def _test_of(step: Threshold | OneOf | Select | RowTest) -> RowTest | Select:
    """A filter of the recipe as the test that it is."""
    return step.test() if isinstance(step, Threshold | OneOf) else step


def _seed_of_step(seed: int, place: int) -> int:
    """A seed of its own for each step of the selection, from the run's."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{place}".encode()).digest()[:8], "little") >> 1


def _uid_bounds(output: str, numbers: Sequence[int], *, embedded: int) -> np.ndarray:
    spread = numbers[:: max(1, len(numbers) // SAMPLED_SHARDS)]
    sample = [words[:SAMPLED_ROWS] for _, words in ordered(_uids, ((output, [number]) for number in spread))]
    return splitters(np.concatenate([np.zeros((0, 2), np.uint64), *sample]), num_rows=embedded)


def _fold_duplicates(output: str, groups: list[list[int]], bounds: np.ndarray) -> np.ndarray:
    """Save the addresses of all rows whose uid has a lower address; returns them, sorted."""
    with tempfile.TemporaryDirectory(prefix="curation-uids-") as folder:
        by_uid = UidSort(Path(folder), splitters_P2=bounds)
        for where, words in ordered(_uids, ((output, group) for group in groups)):
            by_uid.add(words, where)
        duplicates = [np.zeros(0, np.int64), *(later_copies(block) for block in by_uid.sorted_blocks())]
    later = np.sort(np.concatenate(duplicates))
    num_shards = 1 + max((group[-1] for group in groups), default=-1)
    _save(output, DUPLICATES, later)
    _save(output, DUPLICATES_FROM, np.searchsorted(addresses.shard_of(later), np.arange(num_shards + 1)))
    return later


def _save(output: str, name: str, values_N: np.ndarray) -> None:
    with storage.write_atomic(storage.join(output, "selection", name)) as file:
        np.save(file, values_N.astype("<i8"))
        assert file.tell() == verdicts.HEADER_BYTES + values_N.size * 8


def _saved(output: str, name: str, start: int, stop: int) -> np.ndarray:
    """Entries [start, stop) of what `_save` wrote: of the file only the bytes that hold them are read."""
    return stored_part(storage.join(output, "selection", name), "<i8", start, stop)


def _find_cut(step: Select, output: str, groups: list[list[int]], decided: list[Decided], rows: int) -> Cut:
    """The cut of `step`, the last of `decided`, over the `rows` rows that reach it."""
    if step.min_score is not None:
        bits = int(sampling.order_bits(np.asarray([step.min_score], np.float32))[0])
        return Cut(key_bits=max(bits, LOWEST_SCORE.key_bits), tie=0)
    if step.keep_fraction is not None and step.ties == "datacomp":
        rank = int(rows * step.keep_fraction)
        if rank >= rows:
            return LOWEST_SCORE
        lowest = _search(output, groups, decided, keep=rank + 1)
        return Cut(key_bits=max(lowest.key_bits, LOWEST_SCORE.key_bits), tie=0)
    keep = _num_kept(step, rows)
    assert keep is not None
    return _search(output, groups, decided, keep=keep)


def _compared(
    step: Select, output: str, groups: list[list[int]], decided: list[Decided], *, rows: int, seed: int, place: int
) -> Verdict:
    """The verdict of a step that compares the `rows` rows which reach it, made unless it is there."""
    made_by = [groups, rows, repr(decided), step.model_dump(mode="json"), seed]
    folder = storage.join(output, "selection", STEPS, manifest.digest(made_by)[:32])
    bucket_select.decide(
        step.selector(),
        folder=folder,
        groups=groups,
        candidates=partial(_reaching, output, tuple(decided)),
        rows=rows,
        keep=_num_kept(step, rows),
        seed=seed,
    )
    sweep = storage.join(folder, "sweep.csv")
    if storage.exists(sweep):
        storage.copy(sweep, storage.join(output, "selection", f"sweep-{place}-{step.name}.csv"))
    return Verdict(step.name, folder)


def _num_kept(step: Select, rows: int) -> int | None:
    """How many of the rows that reach a step are to stay; None where its outcome says."""
    if step.keep_fraction is not None:
        return round(rows * step.keep_fraction)
    return None if step.keep is None else min(step.keep, rows)


def _search(output: str, groups: list[list[int]], decided: list[Decided], *, keep: int) -> Cut:
    search = CutSearch(keep)
    while not search.done:
        for count in ordered(_count_pass, ((output, group, decided, search.current_pass) for group in groups)):
            search.merge(count)
        search.end_pass()
    assert not search.surplus, f"{search.surplus} rows at the cut share key and uid hash"
    return search.cut


# What runs in a task: plain functions of one group of shards.


def _uids(output: str, numbers: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Addresses (n,) and uids (n, 2) of the rows that were embedded."""
    table = pa.concat_tables(tables.read(output, number, ["address", "uid", "status"]) for number in numbers)
    table = table.filter(pc.field("status") == "ok")
    return table["address"].to_numpy(), sampling.uid_words(table["uid"].to_pylist())


def _tally(output: str, numbers: list[int], decided: list[Decided], count: Tally[T]) -> T:
    tables_ = (_candidates(output, number, _needs(decided) | count.needs) for number in numbers)
    return reduce(count.add, (count(table, _stages(table, decided)) for table in tables_))


def _count_pass(output: str, numbers: list[int], decided: list[Decided], this_pass: Pass) -> PassCount:
    *before, now = decided

    def count(number: int) -> PassCount:
        table = _candidates(output, number, _needs(decided))
        bits, ties = _bits_and_ties(table, now)
        reached = _surviving(table, before)
        return sampling.count_pass(this_pass, bits[reached], ties[reached])

    return reduce(add, map(count, numbers))


def _reaching(output: str, decided: tuple[Decided, ...], number: int, columns: frozenset[str]) -> pa.Table:
    """Columns of the rows of one shard that pass all the steps, in order of address."""
    table = _candidates(output, number, _needs(decided) | columns)
    return table.filter(pa.array(_surviving(table, decided))).select(sorted(columns))


def _kept(output: str, numbers: list[int], decided: list[Decided]) -> pa.Table:
    return pa.concat_tables(_kept_of_shard(output, number, decided) for number in numbers)


def _kept_of_shard(output: str, number: int, decided: list[Decided]) -> pa.Table:
    table = _candidates(output, number, _needs(decided) | {*KEPT_COLUMNS, *LICENSE_COLUMNS, *URL_COLUMNS})
    last = next((now.step for now in reversed(decided) if isinstance(now.step, Select | Verdict)), None)
    if last is None:
        score = np.full(table.num_rows, np.nan, np.float32)
    elif isinstance(last, Verdict):
        score = last.scores(table)
    else:
        score = last.selector().score(_rows(table, last.selector().needs), OFFLINE_PROGRESS).numpy()
    kept = table.select(KEPT_COLUMNS).append_column("score", pa.array(score, pa.float32()))
    for name, columns in (("license", LICENSE_COLUMNS), ("url", URL_COLUMNS)):
        first = pc.call_function("coalesce", [as_text(table[column]) for column in columns])
        kept = kept.append_column(name, first)
    return kept.filter(pa.array(_surviving(table, decided)))


def _needs(decided: Sequence[Decided]) -> frozenset[str]:
    return frozenset({"uid"}).union(*(now.needs for now in decided))


def _candidates(output: str, number: int, columns: frozenset[str]) -> pa.Table:
    """Columns of the rows of one shard that a selection may choose: embedded, and no later copy of a uid."""
    table = tables.read(output, number, sorted(columns | {"address", "status"}))
    first = np.ones(table.num_rows, dtype=bool)
    first[addresses.row_of(_duplicates_in(output, number))] = False
    return table.filter(pa.array(first)).filter(pc.field("status") == "ok")


def _duplicates_in(output: str, number: int) -> np.ndarray:
    """The shard's part of the duplicates' addresses."""
    begin, end = _saved(output, DUPLICATES_FROM, number, number + 2)
    return _saved(output, DUPLICATES, int(begin), int(end))


def _surviving(table: pa.Table, decided: Sequence[Decided]) -> np.ndarray:
    """Which rows pass all the steps, (n,) bool."""
    return _stages(table, decided)[-1]


def _stages(table: pa.Table, decided: Sequence[Decided]) -> np.ndarray:
    """Which rows are left after each of the S steps, (S + 1, n) bool; the first are all."""
    alive = np.ones((len(decided) + 1, table.num_rows), dtype=bool)
    for place, now in enumerate(decided):
        if isinstance(now.step, Select):
            passes = sampling.kept(now.cut, *_bits_and_ties(table, now))
        else:
            passes = now.step.passes(table)
        alive[place + 1] = alive[place] & passes
    return alive


def _bits_and_ties(table: pa.Table, now: Decided) -> tuple[np.ndarray, np.ndarray]:
    """A selector's keys as order bits (n,) uint32, and the tie hashes of the uids (n,) uint64."""
    assert isinstance(now.step, Select)
    selector = now.step.selector()
    rows = _rows(table, selector.needs | {"uid"})
    keys = selector.sort_key(rows, OFFLINE_PROGRESS, now.seed).numpy()
    return sampling.order_bits(keys), sampling.tie_hash(rows["uid"].numpy().view(np.uint64))


def _rows(table: pa.Table, needs: frozenset[str]) -> Rows:
    """Columns of a table as a selector takes them."""
    return {name: torch.from_numpy(values) for name, values in bucket_select.columns_of(table, needs).items()}
