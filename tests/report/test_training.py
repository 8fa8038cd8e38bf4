"""Arms and seeds: bands are intervals over seeds, and savings compare a seed with the same seed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from curation.report import folder, training
from curation.report.costs import Prices
from curation.report.folder import TrainingRun
from curation.report.savings import rival_of, savings
from curation.report.training import Arm
from curation.report.training_view import training_view


def arms_of(*runs: Path) -> list[Arm]:
    found = [run for path in runs for run in folder.load(str(path))]
    return training.arms([run for run in found if isinstance(run, TrainingRun)], {}, {})


def test_a_band_is_the_interval_over_seeds(write_training) -> None:
    runs = [write_training(f"run{seed}", [0.1, end], seed=seed) for seed, end in enumerate((0.2, 0.3, 0.4))]
    [arm] = arms_of(*runs)
    [line] = training.curve_lines([arm], "samples_trained", "mean_r1")
    np.testing.assert_allclose(line.y, [0.1, 0.3])
    # t = 4.303 for two degrees of freedom, a deviation of 0.1, three seeds.
    np.testing.assert_allclose(np.asarray(line.high) - line.y, [0, 4.303 * 0.1 / np.sqrt(3)], atol=1e-9)
    np.testing.assert_allclose(np.asarray(line.high) - line.y, line.y - np.asarray(line.low))
    [junk] = training.step_lines([arm], "junk_share")
    assert len(junk.low) == len(junk.high) == 2 and junk.low[0] == junk.high[0] == 0.5


def test_one_seed_has_no_band(write_training) -> None:
    [arm] = arms_of(write_training("run", [0.1, 0.2]))
    assert not len(training.curve_lines([arm], "seconds", "mean_r1")[0].low)
    assert not len(training.step_lines([arm], "junk_share")[0].low)


def test_savings_compare_a_seed_with_the_same_seed_whatever_their_order(write_training) -> None:
    """Uniform's seeds 0 and 1 come to their last values after 4 and 2 steps; JEST's after 2 and 1."""
    slow, fast = [0.1, 0.2, 0.3, 0.4], [0.1, 0.4, 0.4, 0.4]
    uniform = [write_training(f"u{seed}", curve, seed=seed) for seed, curve in enumerate((slow, fast))]
    curves = {1: [0.4, 0.5, 0.5, 0.5], 2: [0.0, 0.0, 0.0, 0.1], 0: [0.2, 0.4, 0.5, 0.5]}
    jest = [write_training(f"j{seed}", curve, seed=seed, ratio=0.5, method="jest") for seed, curve in curves.items()]
    rival, arm = arms_of(*uniform, *jest)
    found = {saving.axis: saving for saving in savings(arm, rival, "mean_r1")}
    assert found["samples_trained"].num_seeds == 2  # the third has no partner
    assert found["samples_trained"].share.mean == pytest.approx(0.5)
    assert found["samples_trained"].share.half_width == pytest.approx(0.0)
    assert found["samples_loaded"].share.mean == pytest.approx(0.0)
    alone = arms_of(uniform[0], jest[1])
    assert savings(alone[1], alone[0], "mean_r1") == []


def killed(run: Path) -> Path:
    """A run as a kill leaves it: its logs in parts, neither merged nor accounted for."""
    for name in ("steps", "evaluations"):
        whole = run / "train" / f"{name}.parquet"
        (run / "train" / name).mkdir()
        whole.rename(run / "train" / name / "0000000001.parquet")
    (run / "train" / "summary.json").unlink()
    (run / "train" / "pool.parquet").touch()
    return run


def shortened(run: Path, steps: int) -> Path:
    """A run that was stopped after some steps of those that its recipe asks for."""
    for name in ("steps", "evaluations"):
        path = run / "train" / f"{name}.parquet"
        pq.write_table(pq.read_table(path).slice(0, steps), path)
    return run


def test_a_killed_runs_logs_are_read_from_their_parts(write_training) -> None:
    whole, parts = write_training("whole", [0.1, 0.2]), killed(write_training("parts", [0.1, 0.4], seed=1))
    [arm] = arms_of(whole, parts)
    found = arm.last("mean_r1")
    assert found is not None and found.mean == pytest.approx(0.3)
    assert arm.total("samples_trained") == 20.0 and arm.short() == []


def test_a_log_that_went_on_after_its_account_is_read_to_its_end(write_training) -> None:
    run = write_training("run", [0.1, 0.2, 0.3, 0.4])
    for name in ("steps", "evaluations"):
        merged = run / "train" / f"{name}.parquet"
        table = pq.read_table(merged)
        (run / "train" / name).mkdir()
        for begin in (0, 2):
            pq.write_table(table.slice(begin, 2), run / "train" / name / f"{begin + 1:010d}.parquet")
        pq.write_table(table.slice(0, 2), merged)
    (run / "train" / "summary.json").write_text(json.dumps({"steps": 2, "stopped": "SIGTERM", "format_version": 1}))
    [arm] = arms_of(run)
    assert arm.total("step") == 4.0 and arm.last("mean_r1") == (0.4, None)
    view = training_view(arm.runs, pools={}, references={}, memories={}, prices=Prices())
    assert view is not None and [warning for _, warning in view.warnings] == [
        "the run was stopped at step 2: SIGTERM",
        "its log goes on to step 4: it is under way again, or was killed after its account",
    ]


def test_a_seed_without_evaluations_is_named_and_the_others_are_compared(write_training) -> None:
    runs = [write_training(f"u{seed}", [0.1, 0.2], seed=seed) for seed in range(2)]
    for name in ("steps", "evaluations"):
        (runs[1] / "train" / f"{name}.parquet").unlink()
    jest = write_training("jest", [0.2, 0.3], method="jest", ratio=0.5)
    uniform, arm = arms_of(*runs, jest)
    assert uniform.last("mean_r1") == (0.2, None)
    assert uniform.short() == ["seed 1 came to step 0 of 2", "seed 1 was never measured"]
    assert savings(arm, uniform, "mean_r1")[0].num_seeds == 1
    assert len(training.curve_lines([uniform], "seconds", "mean_r1")) == 1
    assert len(training.step_lines([uniform], "junk_share")) == 1
    [alone] = arms_of(runs[1])
    assert alone.tables() == [] and alone.last("mean_r1") is None and alone.total("flops") is None


def test_seeds_are_compared_at_their_last_common_step_and_charged_with_what_each_spent(write_training) -> None:
    runs = [write_training("a", [0.1, 0.2, 0.3, 0.9]), shortened(write_training("b", [0.1, 0.4, 0, 0], seed=7), 2)]
    [arm] = arms_of(*runs)
    found = arm.last("mean_r1")
    assert found is not None and found.mean == pytest.approx((0.2 + 0.4) / 2)
    assert arm.short() == ["seed 7 came to step 2 of 4", "measured at step 2"]
    assert arm.total("step") == 3.0 and arm.total("flops") == 300.0 and arm.total("seconds") == 6.0


def test_the_rival_is_the_uniform_of_the_same_pool_and_length(write_training) -> None:
    pools = [Path("/runs/a"), Path("/runs/b")]
    uniforms = [write_training(f"u{pool.name}", [0.1, 0.2], data_run=pool) for pool in pools]
    uniforms.append(write_training("long", [0.1, 0.2, 0.3], data_run=pools[1]))
    jests = [
        write_training(f"j{len(curve)}{pool.name}", curve, data_run=pool, method="jest", ratio=0.5)
        for pool, curve in ((pools[1], [0.2, 0.3]), (pools[1], [0.1, 0.2, 0.4]), (Path("/runs/c"), [0.2, 0.3]))
    ]
    a, b, long, *arms = arms_of(*uniforms, *jests)
    assert [rival_of(arm, [a, b, long]) for arm in arms] == [b, long, a]
    assert [rival_of(arm, [a, b, long]) for arm in (a, b, long)] == [None] * 3


def test_a_value_that_was_not_measured_is_no_measure_of_quality(write_training) -> None:
    uniform, gaps, diverged = (
        write_training("u", [0.1, 0.2]),
        write_training("g", [None, 0.2], method="jest", ratio=0.5),
        write_training("d", [float("nan")] * 2, method="rho", ratio=0.5),
    )
    rival, some, none = arms_of(uniform, gaps, diverged)
    assert [saving.quality for saving in savings(some, rival, "mean_r1")] == [0.2] * 4
    assert savings(none, rival, "mean_r1") == [] and none.last("mean_r1") is None
