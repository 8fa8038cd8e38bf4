"""Arms and seeds: bands are intervals over seeds, and savings compare a seed with the same seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from curation.report import folder, training
from curation.report.folder import TrainingRun
from curation.report.savings import savings
from curation.report.training import Arm


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
