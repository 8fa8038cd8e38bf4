"""The pieces of the study of Grad-Mimic on pairs: its controls, its filters, when a run has reached another's end."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from curation.models.clip import build_network
from curation.training.mimic import layer_of
from jobs.benchmarks.mimic_clip import LAYER, _permuted, _random, _subsets, crossing


def test_a_goal_is_reached_where_no_later_loss_is_above_it() -> None:
    assert crossing([5.0, 3.0, 4.0, 2.0, 1.0], 3.5) == 3
    assert crossing([1.0, 1.0], 1.0) == 0
    assert crossing([1.0, 2.0], 1.5) is None


def test_a_permuted_reference_is_the_same_function_with_other_weights_and_a_random_one_is_as_far_away() -> None:
    start, reference = build_network("nano", seed=0).eval(), build_network("nano", seed=1).eval()
    permuted, random = _permuted(reference, seed=0).eval(), _random(start, reference, seed=0)
    pixels = torch.randint(0, 256, (3, 48, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(permuted.embed_images(pixels), reference.embed_images(pixels), atol=1e-5, rtol=1e-4)
    begun, grown, far = (layer_of(network.clip, LAYER) for network in (start, reference, random))
    moved = layer_of(permuted.clip, LAYER)
    assert (moved[f"{LAYER}.c_fc.weight"] - grown[f"{LAYER}.c_fc.weight"]).abs().max() > 0.01
    for name, value in begun.items():
        assert (far[name] - value).norm().item() == pytest.approx((grown[name] - value).norm().item(), rel=1e-4)


def test_filters_take_the_best_captions_and_then_leave_out_the_lowest_scores() -> None:
    by_clip, by_mimic = np.arange(20.0), np.array([1.0] * 14 + [-3.0, 5.0, -2.0, 4.0, -1.0, np.nan])
    found = _subsets(by_clip, by_mimic, seed=0)
    assert found["clip score"].tolist() == [14, 15, 16, 17, 18, 19]
    assert found["clip score and mimic"].tolist() == [15, 17, 19]
    chance = found["clip score and chance"].tolist()
    assert len(chance) == 3 and set(chance) <= {14, 15, 16, 17, 18, 19}
