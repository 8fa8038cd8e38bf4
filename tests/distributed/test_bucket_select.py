"""Steps that compare rows: over tables they are the selector itself, or it in each bucket; nothing is decided twice."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Generator, Tensor

from curation import addresses
from curation.data import tables
from curation.distributed import bucket_select
from curation.distributed import select as selection
from curation.methods import load_selector
from curation.numerics import sampling
from curation.recipe import Select, Step, Threshold
from curation.selector import Rows
from jobs.planted_pool import planted_pool

pytestmark = pytest.mark.usefixtures("ray_session")

SIZES = (150, 0, 217, 1, 232)
MakePool = Callable[..., str]


@pytest.fixture
def make_pool(tmp_path: Path) -> MakePool:
    """make_pool(sizes): 600 planted rows in tables of these sizes, every 50th image's bytes those of the next."""
    vectors = planted_pool(seed=0, width=16).rows[:600].half().numpy()
    scores = np.random.default_rng(0).random(600).round(2).astype(np.float32)

    def make(sizes: Sequence[int] = SIZES) -> str:
        folder, first = tmp_path / "-".join(map(str, sizes)), 0
        for number, n in enumerate(sizes):
            rows = np.arange(first, first + n)
            first += n
            columns: dict[str, Any] = {
                "address": addresses.pack(number, np.arange(n)),
                "uid": [hashlib.sha256(f"{row}".encode()).hexdigest()[:32] for row in rows],
                "key": [str(row) for row in rows],
                "shard": [f"{number}.tar"] * n,
                "offset": np.arange(n) * 512,
                "status": ["ok"] * n,
                "reason": [None] * n,
                "caption": [None] * n,
                "width": [int(row) for row in rows],
                "height": [None] * n,
                "sha256": [hashlib.sha256(f"{row - (row % 50 == 1)}".encode()).hexdigest() for row in rows],
                "image_embedding": vectors[rows],
                "text_embedding": vectors[rows],
                "clip_score": scores[rows],
            }
            odd = {0: int, 2: float, 4: str}.get(number)  # one field, of another type in each shard, and in one absent
            fields = [{"odd": odd(row)} if odd else {} for row in rows]
            tables.write(str(folder), number, tables.sample_table(columns, fields))
            has_hash = rows % 100 != 7
            hashes = tables.spread(vectors[rows[has_hash]], has_hash)
            tables.write_piece(str(folder), "phash", number, {"phash": hashes})
        return str(folder)

    return make


def run(pool: str, steps: Sequence[Step], *, num_shards: int = len(SIZES)) -> tuple[selection.Selected, pa.Table]:
    numbers = list(range(num_shards))
    selected = selection.select(pool, numbers, embedded=600, steps=steps, seed=0)
    return selected, pa.concat_tables(selection.kept_rows(pool, numbers, selected.decided))


def keys(table: pa.Table) -> set[int]:
    return {int(key) for key in table["key"].to_pylist()}


def in_memory(pool: str, method: dict[str, Any], keep: int | None, rng: Generator, *, among: Tensor | None = None):
    """What the selector itself chooses of the whole pool."""
    table = tables.read_unified(pool, range(len(SIZES)))
    fields = {name: value for name, value in method.items() if name != "name"}
    selector = load_selector(method["name"], **fields)
    values = bucket_select.columns_of(table, selector.needs | {"uid"})
    rows: Rows = {name: torch.from_numpy(np.array(value)) for name, value in values.items()}
    if among is not None:
        rows = {name: value[among] for name, value in rows.items()}
    return set(selector.select(rows, keep, 0.0, rng).indices.tolist())


def rng_of(place: int) -> Generator:
    """The generator of the only bucket of the step at `place` of a selection with seed 0."""
    seed = selection._seed_of_step(0, place)
    return Generator().manual_seed(int(sampling.hash_words(np.array([[seed, 0]], np.uint64), 0)[0] >> np.uint64(1)))


@pytest.mark.parametrize(
    ("method", "keep"),
    [
        ({"name": "typicality"}, 60),
        ({"name": "coreset"}, 60),
        ({"name": "semantic_dedup", "min_cosine": 0.97}, None),
        ({"name": "semantic_dedup", "min_cosine": 0.97, "prefer": "clip_score"}, None),
        ({"name": "exact_duplicates"}, None),
    ],
    ids=str,
)
def test_a_small_pool_is_decided_as_the_selector_decides_it_in_memory(make_pool, method, keep) -> None:
    pool = make_pool()
    selected, kept = run(pool, [Select(method=method, keep=keep)])
    expected = in_memory(pool, method, keep, rng_of(0))
    assert keys(kept) == expected
    assert selected.rows == kept.num_rows == len(expected) < 600


def test_a_field_whose_type_differs_between_shards_is_compared(make_pool) -> None:
    kept = run(make_pool(), [Select(method={"name": "exact_duplicates", "prefer": "json.odd"})])[1]
    assert kept.num_rows == 600 - 12
    assert {row + 1 for row in range(0, 600, 50)} <= keys(kept)  # of two copies the one with the higher number


@pytest.mark.parametrize("exact_rows", [20_000, 150])
def test_rows_without_the_vector_that_is_compared_are_left_out_and_counted(make_pool, exact_rows) -> None:
    pool = make_pool()
    fields = {"name": "semantic_dedup", "min_cosine": 1.0, "exact_rows": exact_rows, "bucket_rows": 80}
    for _ in range(2):  # the second time the verdict is there
        selected, kept = run(pool, [Select(method={**fields, "column": "phash"})])
        assert selected.warnings == {"selection:no_vector": 6}
        assert keys(kept).isdisjoint(range(7, 600, 100))
    assert run(pool, [Select(method=fields)])[0].warnings == {}


def test_exact_duplicates_leave_one_of_each_also_when_cut_into_buckets(make_pool) -> None:
    pool = make_pool()
    whole = run(pool, [Select(method={"name": "exact_duplicates"})])[1]
    cut = run(pool, [Select(method={"name": "exact_duplicates", "exact_rows": 100, "bucket_rows": 40})])[1]
    assert keys(cut) == keys(whole)
    assert whole.num_rows == 600 - 12
    for row in range(0, 600, 50):
        assert len(keys(whole) & {row, row + 1}) == 1


@pytest.mark.parametrize("method", ["typicality", "coreset"])
def test_a_large_pool_is_decided_bucket_by_bucket_with_its_quotas(make_pool, method) -> None:
    pool = make_pool()
    step = Select(method={"name": method, "exact_rows": 200, "bucket_rows": 100}, keep_fraction=0.1)
    selected, kept = run(pool, [step])
    assert selected.rows == kept.num_rows == 60
    assert np.isfinite(kept["score"].to_numpy()).all()


def test_the_outcome_depends_neither_on_shards_nor_on_tasks(make_pool, monkeypatch) -> None:
    steps = [
        Select(method={"name": "semantic_dedup", "min_cosine": 0.9, "exact_rows": 150, "bucket_rows": 80}),
        Select(method={"name": "typicality", "exact_rows": 150, "bucket_rows": 80}, keep=50),
    ]
    first, kept = run(make_pool(), steps)
    # One shard a task, a bucket a task, and the rows in other shards: the same.
    monkeypatch.setattr("curation.distributed.tasks.SHARDS_PER_TASK", 1)
    monkeypatch.setattr(bucket_select, "ROWS_PER_RUN", 1)
    again, other = run(make_pool((600,)), steps, num_shards=1)
    assert keys(other) == keys(kept)
    # The examples are addresses, which are other ones in other shards.
    assert [count[:3] for count in again.counts] == [count[:3] for count in first.counts]


def test_steps_see_what_those_before_them_left(make_pool) -> None:
    pool = make_pool()
    steps = [
        Threshold(column="width", at_least=300),
        Select(method={"name": "coreset"}, keep=80),
        Select(method={"name": "clip_score"}, keep=20),
    ]
    selected, kept = run(pool, steps)
    assert [count.rows_out for count in selected.counts[1:]] == [300, 80, 20]
    chosen = in_memory(pool, {"name": "coreset"}, 80, rng_of(1), among=torch.arange(300, 600))
    assert keys(kept) <= {row + 300 for row in chosen}


def test_what_is_decided_is_not_decided_again_and_what_is_not_goes_on(make_pool, monkeypatch) -> None:
    pool = make_pool()
    steps = [Select(method={"name": "typicality", "exact_rows": 200, "bucket_rows": 100}, keep=40)]
    kept = run(pool, steps)[1]
    folder = next((Path(pool) / "selection" / "steps").iterdir())
    assert not list((folder / "rows").iterdir())  # the copy of the vectors is gone
    marks = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert run(pool, steps)[1].equals(kept)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == marks
    # As if killed before the verdict, with one run of buckets decided: it is read, the others are decided anew.
    (folder / "begins.npy").unlink()
    for path in (folder / "kept").iterdir():
        if path.name != "00000000.npy":
            path.unlink()
    assert run(pool, steps)[1].equals(kept)
    # The same, and code that makes runs of other buckets: what is there is not taken for all of them.
    (folder / "begins.npy").unlink()
    for path in (folder / "kept").iterdir():
        if not path.name.startswith("00000000."):
            path.unlink()
    monkeypatch.setattr(bucket_select, "ROWS_PER_RUN", 1)
    assert run(pool, steps)[1].equals(kept)


def test_the_sweep_says_what_other_thresholds_would_remove(make_pool) -> None:
    pool = make_pool()
    run(pool, [Select(method={"name": "semantic_dedup", "min_cosine": 0.9})])
    lines = (Path(pool) / "selection" / "sweep-0-semantic_dedup.csv").read_text().splitlines()
    assert lines[0] == "min_cosine,removed,removed_fraction"
    removed = {float(line.split(",")[0]): int(line.split(",")[1]) for line in lines[1:]}
    assert list(removed.values()) == sorted(removed.values(), reverse=True)
    for cosine in (0.8, 0.9, 0.95):
        method = {"name": "semantic_dedup", "min_cosine": cosine}
        assert removed[cosine] == 600 - len(in_memory(pool, method, None, Generator()))
