from __future__ import annotations

import numpy as np
import pytest

from curation.evaluation.pairwise import (
    FIRST,
    SECOND,
    TIE,
    Vote,
    analyse,
    clustered_interval,
    drawn_raters,
    votes_needed,
)
from curation.numerics.bradley_terry import Strengths, all_pairs, fit, probabilities

NAMES = ["a", "b", "c"]


def votes(table: dict[tuple[int, int], tuple[int, int, int]], *, rater: int = 0) -> list[Vote]:
    """A rater's votes by pair: wins, ties, losses; each on a matchup of its own."""
    told = [(pair, outcome) for pair, counts in table.items() for outcome in range(3) for _ in range(counts[outcome])]
    return [Vote(rater, 10_000 * rater + place, *pair, outcome) for place, (pair, outcome) in enumerate(told)]


def simulated(theta: list[float], nu: float, *, raters: int, per_pair: int, seed: int) -> list[Vote]:
    """Votes of raters with known strengths, so many of each on each pair."""
    rng, pairs = np.random.default_rng(seed), all_pairs(len(theta))
    chances = probabilities(Strengths(np.array([theta]), np.log([nu])), pairs)[0]
    drawn = rng.multinomial(per_pair, chances, size=(raters, len(pairs)))
    return [
        vote
        for rater in range(raters)
        for vote in votes(
            {tuple(pair): tuple(row) for pair, row in zip(pairs.tolist(), drawn[rater], strict=True)}, rater=rater
        )
    ]


@pytest.mark.parametrize(("rate", "needed"), [(0.55, 783), (0.6, 194), (0.65, 85), (0.7, 47)])
def test_votes_needed_are_those_of_the_specification(rate: float, needed: int) -> None:
    assert votes_needed(rate) == needed


def test_rates_by_hand_with_ties_half_and_excluded() -> None:
    found = analyse(["a", "b"], [*votes({(0, 1): (60, 20, 20)}), *votes({(0, 1): (60, 20, 60)}, rater=1)])
    (pair,) = found.pairs
    assert (pair.wins, pair.ties, pair.losses) == (120, 40, 80)
    assert pair.rate_decisive.value == 0.6 and pair.rate_ties_half.value == pytest.approx(140 / 240)
    assert pair.rate_decisive.wilson == pytest.approx((0.5308, 0.6654), abs=1e-4)
    assert pair.still_needed == 0 and found.tie_share == pytest.approx(40 / 240)
    assert pair.expected == pytest.approx(140 / 240, abs=2e-3) and pair.residual == pytest.approx(0, abs=2e-3)
    assert [model.name for model in found.models] == ["a", "b"] and found.models[0].elo == -found.models[1].elo


def test_the_bootstrap_draws_whole_raters() -> None:
    # Two raters of opposite minds: any draw of raters gives a rate of 0, a half or 1, a draw of votes hardly any.
    opposite = [*votes({(0, 1): (50, 0, 0)}), *votes({(0, 1): (0, 0, 50)}, rater=1)]
    (pair,) = analyse(["a", "b"], opposite).pairs
    assert pair.rate_decisive.bootstrap == (0.0, 1.0)
    assert pair.rate_decisive.wilson == pytest.approx((0.404, 0.596), abs=1e-3)


def test_few_raters_of_one_mind_are_no_surer_than_their_votes() -> None:
    agreed = [vote for rater in range(2) for vote in votes({(0, 1): (30, 0, 20)}, rater=rater)]
    (pair,) = analyse(["a", "b"], agreed).pairs
    assert pair.rate_decisive.bootstrap is not None
    low, high = pair.rate_decisive.bootstrap
    assert high - low > pair.rate_decisive.wilson[1] - pair.rate_decisive.wilson[0]


def test_one_rater_has_no_interval_over_raters_and_is_told() -> None:
    found = analyse(NAMES, votes({(0, 1): (5, 1, 2), (0, 2): (3, 0, 1)}))
    assert all(model.bootstrap is None and model.elo_bootstrap is None for model in found.models)
    assert all(pair.rate_decisive.bootstrap is None and pair.residual_bootstrap is None for pair in found.pairs)
    assert [warning[:10] for warning in found.warnings] == ["One rater:", "Votes are ", "Some pairs"]
    unseen = found.pairs[2]
    assert (unseen.rate_decisive.value, unseen.residual, unseen.still_needed) == (None, None, 194)


def test_a_pair_that_one_of_many_raters_saw_has_no_interval_over_raters() -> None:
    found = analyse(NAMES, [*votes({(0, 1): (5, 1, 2), (0, 2): (4, 0, 2)}), *votes({(0, 1): (3, 0, 3)}, rater=1)])
    assert found.pairs[0].rate_decisive.bootstrap is not None and found.pairs[1].rate_decisive.bootstrap is None


def test_a_cycle_shows_in_the_residuals_and_a_line_does_not() -> None:
    # a beats b, b beats c, c beats a, each 80 of 100: equal strengths, and 30 points that they do not explain.
    cycle = analyse(NAMES, votes({(0, 1): (80, 0, 20), (1, 2): (80, 0, 20), (0, 2): (20, 0, 80)}))
    assert [pair.residual for pair in cycle.pairs] == pytest.approx([0.3, -0.3, 0.3], abs=1e-6)
    line = analyse(NAMES, votes({(0, 1): (600, 0, 400), (1, 2): (600, 0, 400), (0, 2): (692, 0, 308)}))
    assert [pair.residual for pair in line.pairs] == pytest.approx([0, 0, 0], abs=2e-3)


def test_agreement_is_over_shared_matchups() -> None:
    both = [Vote(rater, matchup, 0, 1, matchup % 3) for rater in (0, 1) for matchup in range(6)]
    found = analyse(["a", "b"], [*both, Vote(0, 99, 0, 1, FIRST)])
    assert (found.num_shared, found.alpha_nominal, found.alpha_interval) == (6, 1.0, 1.0)
    apart = [Vote(0, 0, 0, 1, FIRST), Vote(1, 0, 0, 1, SECOND), Vote(0, 1, 0, 1, TIE), Vote(1, 1, 0, 1, FIRST)]
    told = analyse(["a", "b"], apart)
    assert told.alpha_nominal is not None and told.alpha_nominal < 0


def test_three_thousand_votes_of_known_raters_give_their_strengths_within_a_tenth() -> None:
    found = analyse(NAMES, simulated([0.4, 0.0, -0.4], 0.5, raters=20, per_pair=50, seed=0))
    assert found.num_votes == 3000 and [model.name for model in found.models] == NAMES
    assert [model.theta for model in found.models] == pytest.approx([0.4, 0.0, -0.4], abs=0.1)
    assert found.nu == pytest.approx(0.5, abs=0.1)


def test_intervals_over_raters_hold_the_truth_in_95_of_100_studies() -> None:
    # 200 votes a pair, as the specification wants for a 60% claim. Seeds are fixed, so this is exact: of 100 studies
    # and three strengths, binomial 95% limits around .95 would be 276 and 292.
    truth, held = [0.4, 0.0, -0.4], 0
    for seed in range(100):
        found = analyse(NAMES, simulated(truth, 0.5, raters=10, per_pair=20, seed=seed), draws=200, seed=seed)
        bounds = {model.name: model.bootstrap for model in found.models}
        held += sum(
            interval is not None and interval[0] <= theta <= interval[1]
            for theta, interval in ((theta, bounds[name]) for name, theta in zip(NAMES, truth, strict=True))
        )
    assert 276 <= held <= 292


def test_intervals_of_three_thousand_votes_hold_the_truth_in_93_to_97_of_100_repeats() -> None:
    truth, pairs, held = np.array([0.4, 0.0, -0.4]), all_pairs(3), np.zeros(3)
    chances = probabilities(Strengths(truth[None], np.array([-40.0])), pairs)[0]
    for seed in range(500):
        table = np.random.default_rng(seed).multinomial(50, chances, size=(20, 3)).astype(float)
        theta = fit(table.sum(0)[None], pairs, num_models=3).theta_BK[0]
        drawn = fit(drawn_raters(table, 200, seed), pairs, num_models=3).theta_BK
        for model in range(3):
            interval = clustered_interval(theta[model], drawn[:, model], drawn[:, model], raters=20)
            held[model] += interval is not None and interval[0] <= truth[model] <= interval[1]
    assert (held >= 0.93 * 500).all() and (held <= 0.97 * 500).all(), held


def test_no_vote_at_all_is_told_and_not_divided_by() -> None:
    found = analyse(NAMES, [])
    assert (found.num_votes, found.num_raters, found.tie_share, found.alpha_nominal) == (0, 0, None, None)
    assert [model.theta for model in found.models] == [0, 0, 0]


def test_an_interval_needs_two_raters() -> None:
    drawn = np.array([0.4, 0.6])
    assert clustered_interval(0.5, drawn, drawn, raters=1) is None
    # Deviation .1414, sqrt(10 / 9), t of 9 degrees 2.262: .337.
    assert clustered_interval(0.5, drawn, drawn, raters=10) == pytest.approx((0.1628, 0.8372), abs=1e-3)


def test_what_is_no_study_is_refused() -> None:
    with pytest.raises(ValueError, match=r"needs two models, got \['a'\]"):
        analyse(["a"], [])
    with pytest.raises(ValueError, match="two known models, the lower first"):
        analyse(["a", "b"], [Vote(0, 0, 1, 0, FIRST)])
    with pytest.raises(ValueError, match=r"win_rate must be above 0.5 and below 1, got 0.5"):
        votes_needed(0.5)
