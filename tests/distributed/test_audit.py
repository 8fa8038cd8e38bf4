"""Balance is exact, examples are of what was removed, and the audit's figures are those of a plain loop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from curation import addresses
from curation.data import tables
from curation.data.tallies import GroupCounts, HashWindows
from curation.distributed import select as selection
from curation.distributed.audit import OTHERS, audit_rows, warned_groups, write_waterfall_and_audit
from curation.distributed.balance import within_quotas
from curation.recipe import Audit, Balance, CurateRecipe, Group, OneOf, Select, Step, Threshold

pytestmark = pytest.mark.usefixtures("ray_session")

SIZES = (60, 0, 140, 1, 99)
DOMAINS = ("a.org", "b.org", "c.org", "d.org")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Five tables of 300 rows in groups of very different sizes; every tenth row has no url."""
    output, rng = str(tmp_path_factory.mktemp("audit")), np.random.default_rng(5)
    for number, n in enumerate(SIZES):
        columns: dict[str, Any] = {
            "address": addresses.pack(number, np.arange(n)),
            "uid": [f"{rng.integers(2**62):016x}{row:016x}" for row in range(n)],
            "key": [str(row) for row in range(n)],
            "shard": [f"{number}.tar"] * n,
            "offset": np.arange(n) * 512,
            "status": ["ok"] * n,
            "reason": [None] * n,
            "caption": ["a caption"] * n,
            "width": [300] * n,
            "height": [50 + row for row in range(n)],
            "sha256": [None] * n,
            "image_embedding": np.zeros((n, 4), np.float16),
            "text_embedding": np.zeros((n, 4), np.float16),
            "clip_score": rng.random(n).astype(np.float32),
        }
        domains = rng.choice(DOMAINS, n, p=[0.6, 0.25, 0.1, 0.05])
        urls = [{"url": f"https://{domain}/{row}" if row % 10 else None} for row, domain in enumerate(domains)]
        tables.write(output, number, tables.sample_table(columns, urls))
    return output


def domain(row: dict[str, Any]) -> str | None:
    return row["json.url"] and row["json.url"].split("/")[2]


def rows_of(pool: str) -> dict[int, dict[str, Any]]:
    return {row["address"]: row for row in tables.read_unified(pool, list(range(len(SIZES)))).to_pylist()}


def run(pool: str, steps: Sequence[Step], *, seed: int = 0) -> tuple[selection.Selected, list[int]]:
    numbers = list(range(len(SIZES)))
    selected = selection.select(pool, numbers, embedded=sum(SIZES), steps=steps, seed=seed)
    kept = [a for table in selection.kept_rows(pool, numbers, selected.decided) for a in table["address"].to_pylist()]
    assert len(kept) == selected.rows
    return selected, kept


def kept_by_domain(pool: str, kept: list[int]) -> Counter[str | None]:
    rows = rows_of(pool)
    return Counter(domain(rows[address]) for address in kept)


def test_a_cap_keeps_exactly_so_many_of_each_group_that_has_them(pool: str) -> None:
    whole = kept_by_domain(pool, list(rows_of(pool)))
    for cap in (0, 1, 20, 10_000):
        _, kept = run(pool, [Balance(balance="url_domain", cap=cap)])
        assert kept_by_domain(pool, kept) == Counter({d: min(whole[d], cap) for d in DOMAINS if cap})
    _, kept = run(pool, [Balance(balance="url_domain", cap=5, nulls="keep")])
    assert kept_by_domain(pool, kept) == Counter({**dict.fromkeys(DOMAINS, 5), None: whole[None]})


def test_an_even_spread_keeps_exactly_so_many_in_all(pool: str) -> None:
    whole = kept_by_domain(pool, list(rows_of(pool)))
    _, kept = run(pool, [Balance(balance="url_domain", keep=100)])
    counts = kept_by_domain(pool, kept)
    assert sum(counts.values()) == 100
    full = [d for d in DOMAINS if counts[d] == whole[d]]
    cut = [counts[d] for d in DOMAINS if d not in full]
    assert max(cut) - min(cut) <= 1 and all(whole[d] <= max(cut) for d in full)


def test_quotas_are_of_the_named_groups_and_the_others_go_or_stay(pool: str) -> None:
    whole = kept_by_domain(pool, list(rows_of(pool)))
    quotas = {"a.org": 7, "d.org": 10_000, "absent.org": 3}
    _, kept = run(pool, [Balance(balance="url_domain", quotas=quotas)])
    assert kept_by_domain(pool, kept) == {"a.org": 7, "d.org": whole["d.org"]}
    _, kept = run(pool, [Balance(balance="url_domain", quotas=quotas, others="keep")])
    assert kept_by_domain(pool, kept) == {**{d: whole[d] for d in DOMAINS}, "a.org": 7}


def test_balance_sees_what_the_step_before_left_and_follows_the_seed(pool: str) -> None:
    steps = [Threshold(column="clip_score", at_least=0.5), Balance(balance="image_size", cap=9)]
    _, kept = run(pool, steps)
    rows = rows_of(pool)
    assert all(rows[address]["clip_score"] >= 0.5 for address in kept)
    sizes = Counter(sum(rows[a]["height"] >= edge for edge in (64, 128)) for a in kept)
    assert sizes == {0: min(9, sizes[0]), 1: 9, 2: 9}
    assert run(pool, steps)[1] == kept != run(pool, steps, seed=1)[1]


def test_a_window_that_misses_is_widened(pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Balance(balance="url_domain", cap=13)
    expected = run(pool, [step])[1]
    monkeypatch.setattr("curation.distributed.balance.DEVIATIONS_BY_PASS", (0.0, float("inf")))
    passes: list[Any] = []

    def counted(count: Any) -> Any:
        passes.append(type(count))
        return selection.tally(pool, [[0, 1, 2, 3, 4]], [], count)

    test = within_quotas(step, selection._seed_of_step(0, 0), counted)
    assert passes in ([GroupCounts, HashWindows, HashWindows], [GroupCounts, HashWindows])
    numbers = list(range(len(SIZES)))
    again = selection.select(pool, numbers, embedded=sum(SIZES), steps=[], seed=0, guards=[test])
    kept = [a for t in selection.kept_rows(pool, numbers, again.decided) for a in t["address"].to_pylist()]
    assert kept == expected


def test_words_of_the_pools_own_fields_are_a_filter(pool: str) -> None:
    _, kept = run(pool, [OneOf(column="url_domain", one_of=("b.org", "d.org"))])
    assert kept_by_domain(pool, kept).keys() == {"b.org", "d.org"}
    for step in (OneOf(column="json.langauge", one_of=("en",)), Balance(balance="json.langauge", cap=1)):
        with pytest.raises(ValueError, match="no shard has a column 'json.langauge'"):
            run(pool, [step])


def test_the_waterfalls_examples_are_rows_that_the_step_removed(pool: str, tmp_path: Path) -> None:
    steps = [Threshold(column="height", at_least=100), Select(method={"name": "clip_score"}, keep=50)]
    selected, kept = run(pool, steps)
    rows = rows_of(pool)
    first, second = selected.counts[1:]
    assert len(first.examples) == len(second.examples) == 8
    assert all(rows[address]["height"] < 100 for address in first.examples)
    assert all(rows[a]["height"] >= 100 and a not in kept for a in second.examples)


def test_grouping_shards_into_tasks_changes_no_example(pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [Threshold(column="height", at_least=100), Balance(balance="url_domain", cap=4)]
    whole = run(pool, steps)
    monkeypatch.setattr("curation.distributed.tasks.SHARDS_PER_TASK", 1)
    assert (run(pool, steps)[0].counts, run(pool, steps)[1]) == (whole[0].counts, whole[1])


def test_the_audit_is_that_of_a_plain_loop(pool: str) -> None:
    steps = [Threshold(column="clip_score", at_least=0.3), OneOf(column="url_domain", one_of=("a.org", "b.org"))]
    audit = Audit(groups=(Group(column="url_domain"), Group(column="clip_score", edges=(0.5,))), min_rows=20)
    selected, kept = run(pool, steps)
    recipe = CurateRecipe(output=pool, selection=tuple(steps), audit=audit)
    warned = write_waterfall_and_audit(recipe, list(range(len(SIZES))), selected)
    told = pq.read_table(Path(pool) / "selection" / "audit.parquet").to_pylist()
    rows = rows_of(pool)
    for d in (*DOMAINS, None):
        [total] = [t for t in told if (t["column"], t["group"], t["step"]) == ("url_domain", d, -1)]
        mine = [address for address, row in rows.items() if domain(row) == d]
        mine_kept = sorted(set(mine) & set(kept))
        assert (total["rows_in"], total["rows_out"]) == (len(mine), len(mine_kept))
        assert total["lift"] == pytest.approx((len(mine_kept) / len(mine)) / (len(kept) / len(rows)))
        assert total["warned"] == (len(mine) >= 20 and not 0.5 <= total["lift"] <= 2)
        [first] = [t for t in told if (t["column"], t["group"], t["step"]) == ("url_domain", d, 1)]
        assert first["rows_out"] == sum(rows[address]["clip_score"] >= np.float32(0.3) for address in mine)
    assert {t["group"] for t in told if t["column"] == "clip_score"} == {"< 0.5", ">= 0.5"}
    assert warned == {"audit:lift": sum(t["warned"] for t in told if t["step"] == -1)}
    assert [row["step"] for row in warned_groups(pool)] == [-1] * warned["audit:lift"]
    waterfall = pq.read_table(Path(pool) / "selection" / "waterfall.parquet").to_pylist()
    assert [(w["name"], w["rows_in"] - w["removed"] == w["rows_out"]) for w in waterfall] == [
        (count.name, True) for count in selected.counts
    ]


def test_an_audit_by_ranges_of_text_is_an_error(pool: str) -> None:
    selected, _ = run(pool, [])
    recipe = CurateRecipe(output=pool, audit=Audit(groups=(Group(column="json.url", edges=(1.0,)),)))
    with pytest.raises(ValueError, match="column 'json.url' of type string holds no numbers"):
        write_waterfall_and_audit(recipe, list(range(len(SIZES))), selected)


def test_of_many_groups_the_largest_are_told_and_the_others_summed() -> None:
    counts: dict[str | None, np.ndarray] = {f"g{n}": np.array([n, n // 2]) for n in range(1, 6)}
    rows = audit_rows("x", counts, ["step"], Audit(max_groups=2))
    total = {row["group"]: (row["rows_in"], row["rows_out"]) for row in rows if row["step"] == -1}
    assert total == {"g5": (5, 2), "g4": (4, 2), OTHERS: (6, 2)}


def test_a_group_that_no_shard_has_is_an_error_and_a_default_one_is_not(pool: str) -> None:
    def audited(*columns: str) -> selection.Selected:
        numbers = list(range(len(SIZES)))
        return selection.select(pool, numbers, embedded=sum(SIZES), steps=[], seed=0, audited=columns)

    with pytest.raises(ValueError, match="audit.groups: no shard has a column 'json.ulr', did you mean 'json.url'"):
        audited("json.ulr")
    assert audited(*(group.column for group in Audit().groups), "json.url").rows == sum(SIZES)
    tables.write(empty := pool + "/without", 0, tables.read(pool, 0).drop_columns(["json.url"]))
    rows = selection.select(empty, [0], embedded=SIZES[0], steps=[], seed=0, audited=["url_domain", "image_size"]).rows
    assert rows == SIZES[0]


def test_an_empty_pool_has_an_empty_audit(tmp_path: Path) -> None:
    selected = selection.select(str(tmp_path), [], embedded=0, steps=[Balance(balance="url_domain", cap=1)], seed=0)
    recipe = CurateRecipe(output=str(tmp_path))
    assert write_waterfall_and_audit(recipe, [], selected) == {} and selected.rows == 0
    assert pq.read_table(tmp_path / "selection" / "audit.parquet").num_rows == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "give one of cap, keep, quotas; got none"),
        ({"cap": 1, "keep": 2}, r"give one of cap, keep, quotas; got \['cap', 'keep'\]"),
        ({"quotas": {}}, "quotas must be counts of at least one group"),
        ({"quotas": {"a": -1}}, "quotas must be counts of at least one group"),
        ({"cap": 1, "edges": (2.0, 1.0)}, r"edges of 'x' must ascend, got \(2.0, 1.0\)"),
    ],
)
def test_a_balance_that_makes_no_sense_is_an_error(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Balance(balance="x", **fields)
