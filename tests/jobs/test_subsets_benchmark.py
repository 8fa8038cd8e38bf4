"""The study of subsets: its own arithmetic by hand, and the command at its smallest size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jobs import benchmark
from jobs.benchmarks import subsets
from jobs.benchmarks.straw_men import match
from jobs.benchmarks.subset_pools import CLEAN, NEAR, OUTLIER, Part, StudyPool, image_pool, point_pool


def test_a_near_duplicate_counts_only_beside_the_row_that_it_copies() -> None:
    kind = np.array([CLEAN, CLEAN, NEAR, NEAR, OUTLIER, OUTLIER])
    copy_of = np.array([-1, -1, 0, 1, -1, -1])
    pool = StudyPool(np.zeros((6, 1)), np.zeros((6, 1)), kind, copy_of, np.full(6, ""), {})
    found = subsets.picked(pool, np.array([0, 2, 3, 4]))
    assert found == {"outliers": 0.25, "outliers_taken": 0.5, "near_duplicates": 0.25}


def test_a_caption_matches_an_image_like_those_that_its_words_stood_beside() -> None:
    dogs, cats = np.array([[1.0, 0, 0.1]]), np.array([[0, 1.0, -0.1]])
    known = {"known_captions": ["a dog", "a cat"] * 4, "known_mF": np.concatenate([dogs, cats] * 4)}
    found = match(["A dog!", "cat", "dog", "zebra"], np.concatenate([dogs, cats, cats, dogs]), **known)
    assert found[0] > 0.9 and found[1] > 0.9 and found[2] < -0.9 and found[3] == 0


def test_a_straw_man_is_the_top_of_its_one_number() -> None:
    pool = point_pool(0)
    score = np.arange(len(pool.kind)) * 1.0
    straw = subsets.judge(pool._replace(straw={"clarity": score}), keep=50, seed=0)
    top = subsets.picked(pool, np.argsort(-score)[:50])
    assert straw.keys() == {*subsets.ARMS, "clarity"} and straw["clarity"].items() >= top.items()


def test_differences_to_random_are_paired_by_pool() -> None:
    cells: list[dict[str, dict[str, float]]] = [
        {"random": dict.fromkeys(NAMES, value), "coreset": dict.fromkeys(NAMES, value + 1 + value / 10)}
        for value in (10.0, 20.0, 30.0)
    ]
    found = subsets.summary(cells)["coreset"]["distance_to_pool_minus_random"]
    assert found["mean"] == pytest.approx(3) and found["values"] == pytest.approx([2, 3, 4])
    assert found["half_width"] == pytest.approx(4.303 / 3**0.5)


NAMES = ("distance_to_pool", "distance_to_clean")


def test_a_pool_has_the_share_of_outliers_that_is_asked_for_and_knows_every_copy() -> None:
    normal = np.random.default_rng(0).standard_normal
    parts = {
        name: Part(normal((n, 3)), normal((n, 3)), copy_of, normal((n, 2)), np.full(n, name))
        for name, n, copy_of in (
            (CLEAN, 100, np.full(100, -1)),
            (NEAR, 8, np.arange(8)),
            (OUTLIER, 20, np.full(20, -1)),
        )
    }
    pool = image_pool(parts, outlier_share=0.10, seed=1)
    assert [(pool.kind == name).sum() for name in (CLEAN, NEAR, OUTLIER)] == [100, 5, 12]
    np.testing.assert_allclose(np.linalg.norm(pool.selection, axis=1), 1, rtol=1e-6)
    assert (pool.copy_of[pool.kind == NEAR] >= 0).all() and (pool.copy_of[pool.kind != NEAR] == -1).all()
    with pytest.raises(ValueError, match="45 rows of kind outlier are wanted, the track has 20"):
        image_pool(parts, outlier_share=0.3)


def test_planted_points_have_three_percent_of_outliers_and_copies_of_clean_points() -> None:
    pool = point_pool(0)
    assert (pool.kind == OUTLIER).mean() == pytest.approx(0.03, abs=0.005)
    near = np.flatnonzero(pool.kind == NEAR)
    assert len(near) and (pool.kind[pool.copy_of[near]] == CLEAN).all()


@pytest.mark.slow
def test_the_smallest_study_measures_every_arm_and_does_no_cell_twice(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CURATION_TEST_DATA", str(real_data))
    arguments = ["subsets", "--tiny", "--folder", str(tmp_path), "--json", str(tmp_path / "figures.json")]
    assert benchmark.main(arguments) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    planted = figures["cells"]["planted, outliers 3%, budget 10%"]
    assert planted.keys() == subsets.ARMS.keys()
    assert planted["coreset"]["outliers_taken"]["mean"] > 0.5 > planted["typicality"]["outliers_taken"]["mean"]
    assert len(figures["cells"]) == 4
    images = figures["cells"]["flickr8k, outliers 3%, budget 10%"]
    assert images.keys() == {*subsets.ARMS, "clarity", "match", "aesthetic"}

    def twice(*_: object, **__: object) -> None:
        raise AssertionError("a cell was done twice")

    monkeypatch.setattr(subsets, "judge", twice)
    assert benchmark.main(arguments) == 0
