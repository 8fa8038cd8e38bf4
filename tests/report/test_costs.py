"""What runs cost: measured where boards counted their joules, an estimate and called one elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from curation.report import costs, folder
from curation.report.costs import KWH_J, Prices, curation_costs, training_costs
from curation.report.folder import CurationRun, TrainingRun
from tests.report.conftest import Row

TWO_SHARDS = [[Row(), Row()], [Row(broken=True)], [Row()]]


def curated(run: Path) -> CurationRun:
    [found] = folder.load(str(run))
    assert isinstance(found, CurationRun)
    return found


def trained(run: Path) -> TrainingRun:
    [found] = folder.load(str(run))
    assert isinstance(found, TrainingRun)
    return found


def test_joules_of_a_shared_board_are_counted_once(write_run) -> None:
    """Two actors share a board, and each of them read all of it: 1,000 and 500 J, halved."""
    run = write_run("run", TWO_SHARDS, device="cuda", joules=[1000.0, None, 500.0], compute={"gpus_per_actor": 0.5})
    scoring = curation_costs(curated(run), Prices())[0]
    assert scoring.is_measured and scoring.kwh == pytest.approx(750 / KWH_J)


@pytest.mark.parametrize("joules", [(), [1000.0, 0.0, None]], ids=["never noted", "not by all pieces"])
def test_energy_that_is_not_known_of_all_rows_is_an_estimate(write_run, joules) -> None:
    scoring = curation_costs(curated(write_run("run", TWO_SHARDS, device="cuda", joules=joules)), Prices())[0]
    # Each of three actors' calls took 1 + 2.5 + 0.5 s.
    assert not scoring.is_measured and scoring.kwh == pytest.approx(12 * 700 / KWH_J)


def test_a_steps_joules_are_shared_out_by_its_phases_seconds(write_training) -> None:
    """Of a step 0.5 s are spent waiting, 0.25 scoring, 1 training."""
    run = trained(write_training("run", [0.1, 0.2], device="cuda", joules=[70.0, 105.0]))
    found = {cost.part: cost for cost in training_costs(run, None, None, Prices())}
    assert all(cost.is_measured for cost in found.values())
    joules = {part: (cost.kwh or 0.0) * KWH_J for part, cost in found.items()}
    assert joules == pytest.approx({"waiting for rows": 50, "scoring and selecting": 25, "training": 100})


@pytest.mark.parametrize("joules", [None, [70.0, None]], ids=["no counter", "not in all steps"])
def test_a_run_that_did_not_count_has_an_estimate(write_training, joules) -> None:
    run = trained(write_training("run", [0.1, 0.2], device="cuda", joules=joules))
    training = training_costs(run, None, None, Prices(gpu_watts=360.0))[-1]
    assert not training.is_measured and training.kwh == pytest.approx(2 * 360 / KWH_J)


def test_a_reference_is_charged_with_what_its_own_run_counted(write_run, write_training) -> None:
    reference = trained(write_training("reference", [0.1, 0.2], device="cuda", joules=[3.0, 4.0]))
    jest = trained(write_training("jest", [0.1], method="jest", ratio=0.5, device="cuda"))
    found = training_costs(jest, curated(write_run("pool", TWO_SHARDS)), reference, Prices())
    assert [cost.part for cost in found[:2]] == ["reference", "cache"]
    assert found[0].is_measured and found[0].kwh == pytest.approx(7 / KWH_J)
    assert not any(cost.is_measured for cost in found[1:])


def test_estimates_are_this_runs_rates_times_the_rows(write_run) -> None:
    """3 rows were scored at 100 a second; three actors' calls were busy for 4 s each."""
    found = costs.estimates(curated(write_run("run", TWO_SHARDS)), Prices(cpu_core_hour=0.5), table_bytes_per_row=100)
    assert [row.samples for row in found] == [1_000_000, 100_000_000, 5_000_000_000]
    for row in found:
        assert row.hours is not None and row.hours == pytest.approx(row.samples / 100 / 3600)
        assert row.device_hours == pytest.approx(row.samples * 4 / 3600)
        assert row.money == pytest.approx(row.device_hours * 0.5)
        assert row.kwh == pytest.approx(row.device_hours * 0.01)
        assert row.gigabytes == pytest.approx(row.samples * 100 / 1e9)


def test_a_run_without_its_account_is_charged_with_what_it_logged(write_training) -> None:
    run = write_training("run", [0.1, 0.2], ratio=0.5)
    (run / "train" / "summary.json").unlink()
    found = {cost.part: cost.samples for cost in training_costs(trained(run), None, None, Prices())}
    assert found == {"waiting for rows": 40, "scoring and selecting": 40, "training": 20}


def test_scoring_actors_are_held_for_the_whole_run(write_training) -> None:
    """Two steps end after 4 s: three GPUs for 12 s, beside the worker's own 1 s of waiting and 2 s of training."""
    fields = {"method": "jest", "ratio": 0.5, "device": "cuda", "scoring": "pool", "scoring_actors": 3}
    run = trained(write_training("run", [0.1, 0.2], **fields))
    found = {cost.part: cost for cost in training_costs(run, None, None, Prices(gpu_hour=3600.0))[2:]}
    assert list(found) == ["scoring actors", "waiting for rows", "training"]
    assert found["scoring actors"].seconds == 4.0 and found["scoring actors"].money == pytest.approx(12)
    assert found["scoring actors"].kwh == pytest.approx(12 * 700 / KWH_J) and not found["scoring actors"].is_measured
    whole = training_costs(trained(write_training("jest", [0.1], method="jest", ratio=0.5)), None, run, Prices())[0]
    assert whole.part == "reference" and whole.seconds == 3.0 and (whole.device_hours or 0) * 3600 == pytest.approx(15)


def rerun(run: Path, *, embedded_now: int, rates: dict[str, float]) -> CurationRun:
    """A run of three shards whose last account embedded only some of them."""
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"shards": {"embedded_now": embedded_now, "committed": 3}, "images_per_second": rates}
    (run / "summary.json").write_text(json.dumps(summary))
    return curated(run)


@pytest.mark.parametrize(
    ("actors", "rates", "seconds", "said"),
    [
        pytest.param(
            2, {"select": 5.0}, 12 / 2, "the shards' own records, shared out evenly among 2", id="nothing new"
        ),
        pytest.param(2, {"embed": 1.0}, 12 / 2, "the shards' own records, shared out evenly among 2", id="some new"),
        pytest.param(None, {"embed": 1.0}, 3 / 1.0, "at the rate of what was embedded last", id="some new, any actors"),
        pytest.param(None, {}, None, "0.25 samples/s of one actor", id="nothing new, any actors"),
    ],
)
def test_a_run_that_embedded_little_anew_keeps_what_its_pieces_cost(write_run, actors, rates, seconds, said) -> None:
    """Three shards, 3 samples, an actor busy for 4 s with each."""
    run = rerun(
        write_run("run", TWO_SHARDS, compute={"actors": actors}), embedded_now=int("embed" in rates), rates=rates
    )
    scoring = curation_costs(run, Prices())[0]
    assert scoring.seconds == seconds and said in scoring.clock
    assert (scoring.device_hours or 0) * 3600 == pytest.approx(12)
    found = costs.estimates(run, Prices(), table_bytes_per_row=1)[0]
    assert found.device_hours == pytest.approx(found.samples * 4 / 3600)
    assert (found.hours is None) == (seconds is None)
