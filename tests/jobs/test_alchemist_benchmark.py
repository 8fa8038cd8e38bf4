"""The study of Alchemist runs at its smallest size, resumes, and its figures are what they are called."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jobs import benchmark
from jobs.benchmarks.alchemist import WAYS, auc, separation
from jobs.benchmarks.alchemist_models import EVERY, MODELS, steps_to, summary, variation


def test_auc_is_the_chance_that_one_exceeds_the_other():
    assert auc(np.array([3.0, 4.0]), np.array([1.0, 2.0])) == 1.0
    assert auc(np.array([1.0, 2.0]), np.array([2.0])) == 0.25
    kind = np.array(["plain", "real", "real", "chaotic", "near_duplicate"])
    found = separation(np.array([5.0, 4.0, 3.0, 3.5, 1.0]), kind)
    assert found == {"plain over real": 1.0, "real over chaotic": 0.5, "near duplicate over real": 0.0}


@pytest.mark.slow
def test_the_smallest_study_tells_every_figure_and_does_nothing_twice(
    real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ai_edge_litert")
    out = tmp_path / "figures.json"
    arguments = ["alchemist", "--tiny", "--folder", str(tmp_path), "--json", str(out)]
    assert benchmark.main(arguments) == 0
    figures = json.loads(out.read_text())
    ways = set(WAYS) - set(figures["collapsed"])
    of_the_image = {"clarity", "aesthetic", "edge density", "PNG bytes"}
    assert ways | of_the_image | {"held-out loss"} == set(figures["selections"])
    for of in figures["selections"].values():
        for keep, cells in of.items():
            for name, cell in cells.items():
                kept = cell["inclusion"]
                assert np.nanmean(kept) == pytest.approx(float(keep.rstrip("%")) / 100, abs=0.06), name
                shares = [cell[f"share of {kind}"]["mean"] for kind in ("real", "plain", "chaotic", "near_duplicate")]
                assert sum(shares) == pytest.approx(1)
            assert cells["Shift-Gsample"]["inclusion"][0] == 0 < cells["top-k"]["inclusion"][0]
    assert all(cell["mean"] <= 1 for of in figures["oracle"].values() for cell in [of["share of chaotic"]])
    told = capsys.readouterr().out
    assert told.count(" ...\n") == len(WAYS) + 2
    assert benchmark.main(arguments) == 0
    assert " ...\n" not in capsys.readouterr().out
    assert json.loads(out.read_text())["selections"] == figures["selections"]


def test_steps_and_variation_of_a_curve_are_what_they_are_called() -> None:
    assert steps_to([3.0, 2.0, 1.0, 1.5], 1.0) == 2 * EVERY
    assert steps_to([3.0, 2.0], 3.0) == EVERY and steps_to([3.0, 2.0], 1.9) is None
    assert variation([9.0, 9.0, 9.0, 5.0, 4.0, 3.0]) == 0.0
    assert variation([9.0, 9.0, 9.0, 5.0, 4.0, 5.0]) == 1.0
    curves = {"whole, equal epochs": [3.0, 2.0, 1.0, 0.5], "random 20%": [3.0, 2.0, 1.5, 1.2]}
    curves |= {"random 50%": [3.0, 2.0, 1.0, 0.9], "top-k 20%": [3.0, 1.2, 1.1, 1.0]}
    told = summary([{"masked": curves}])["masked"]["top-k 20%"]
    assert told["speed_up"] == [3.0] and told["minus_random"]["mean"] == pytest.approx(-0.2)
    assert told["minus_whole, equal epochs"]["mean"] == 0.5


@pytest.mark.slow
def test_the_smallest_models_are_trained_on_every_selection(real_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert")
    out = tmp_path / "figures.json"
    assert benchmark.main(["alchemist_models", "--tiny", "--folder", str(tmp_path), "--json", str(out)]) == 0
    [of_pool] = json.loads(out.read_text())["pools"].values()
    assert of_pool.keys() == MODELS.keys()
    for arms in of_pool.values():
        assert {"whole, equal epochs", "random 20%", "top-k 50%", "no junk 20%"} <= arms.keys()
        assert sum(name.startswith("Shift-Gsample 20%") for name in arms) >= 2
