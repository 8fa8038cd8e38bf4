"""The Grad-Mimic study at its smallest size, and its measures by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from curation.numerics.votes import AGGREGATORS, BINARISERS
from jobs import benchmark
from jobs.benchmarks.mimic import MIMICS, SETTINGS, split
from jobs.benchmarks.mimic_runs import Arm, Split, auc, by_selector, f1, mimic, plain, probe, probes, symmetric_noise
from jobs.benchmarks.mimic_sets import ImageSet


def test_auc_counts_pairs_and_ties_half() -> None:
    scores, clean = np.array([0.9, 0.5, 0.5, 0.1]), np.array([True, True, False, False])
    assert auc(scores, clean) == pytest.approx((1 + 1 + 0.5 + 1) / 4)
    assert auc(-scores, clean) == pytest.approx(1 - 3.5 / 4)


def test_f1_is_the_harmonic_mean_of_precision_and_recall() -> None:
    found, true = np.array([True, True, True, False]), np.array([True, False, False, True])
    assert f1(found, true) == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))
    assert f1(np.zeros(4, bool), true) == 0.0


def test_symmetric_noise_moves_exactly_its_share_and_never_to_the_same_class() -> None:
    labels = torch.arange(1001) % 7
    noisy = symmetric_noise(labels, share=0.4, num_classes=7, rng=torch.Generator().manual_seed(0))
    assert int((noisy != labels).sum()) == 400 and set(noisy.tolist()) == set(range(7))


def test_parts_are_disjoint_and_a_test_split_stays_one() -> None:
    rows = 260
    whole = ImageSet(
        np.arange(rows)[:, None].astype(np.float16), np.arange(rows) % 5, np.full(rows, -1), np.zeros(rows)
    )
    whole = whole._replace(is_test_N=np.arange(rows) >= 200)
    parts = split(whole, seed=1)
    held = [part.features_NF[:, 0].int().tolist() for part in parts[:4]]
    assert sorted(row for part in held for row in part) == list(range(rows)) and min(held[3]) == 200
    assert [len(part) for part in held] == [153, 31, 16, 60]


@pytest.fixture(scope="module")
def blobs() -> Split:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 3
    return Split(
        3 * torch.eye(3)[labels] @ torch.randn(3, 8, generator=generator) + torch.randn(600, 8, generator=generator),
        labels,
    )


def test_arms_that_train_together_are_as_if_each_had_trained_alone(blobs: Split) -> None:
    reference = probe(blobs, plain, num_classes=3, epochs=3, seed=1).head
    weighs = [plain, mimic(reference, 0.5), by_selector("grand", share=0.5)]
    together = probes(blobs, [Arm(weigh) for weigh in weighs], num_classes=3, epochs=2, seed=2)
    for weigh, run in zip(weighs, together, strict=True):
        alone = probe(blobs, weigh, num_classes=3, epochs=2, seed=2)
        torch.testing.assert_close(run.head.weight_CF, alone.head.weight_CF, rtol=1e-4, atol=1e-5)
    assert np.isnan(together[0].scores_EN).all() and np.isfinite(together[1].scores_EN).all()
    assert together[1].weights_EN.mean() == pytest.approx(1.0, abs=1e-5)


def test_a_probe_that_mimics_a_clean_reference_withstands_noise_that_plain_training_does_not(blobs: Split) -> None:
    reference = probe(blobs, plain, num_classes=3, epochs=60, seed=1).head
    noisy = symmetric_noise(blobs.labels_N, share=0.6, num_classes=3, rng=torch.Generator().manual_seed(3))
    pool = blobs._replace(labels_N=noisy)
    run = probe(pool, mimic(reference, 0.3), num_classes=3, epochs=30, seed=1)
    assert auc(run.scores_EN.mean(axis=0), (noisy == blobs.labels_N).numpy()) > 0.9
    assert run.head.accuracy(blobs) > probe(pool, plain, num_classes=3, epochs=30, seed=1).head.accuracy(blobs)


@pytest.mark.slow
def test_the_study_measures_every_arm_on_every_set(real_data: Path, tmp_path: Path) -> None:
    arguments = ["mimic", "--tiny", "--json", str(tmp_path / "figures.json"), "--folder", str(tmp_path)]
    assert benchmark.main(arguments) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures["sets"]) == set(SETTINGS) and figures["sets_shown"]["of"] == 6
    human = figures["sets"]["cifar10"]["noise"]["human"]
    assert {"sgd", "grand", "agra", "gradmatch", "softmax-rho", "influence", *MIMICS} <= set(human["accuracy"])
    kinds = {f"{by}, {aggregator}" for by in BINARISERS for aggregator in AGGREGATORS}
    assert set(human["f1"]["mimic held-out"]) == kinds
    assert 0 < human["noise"]["mean"] < 1 and all(0 <= value["mean"] <= 1 for value in human["auc"].values())
    assert all(side["ours"]["median"] > 0 for name, side in figures["steps"].items() if name != "targets")
    # What is there already is not made again.
    begun = {path: path.stat().st_mtime_ns for path in (tmp_path / "mimic").iterdir()}
    assert benchmark.main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "mimic").iterdir()} == begun
