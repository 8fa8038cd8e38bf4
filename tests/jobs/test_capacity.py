"""What a run needs and costs: by hand on round figures, and that more of one thing never needs less of another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import benchmark
from jobs.benchmarks.capacity import Prices, Rates, capacity

RATES = Rates(
    source="by hand",
    forward_per_actor=1000,
    efficiency=0.9,
    decode_per_core=100,
    image_bytes=50_000,
    embedding_dim=512,
    row_bytes=252,
    ledger_bytes=12,
    ledger_actor_gb=1.0,
)
PRICES = Prices(
    source="by hand",
    gpu_node_hour=10,
    actors_per_gpu_node=4,
    cores_per_gpu_node=16,
    cpu_node_hour=1,
    cores_per_cpu_node=20,
    head_hour=0.5,
    storage_gb_month=0.02,
)


def plan(samples: float = 1e9, hours: float = 10, *, rates: Rates = RATES, prices: Prices = PRICES, **more: Any) -> Any:
    settings = {"samples_per_shard": 10_000, "keep_fraction": 0.25, **more}
    return capacity(rates, prices, samples=samples, hours=hours, **settings)


def test_by_hand() -> None:
    # 1e9 / (36,000 s x 900 images/s) = 30.9 actors: 8 nodes of 4, which take 1e9 / (32 x 900) s = 9.645 h.
    # They eat 28,800 images/s: 288 cores, of which the nodes have 128, so 160 / 20 = 8 more nodes decode.
    told = plan()
    assert (told.actors, told.gpu_nodes, told.cpu_nodes, told.staged) == (32, 8, 8, True)
    assert told.hours == pytest.approx(1e9 / (32 * 900) / 3600) and not told.driver_bound
    assert (told.shards, told.ledger_actors, told.ledger_gb) == (100_000, 12, 12.0)
    assert told.tables_tb == pytest.approx(1e9 * (2048 + 252) / 1e12)
    assert told.kept_tb == pytest.approx(12.5)
    assert told.object_store_gb == pytest.approx(4 * 4 * (128 << 20) / 1e9)
    assert told.compute_cost == pytest.approx(told.hours * (80 + 8 + 0.5))
    assert told.storage_cost_month == pytest.approx((2300 + 12_500) * 0.02)


def test_nodes_that_decode_for_themselves_need_no_others_and_no_object_store() -> None:
    told = plan(rates=RATES.model_copy(update={"decode_per_core": 1000.0}))
    assert (told.cpu_nodes, told.staged, told.object_store_gb) == (0, False, 0)


def test_small_shards_are_the_drivers_business() -> None:
    told = plan(samples_per_shard=100)
    assert told.driver_bound and told.hours == pytest.approx(1e7 / 100 / 3600)


@given(st.floats(1e3, 1e11), st.floats(0.1, 1000), st.floats(1, 10))
def test_whole_nodes_meet_the_hours_and_more_samples_never_need_less(
    samples: float, hours: float, factor: float
) -> None:
    less, more = plan(samples, hours), plan(samples * factor, hours)
    assert less.driver_bound or less.hours <= hours * (1 + 1e-9)
    for name in ("shards", "gpu_nodes", "cpu_nodes", "ledger_actors", "tables_tb", "kept_tb"):
        assert getattr(less, name) <= getattr(more, name), name


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"samples": 0}, "samples must be more than 0, got 0"),
        ({"hours": -1}, "hours must be more than 0, got -1"),
        ({"samples_per_shard": 0}, "samples_per_shard must be more than 0"),
        ({"keep_fraction": 1.5}, r"keep_fraction must be in \[0, 1\], got 1.5"),
    ],
)
def test_what_is_absurd_is_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        plan(**wrong)


def test_the_command_prices_a_run_from_the_files_that_are_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "plan.json"
    root = Path(__file__).parents[2] / "cluster"
    files = ["--rates", str(root / "rates.json"), "--prices", str(root / "prices.json")]
    assert benchmark.main(["plan", "--samples", "5.85e9", *files, "--json", str(raw)]) == 0
    said = capsys.readouterr().out
    assert "5,850,000,000 samples within 24 h" in said and "nobody's price list" in said
    told = json.loads(raw.read_text())["plan"]
    assert told["shards"] == 585_000 and told["ledger_gb"] == pytest.approx(70.43, abs=0.01)
