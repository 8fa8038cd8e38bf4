"""Factors by hand: which units are common and rare, what rows score, and ranks that add up over parts of a pool."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from curation.evaluation.correlation import ranks, spearman
from curation.numerics.factors import (
    Active,
    Encoder,
    RankCounts,
    count_units,
    facts_of,
    rarity,
    representativeness,
    top_units,
)


def test_the_largest_positive_responses_are_active() -> None:
    active = top_units(torch.tensor([[0.5, 2.0, -1.0], [-1.0, -2.0, -3.0]]), 2)
    assert active.units_NK[0].tolist() == [1, 0] and active.values_NK.tolist() == [[2.0, 0.5], [0.0, 0.0]]
    assert count_units(active, 4).tolist() == [1, 1, 0, 0]


def test_units_are_alive_common_and_rare_by_their_counts() -> None:
    facts = facts_of(np.array([60, 50, 30, 20, 4, 2, 1, 0]), 100)
    # The first is dense, the last two too seldom; 50 of 106 do not cover half, 80 do.
    assert facts.alive_M.tolist() == [False, True, True, True, True, True, False, False]
    assert np.flatnonzero(facts.common_M).tolist() == [1, 2]
    assert np.flatnonzero(facts.rare_M).tolist() == [4, 5]
    assert facts.dead_share == 1 / 8
    with pytest.raises(ValueError, match="no factor is activated"):
        facts_of(np.array([0, 1, 99]), 100)


def test_a_row_of_common_units_is_representative_and_one_of_rare_units_is_rare() -> None:
    facts = facts_of(np.array([40, 20, 4, 2]), 100)  # common: the first; rare: the last two
    active = Active(torch.tensor([[3.0, 1.0], [1.0, 1.0], [2.0, 0.0]]), torch.tensor([[0, 1], [2, 3], [3, 0]]))
    assert representativeness(active, facts).tolist() == pytest.approx([0.75, 0.0, 0.0])
    assert rarity(active, facts).tolist() == pytest.approx([0.0, -np.log(0.04) - np.log(0.02), -np.log(0.02)])


def test_rarity_as_one_minus_representativeness_is_one_axis_and_ours_is_two() -> None:
    rng = torch.Generator().manual_seed(0)
    encoder = Encoder(torch.zeros(16), 1.0, torch.randn(64, 16, generator=rng), torch.zeros(64), 4)
    active = encoder.active(torch.randn(2000, 16, generator=rng) * torch.linspace(0.2, 2, 16))
    facts = facts_of(count_units(active, 64), 2000)
    common, rare = representativeness(active, facts).numpy(), rarity(active, facts).numpy()
    assert spearman(common, 1 - common) < -0.99 < -0.9 < spearman(common, rare)


def test_ranks_are_the_average_ranks_of_the_whole_pool_however_it_is_parted() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(size=500), np.zeros(40), rng.integers(0, 5, 60)]).astype(np.float32)
    whole = RankCounts.of(values)
    parted = RankCounts.of(values[:100]).plus(RankCounts.of(values[300:])).plus(RankCounts.of(values[100:300]))
    assert np.array_equal(whole.places, parted.places) and np.array_equal(whole.counts, parted.counts)
    expected = (ranks(values) - 1) / (len(values) - 1)
    assert np.abs(whole.ranks(values) - expected).max() < 2 / len(values)
    assert whole.ranks(np.array([-1e9, 1e9], np.float32)).tolist() == [0.0, 1.0]
    assert RankCounts.of(np.ones(1, np.float32)).ranks(np.ones(1, np.float32)).tolist() == [0.0]
