"""What the study of dynamic selection says of its claims, of its clock, and how its ResNet sees images; by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs import benchmark
from jobs.benchmarks.dynamic_claims import claims, verdict_of
from jobs.benchmarks.dynamic_clock import clock, speeds
from jobs.benchmarks.dynamic_resnet import augmented, cifar_resnet18
from jobs.benchmarks.dynamic_runs import BATCH, Arm, Pool
from jobs.benchmarks.dynamic_tables import paired


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ([0.03, 0.02, 0.04], "met"),
        ([-0.03, -0.02, -0.04], "missed"),
        ([0.03, -0.02, 0.01], "not told apart"),
        ([0.03, 0.01, 0.05], "not told apart"),  # 2.6 standard errors, and 3 seeds need 4.3
        ([0.03, 0.02], "not told apart"),
        ([0.02, 0.02, 0.02], "not told apart"),
    ],
)
def test_a_difference_counts_if_0_is_outside_its_interval_of_three_seeds(gains: list[float], verdict: str) -> None:
    assert verdict_of(paired(gains, [0.0] * len(gains))) == verdict


def arm(accuracy: list[float], ours: list[float], full: list[float], **fields: Any) -> dict[str, Any]:
    minus = None if accuracy is ours else paired(ours, accuracy)
    told = {"wrong_share": 0.2, "wrong_share_late": 0.2, "gap_bound": None, "bound_holds": True, **fields}
    return {"minus_full": paired(accuracy, full), "dynamic_minus_this": minus, **told}


def test_each_claim_is_judged_by_the_tables_that_it_is_about() -> None:
    ours, worse, full = [0.72, 0.73, 0.74], [0.70, 0.709, 0.72], [0.70, 0.75, 0.73]
    noisy = {
        "dynamic": arm(ours, ours, full, gap_bound=2, wrong_share=0.219),
        "infobatch": arm(worse, ours, full, wrong_share_late=0.4),
        "rs2": arm([0.721, 0.729, 0.74], ours, full),
        "dynamic, constant": arm(worse, ours, full),
    }
    clean = {
        "dynamic": arm(ours, ours, full, gap_bound=2, bound_holds=False),
        "full, fewer steps": arm(ours[:], ours, full),
    }
    tables = {
        "mobilenet/symmetric/cosine/0.2": {"mean_usage": 8.0, "arms": noisy},
        "mobilenet/clean/cosine/0.7": {"mean_usage": 28.0, "arms": clean},
    }
    bias = {"mobilenet/clean": {"falls_with_the_penalty": [True, False]}}
    told = claims({"tables": tables, "gradient_bias": bias})
    assert set(told) == {"D-1", "D-2", "D-3", "D-4", "D-5", "D-7", "D-8, on a CPU", "D-c"}
    assert told["D-1"] == {"verdict": "missed", "arms_with_a_bound": 2, "bound_over_mean_usage": [2 / 28, 2 / 8]}
    assert told["D-2"]["verdict"] == "met"
    assert told["D-2"]["wrong_share_late"]["mobilenet/symmetric/cosine/0.2"]["infobatch"] == 0.4
    assert told["D-3"]["verdict"] == "1 of 1 met" and told["D-4"]["verdict"] == "1 of 1 not told apart"
    assert told["D-7"] == {"verdict": "missed", "falls_in": 1, "of": 2}
    assert told["D-8, on a CPU"]["verdict"] == "met" and list(told["D-8, on a CPU"]["differences"]) == [
        "mobilenet/clean/cosine/0.7"
    ]


def test_the_clock_tells_each_arms_speed_with_and_without_what_was_done_beforehand() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, labels = torch.randn(2 * BATCH, 4, generator=generator), torch.arange(2 * BATCH) % 2
    pool = Pool(rows, labels, np.zeros(2 * BATCH, bool), {}, rows, labels)
    told = clock(pool, [Arm("rs2", "rs2", keep=0.5)], keep=0.5, rounds=2, seed=0)
    assert {name: of["sample_gradients"] for name, of in told.items()} == {"full": 4 * BATCH, "rs2": 2 * BATCH}
    assert all(of["seconds"] > of["choose_seconds"] > 0 for of in told.values())
    by_hand = {"full": {"seconds": 4.0, "cpu_seconds": 4.0}, "dynamic": {"seconds": 2.0, "cpu_seconds": 2.0}}
    arms = {name: {**told["rs2"], **of, "sample_gradients": 100} for name, of in by_hand.items()}
    found = speeds([{"by_keep": {"0.5": arms}, "factor_seconds": 3.0, "feature_seconds": 0.5}] * 2, num_rows=10)
    ours = found["by_keep"]["0.5"]["dynamic"]
    assert ours["by_the_clock"]["mean"] == 2.0 and ours["with_factors"]["mean"] == 0.8
    assert found["feature_seconds_of_the_pool"]["mean"] == 5.0


def test_an_augmented_image_is_a_piece_of_its_mirrored_or_unmirrored_surroundings() -> None:
    image = torch.arange(16 * 16 * 3).reshape(16, 16, 3).remainder(251).to(torch.uint8)
    wide = np.pad(image.numpy(), ((4, 4), (4, 4), (0, 0)), mode="reflect")
    pieces = {wide[y : y + 16, x : x + 16].tobytes() for y in range(9) for x in range(9)}
    pieces |= {
        np.ascontiguousarray(wide[y : y + 16, x : x + 16][:, ::-1]).tobytes() for y in range(9) for x in range(9)
    }
    found = augmented(image[None].repeat(200, 1, 1, 1), torch.Generator().manual_seed(0))
    seen = {one.numpy().tobytes() for one in found}
    assert seen <= pieces and len(seen) > 60


def test_the_resnet_keeps_small_images_large_and_its_study_refuses_a_cpu(tmp_path: Path) -> None:
    network = cifar_resnet18(10)
    sizes = []
    network.layer1.register_forward_hook(lambda _, __, out: sizes.append(tuple(out.shape[1:])))  # pyright: ignore
    assert network(torch.zeros(2, 3, 8, 8)).shape == (2, 10) and sizes == [(64, 8, 8)]
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="it needs a GPU"):
            benchmark.main(["dynamic_resnet", "--folder", str(tmp_path)])
