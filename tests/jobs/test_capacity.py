"""What a run needs and costs: by hand on round figures, and that more of one thing never needs less of another."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import benchmark
from jobs.benchmarks.capacity import Prices, Rates, capacity
from jobs.exit_codes import EXIT_FAILED, EXIT_USAGE

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


def test_what_the_driver_cannot_do_in_time_is_said_and_nodes_are_counted_for_its_hours() -> None:
    # 1e12 / 10,000 = 1e8 shards, at 100 a second 277.8 h. It hands out 1e6 images/s, to 1111.1 actors: 278 nodes of 4.
    told = plan(1e12, 1)
    assert not told.possible and told.driver_bound and told.hours == pytest.approx(1e6 / 3600)
    assert (told.gpu_nodes, told.actors) == (278, 1112)
    assert told.compute_cost == pytest.approx(told.hours * (278 * 10 + told.cpu_nodes + 0.5))
    # Within an hour it can hand out 360,000 shards: 1e12 / 360,000 samples in each.
    assert told.least_samples_per_shard == 2_777_778
    assert not plan(1e12, 1, samples_per_shard=2_777_777).possible
    larger = plan(1e12, 1, samples_per_shard=2_777_778)
    assert larger.possible and larger.hours <= 1 and larger.gpu_nodes > 1000 * 60


@given(st.floats(1e3, 1e11), st.floats(0.1, 1000), st.floats(1, 10))
def test_whole_nodes_meet_the_hours_and_more_samples_never_need_less(
    samples: float, hours: float, factor: float
) -> None:
    less, more = plan(samples, hours), plan(samples * factor, hours)
    assert less.hours <= hours * (1 + 1e-9) if less.possible else less.driver_bound
    for name in ("shards", "gpu_nodes", "cpu_nodes", "ledger_actors", "tables_tb", "kept_tb"):
        assert getattr(less, name) <= getattr(more, name), name


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"samples": 0}, "samples must be finite and more than 0, got 0"),
        ({"samples": math.inf}, "samples must be finite and more than 0, got inf"),
        ({"hours": -1}, "hours must be finite and more than 0, got -1"),
        ({"hours": math.inf}, "hours must be finite and more than 0, got inf"),
        ({"hours": math.nan}, "hours must be finite and more than 0, got nan"),
        ({"samples_per_shard": 0}, "samples_per_shard must be finite and more than 0"),
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


EXAMPLES = ["--rates", "cluster/rates.json", "--prices", "cluster/prices.json"]


def test_a_plan_that_is_not_possible_says_so_and_what_would_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    raw = tmp_path / "plan.json"
    command = ["plan", "--samples", "1e12", "--hours", "1", *EXAMPLES, "--json", str(raw)]
    assert benchmark.main(command) == EXIT_FAILED
    said = capsys.readouterr().out
    assert "not possible within 1 h: " in said and "277.78 h" in said and "samples_per_shard >= 2,777,778" in said
    assert json.loads(raw.read_text())["plan"]["possible"] is False


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--hours", "inf"], "hours must be finite and more than 0, got inf"),
        (["--samples", "inf"], "samples must be finite and more than 0, got inf"),
        (["--samples", "0"], "samples must be finite and more than 0, got 0"),
        (["--samples", "1e308"], "plan: "),
        (["--samples-per-shard", "0"], "samples_per_shard must be finite and more than 0, got 0"),
        (["--keep-fraction", "nan"], "keep_fraction must be in [0, 1], got nan"),
        (["--rates", "nowhere.json"], "--rates: there is no file nowhere.json"),
        (["--prices", "nowhere.json"], "--prices: there is no file nowhere.json"),
        (["--prices", "cluster/rates.json"], "--prices cluster/rates.json: "),
    ],
)
def test_a_plan_of_what_makes_no_sense_is_a_wrong_command(
    flags: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    with pytest.raises(SystemExit) as ended:
        benchmark.main(["plan", "--samples", "1e9", *EXAMPLES, *flags])
    assert ended.value.code == EXIT_USAGE and says in capsys.readouterr().err
