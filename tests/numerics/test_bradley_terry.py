from __future__ import annotations

import math

import numpy as np
import pytest

from curation.numerics.bradley_terry import (
    FIXED_LOG_NU,
    Strengths,
    all_pairs,
    elo_points,
    fit,
    probabilities,
    win_rates,
)

TWO, THREE = all_pairs(2), all_pairs(3)


def test_sixty_wins_of_a_hundred_without_a_prior_are_the_logarithm_of_their_odds() -> None:
    found = fit(np.array([[[60, 0, 40]]]), TWO, num_models=2, prior_sd=None)
    assert found.theta_BK[0, 0] - found.theta_BK[0, 1] == pytest.approx(math.log(1.5), abs=1e-9)  # .4055
    assert np.exp(found.log_nu_B[0]) < 1e-12


def test_davidsons_ties_have_their_closed_form_for_two_models() -> None:
    # Saturated: the shares themselves; nu = ties / sqrt(wins losses), theta_a - theta_b = log(wins / losses).
    found = fit(np.array([[[45, 25, 30]]]), TWO, num_models=2, prior_sd=None)
    assert np.diff(found.theta_BK[0])[0] == pytest.approx(-math.log(1.5), abs=1e-8)
    assert np.exp(found.log_nu_B[0]) == pytest.approx(25 / math.sqrt(45 * 30), abs=1e-8)
    assert probabilities(found, TWO)[0, 0] == pytest.approx([0.45, 0.25, 0.30], abs=1e-8)
    assert win_rates(found, TWO)[0, 0] == pytest.approx(0.575, abs=1e-8)


def test_exact_tables_give_their_strengths_back() -> None:
    truth = Strengths(np.array([[0.4, 0.0, -0.4]]), np.log([0.5]))
    found = fit(1000 * probabilities(truth, THREE), THREE, num_models=3, prior_sd=None)
    assert found.theta_BK == pytest.approx(truth.theta_BK, abs=1e-8)
    assert found.log_nu_B == pytest.approx(truth.log_nu_B, abs=1e-8)


def test_tables_fitted_together_are_as_fitted_alone_and_strengths_sum_to_zero() -> None:
    tables = np.random.default_rng(0).integers(0, 9, (5, 3, 3)).astype(float)
    tables[1, :, 1] = 0
    tables[2, :, [0, 2]] = 0
    tables[3] = 0
    together = fit(tables, THREE, num_models=3)
    for place, table in enumerate(tables):
        alone = fit(table[None], THREE, num_models=3)
        assert together.theta_BK[place] == pytest.approx(alone.theta_BK[0], abs=1e-9)
        assert together.log_nu_B[place] == pytest.approx(alone.log_nu_B[0], abs=1e-9)
    assert together.theta_BK.sum(1) == pytest.approx(np.zeros(5), abs=1e-9)
    assert together.log_nu_B[1] == -FIXED_LOG_NU and together.log_nu_B[2] == FIXED_LOG_NU
    assert together.theta_BK[3] == pytest.approx(np.zeros(3), abs=1e-12)


def test_a_model_that_never_wins_is_finite_under_a_prior_and_refused_without() -> None:
    table = np.array([[[9, 0, 0]]])
    theta = fit(table, TWO, num_models=2, prior_sd=2.0).theta_BK[0]
    # The slope is 0 where 9 (1 - p) = theta / 4.
    assert 9 / (1 + math.exp(2 * theta[0])) == pytest.approx(theta[0] / 4, abs=1e-8)
    with pytest.raises(ValueError, match="give a prior_sd"):
        fit(table, TWO, num_models=2, prior_sd=None)


def test_models_that_never_met_are_refused_without_a_prior() -> None:
    apart = np.zeros((1, 6, 3))
    apart[0, 0] = apart[0, 5] = [3, 0, 2]
    with pytest.raises(ValueError, match="give a prior_sd"):
        fit(apart, all_pairs(4), num_models=4, prior_sd=None)


def test_what_is_no_table_is_refused() -> None:
    with pytest.raises(ValueError, match=r"counts must be \(B, 3, 3\) and not negative, got shape \(1, 1, 3\)"):
        fit(np.zeros((1, 1, 3)), THREE, num_models=3)
    with pytest.raises(ValueError, match="not negative"):
        fit(np.full((1, 1, 3), -1.0), TWO, num_models=2)
    with pytest.raises(ValueError, match="prior_sd must be above 0, or None, got 0"):
        fit(np.ones((1, 1, 3)), TWO, num_models=2, prior_sd=0)


@pytest.mark.parametrize(("rate", "points"), [(0.55, 35), (0.6, 70), (0.65, 108), (0.7, 147)])
def test_elo_points_are_those_of_the_tables(rate: float, points: int) -> None:
    assert round(elo_points(math.log(rate / (1 - rate)))) == points
