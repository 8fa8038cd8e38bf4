"""Percentiles read off a sample are exact for a whole pool, close for a part of one, and shares add up."""

from __future__ import annotations

import numpy as np
import pytest

from curation.numerics.percentiles import inclusion, percentiles, sorted_sample


def test_of_a_whole_pool_they_are_rank_and_a_half_over_n_the_highest_first():
    values = np.array([3.0, -1.0, 7.0, 0.5], np.float32)
    assert percentiles(values, sorted_sample(values)).tolist() == [0.375, 0.875, 0.125, 0.625]


def test_equal_values_share_the_middle_and_no_value_has_none():
    values = np.array([1.0, 1.0, 0.0, np.nan], np.float32)
    found = percentiles(values, sorted_sample(values))
    np.testing.assert_allclose(found, [1 / 3, 1 / 3, 5 / 6, np.nan], atol=1e-6)
    with pytest.raises(ValueError, match="percentiles need a finite value"):
        sorted_sample(np.array([np.nan], np.float32))


def test_a_sample_is_off_by_a_share_of_its_root():
    values = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    exact = percentiles(values, sorted_sample(values))
    close = percentiles(values, sorted_sample(values[:10_000]))
    assert np.abs(close - exact).max() < 0.02
    assert percentiles(np.array([99.0, -99.0], np.float32), sorted_sample(values)).tolist() == [0.0, 1.0]


def test_inclusion_is_the_kept_share_of_each_range():
    found = inclusion(np.array([0.05, 0.05, 0.95, 1.0]), np.array([True, False, True, True]), parts=10)
    assert found[0] == 0.5 and found[9] == 1.0 and np.isnan(found[1:9]).all()
