"""Selection over tables equals the same selection done in memory, whatever the shards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from curation import addresses
from curation.data import hash_lists, tables
from curation.data.row_tests import NotCopied, NotListed, Nulls, RowTest
from curation.distributed import select as selection
from curation.numerics.sampling import exact_top, tie_hash, uid_words
from curation.recipe import OneOf, Select, Step, Threshold

pytestmark = pytest.mark.usefixtures("ray_session")

SIZES = (5, 0, 17, 1, 40)


@pytest.fixture
def pool(tmp_path: Path) -> str:
    """Five tables, every seventh row dropped, scores with many ties and a NaN, a json number with nulls."""
    rng = np.random.default_rng(0)
    for number, n in enumerate(SIZES):
        dropped = np.arange(n) % 7 == 3
        scores = np.round(rng.random(n), 1).astype(np.float32)
        scores[:1] = np.nan
        columns: dict[str, Any] = {
            "address": addresses.pack(number, np.arange(n)),
            "uid": [f"{number:016x}{row:016x}" for row in range(n)],
            "key": [str(row) for row in range(n)],
            "shard": [f"{number}.tar"] * n,
            "offset": np.arange(n) * 512,
            "status": ["dropped" if d else "ok" for d in dropped],
            "reason": ["image:missing" if d else None for d in dropped],
            "caption": [None] * n,
            "width": list(range(n)),
            "height": [None] * n,
            "sha256": [None] * n,
            "image_embedding": np.zeros((int((~dropped).sum()), 4), np.float16),
            "text_embedding": np.zeros((int((~dropped).sum()), 4), np.float16),
            "clip_score": [None if d else float(s) for d, s in zip(dropped, scores, strict=True)],
        }
        odd = [row if number and row % 4 else "N/A" for row in range(n)]
        fields = [
            {"aesthetic": None if row % 5 == 0 else row / 2, "title": "text", "odd": odd[row]}
            | ({} if row % 3 else {"url": f"http://a/{row}"})
            for row in range(n)
        ]
        tables.write(str(tmp_path), number, tables.sample_table(columns, fields))
    return str(tmp_path)


def run(pool: str, steps: Sequence[Step], *, seed: int = 0) -> tuple[selection.Selected, pa.Table]:
    numbers = list(range(len(SIZES)))
    embedded = len(candidates(pool))
    selected = selection.select(pool, numbers, embedded=embedded, steps=steps, seed=seed)
    return selected, pa.concat_tables(selection.kept_rows(pool, numbers, selected.decided))


def candidates(pool: str) -> list[dict[str, Any]]:
    rows = tables.read_unified(pool, list(range(len(SIZES)))).to_pylist()
    return [row for row in rows if row["status"] == "ok"]


def scores_of(rows: list[dict[str, Any]]) -> np.ndarray:
    return np.array([row["clip_score"] for row in rows], np.float32)


def test_exactly_the_top_k_are_kept_ties_by_the_hash_of_the_uid(pool: str) -> None:
    rows = candidates(pool)
    ties = tie_hash(uid_words([row["uid"] for row in rows]))
    for keep in (0, 1, 7, 20, len(rows) - 1, len(rows), len(rows) + 5):
        selected, kept = run(pool, [Select(method={"name": "clip_score"}, keep=keep)])
        expected = exact_top(scores_of(rows), ties, min(keep, len(rows)))
        assert kept["address"].to_pylist() == sorted(rows[i]["address"] for i in expected)
        assert selected.rows == kept.num_rows == min(keep, len(rows))


def test_keep_fraction_rounds_to_the_nearest_count(pool: str) -> None:
    selected, _ = run(pool, [Select(method={"name": "clip_score"}, keep_fraction=0.3)])
    assert selected.rows == round(len(candidates(pool)) * 0.3)


def test_min_score_keeps_all_at_least_that_and_no_row_without_a_score(pool: str) -> None:
    rows = candidates(pool)
    for least in (0.0, 0.5, 1.1, -1.0):
        selected, kept = run(pool, [Select(method={"name": "clip_score"}, min_score=least)])
        expected = [r["address"] for r in rows if r["clip_score"] >= np.float32(least)]
        assert kept["address"].to_pylist() == expected and selected.rows == len(expected)


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.5, 0.99])
def test_datacomp_ties_cut_as_datacomps_own_rule_does(pool: str, fraction: float) -> None:
    rows = candidates(pool)
    scores = scores_of(rows)
    threshold = -np.sort(-scores)[int(len(scores) * fraction)]  # DataComp: NaN last, ties at the cut all kept
    _, kept = run(pool, [Select(method={"name": "clip_score"}, keep_fraction=fraction, ties="datacomp")])
    expected = [row["address"] for row in rows if row["clip_score"] >= threshold]
    if not np.isnan(threshold):
        assert kept["address"].to_pylist() == expected


def test_datacomp_ties_at_fraction_one_keep_every_row_that_has_a_score(pool: str) -> None:
    _, kept = run(pool, [Select(method={"name": "clip_score"}, keep_fraction=1.0, ties="datacomp")])
    assert kept["address"].to_pylist() == [r["address"] for r in candidates(pool) if not np.isnan(r["clip_score"])]


def test_thresholds_keep_the_range_and_treat_nulls_as_told(pool: str) -> None:
    rows = candidates(pool)
    _, kept = run(pool, [Threshold(column="json.aesthetic", at_least=2.0, at_most=6.0)])
    inside = [r for r in rows if r["json.aesthetic"] is not None and 2.0 <= r["json.aesthetic"] <= 6.0]
    assert kept["address"].to_pylist() == [r["address"] for r in inside] and inside
    _, kept = run(pool, [Threshold(column="json.aesthetic", at_least=2.0, nulls="keep")])
    loose = [r for r in rows if r["json.aesthetic"] is None or r["json.aesthetic"] >= 2.0]
    assert kept["address"].to_pylist() == [r["address"] for r in loose]


@pytest.mark.parametrize("nulls", ["drop", "keep"])
def test_a_filter_on_a_field_that_no_shard_has_is_an_error(pool: str, nulls: Nulls) -> None:
    told = r"selection: no shard has a column 'json.aestetic', did you mean 'json.aesthetic'\?"
    for step in (
        Threshold(column="json.aestetic", at_least=0, nulls=nulls),
        OneOf(column="json.aestetic", one_of=("a",), nulls=nulls),
    ):
        with pytest.raises(ValueError, match=told):
            run(pool, [step])


def test_a_value_that_is_no_number_is_no_value_also_where_a_shard_holds_no_other(pool: str) -> None:
    rows = candidates(pool)
    numbers = {row["address"]: float(row["json.odd"]) for row in rows if row["json.odd"] != "N/A"}
    _, kept = run(pool, [Threshold(column="json.odd", at_least=6)])
    assert kept["address"].to_pylist() == [address for address, number in numbers.items() if number >= 6]
    best = Select(method={"name": "clip_score", "column": "json.odd"}, keep_fraction=1.0, ties="datacomp")
    assert run(pool, [best])[1]["address"].to_pylist() == list(numbers)


def test_a_threshold_on_text_is_an_error_that_names_the_column(pool: str) -> None:
    with pytest.raises(ValueError, match=r"column 'json.title' of type string holds no numbers"):
        run(pool, [Threshold(column="json.title", at_least=0)])


def test_a_list_that_can_find_nobody_is_an_error_and_rows_that_it_cannot_find_are_counted(pool: str) -> None:
    (Path(pool) / "list.txt").write_text("http://a/0\n" + "0" * 64)
    numbers, rows = list(range(len(SIZES))), candidates(pool)

    def guarded(guard: RowTest) -> selection.Selected:
        return selection.select(pool, numbers, embedded=len(rows), steps=[], seed=0, guards=[guard])

    files = hash_lists.listed(f"{pool}/list.txt")
    selected = guarded(NotListed("opt-out", hash_lists.build(pool, files, "url"), "url"))
    urls = [row["json.url"] for row in rows]
    assert selected.warnings == {"guards:no_value": urls.count(None)}
    assert selected.rows == len(rows) - urls.count("http://a/0")
    with pytest.raises(ValueError, match=f"opt-out: .* by sha256, and none of the {len(rows)} samples has one"):
        guarded(NotListed("opt-out", "unread", "sha256"))
    with pytest.raises(ValueError, match=r"copy in x: .* none of the \d+ samples has one: set decontaminate.exact"):
        guarded(NotCopied("copy in x", "unread.exact"))


def test_uniform_is_repeatable_changes_with_the_seed_and_does_not_follow_the_score(pool: str) -> None:
    steps = [Select(method={"name": "uniform"}, keep=20)]
    first, again, other = (run(pool, steps, seed=seed)[1]["address"].to_pylist() for seed in (1, 1, 2))
    assert first == again != other


def test_each_step_sees_only_what_the_one_before_left(pool: str) -> None:
    steps = [Select(method={"name": "uniform"}, keep=30), Select(method={"name": "clip_score"}, keep=4)]
    selected, kept = run(pool, steps)
    _, reached = run(pool, steps[:1])
    by_address = {row["address"]: row["clip_score"] for row in candidates(pool)}
    best = sorted((by_address[a] for a in reached["address"].to_pylist() if not np.isnan(by_address[a])), reverse=True)
    assert sorted((by_address[a] for a in kept["address"].to_pylist()), reverse=True) == best[:4]
    assert [count.rows_out for count in selected.counts[1:]] == [30, 4]


def test_grouping_shards_into_tasks_changes_nothing(pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [Select(method={"name": "clip_score"}, keep=11)]
    whole = run(pool, steps)[1]["address"].to_pylist()
    monkeypatch.setattr("curation.distributed.tasks.SHARDS_PER_TASK", 1)
    assert run(pool, steps)[1]["address"].to_pylist() == whole


def test_a_field_of_the_pool_can_be_the_score_and_must_be_there(pool: str) -> None:
    step = Select(method={"name": "clip_score", "column": "json.aesthetic"}, keep=3)
    _, kept = run(pool, [step])
    # The shard of 40 rows has row / 2, but none in every fifth row; every seventh from the third on is dropped.
    assert sorted(kept["score"].to_pylist()) == sorted([row / 2 for row in range(40) if row % 5 and row % 7 != 3])[-3:]
    with pytest.raises(ValueError, match="no shard has a column 'json.esthetic', did you mean 'json.aesthetic'"):
        run(pool, [Select(method={"name": "clip_score", "column": "json.esthetic"}, keep=3)])


def test_a_derived_column_is_a_filter(pool: str) -> None:
    wide = [Threshold(column="width", at_least=20)]
    derived = [Threshold(column="min_side", at_least=20)]  # no height is known
    assert run(pool, derived)[1].num_rows == 0
    kept_anyway = [Threshold(column="min_side", at_least=20, nulls="keep"), *wide]
    assert run(pool, kept_anyway)[1]["key"].to_pylist() == run(pool, wide)[1]["key"].to_pylist()
