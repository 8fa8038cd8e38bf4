"""Votes and verdicts by hand, by enumeration, and the specification's exact numbers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from curation.numerics.votes import (
    AGGREGATORS,
    BINARISERS,
    RoundVotes,
    aggregate,
    binarise,
    mixture_votes,
    two_means_votes,
)


def all_rounds(votes_TN: np.ndarray) -> list[RoundVotes]:
    return [RoundVotes(np.arange(len(votes)), votes) for votes in votes_TN.astype(bool)]


def test_the_threshold_is_a_weight_above_the_mean() -> None:
    weights = np.array([1.0, 1.01, 0.2, 1.79])
    assert binarise(np.zeros(4), weights, by="threshold").tolist() == [False, True, False, True]


def test_two_means_is_the_best_of_all_splits() -> None:
    values = np.random.default_rng(0).normal(size=9)

    def within(votes: tuple[bool, ...]) -> float:
        sides = [values[np.array(votes)], values[~np.array(votes)]]
        return sum(((side - side.mean()) ** 2).sum() for side in sides)

    best = min(within(votes) for votes in itertools.product([True, False], repeat=9) if 0 < sum(votes) < 9)
    votes = two_means_votes(values)
    assert within(tuple(votes)) == pytest.approx(best)
    assert values[votes].min() > values[~votes].max()


def test_equal_scores_split_nowhere_and_repeated_ones_stay_together() -> None:
    for votes_of in (two_means_votes, mixture_votes):
        assert votes_of(np.full(5, 0.3)).tolist() == [True] * 5
        assert votes_of(np.array([0.0, 0.0, 0.0, 1.0, 1.0])).tolist() == [False] * 3 + [True] * 2
        assert votes_of(np.zeros(0)).shape == (0,)


def test_a_mixture_finds_its_two_components_of_unequal_width() -> None:
    rng = np.random.default_rng(1)
    is_high = rng.random(4000) < 0.7
    scores = np.where(is_high, rng.normal(1.0, 0.1, 4000), rng.normal(-1.0, 1.0, 4000))
    votes = mixture_votes(scores)
    assert (votes == is_high).mean() > 0.97 > 0.95
    # The wide component reaches close to the narrow one, where 2-means cuts midway between the two.
    assert not mixture_votes(np.concatenate([scores, [0.5]]))[-1] and two_means_votes(scores)[is_high].all()


@pytest.mark.parametrize("by", AGGREGATORS)
def test_votes_that_are_the_same_in_every_round_are_the_verdict(by) -> None:
    votes = np.random.default_rng(2).random(50) < 0.6
    verdict = aggregate(lambda: all_rounds(np.tile(votes, (4, 1))), num_rows=50, by=by)
    assert (verdict.keep == votes).all()


def test_majority_is_more_than_half_of_the_rounds_that_know_a_row() -> None:
    rounds = [
        RoundVotes(np.array([0, 1, 2]), np.array([True, True, False])),
        RoundVotes(np.array([2, 0]), np.array([True, True])),
    ]
    verdict = aggregate(lambda: rounds, num_rows=4, by="majority")
    assert verdict.useful[:3].tolist() == [1.0, 1.0, 0.5] and np.isnan(verdict.useful[3])
    assert verdict.keep.tolist() == [True, True, False, False] and verdict.accuracies is None


def test_one_coin_recovers_three_independent_rounds_of_accuracy_four_fifths() -> None:
    rng = np.random.default_rng(3)
    truth = np.arange(10_000) % 2 == 0
    votes = np.where(rng.random((3, 10_000)) < 0.8, truth, ~truth)
    verdict = aggregate(lambda: all_rounds(votes), num_rows=10_000, by="one_coin")
    assert verdict.accuracies is not None
    np.testing.assert_allclose(verdict.accuracies, 0.8, atol=0.02)
    assert (verdict.keep == truth).mean() == pytest.approx(0.896, abs=0.01)


def test_one_coin_trusts_the_better_round_where_majority_cannot() -> None:
    rng = np.random.default_rng(4)
    truth = rng.random(5000) < 0.5
    accuracies = [0.95, 0.65, 0.65, 0.65]
    votes = np.stack([np.where(rng.random(5000) < accuracy, truth, ~truth) for accuracy in accuracies])
    right = {
        by: (aggregate(lambda: all_rounds(votes), num_rows=5000, by=by).keep == truth).mean() for by in AGGREGATORS
    }
    assert right["one_coin"] > 0.94 > 0.9 > right["majority"]


def test_rows_that_no_round_knows_are_not_kept_and_move_nothing() -> None:
    votes = np.random.default_rng(5).random((3, 40)) < 0.7
    whole = aggregate(lambda: all_rounds(votes), num_rows=40, by="one_coin")
    wider = aggregate(lambda: all_rounds(votes), num_rows=60, by="one_coin")
    np.testing.assert_allclose(wider.useful[:40], whole.useful)
    assert np.isnan(wider.useful[40:]).all() and not wider.keep[40:].any()


@pytest.mark.parametrize("by", BINARISERS)
def test_every_binariser_votes_once_for_each_row(by) -> None:
    rng = np.random.default_rng(6)
    votes = binarise(rng.normal(size=31), rng.random(31) * 2, by=by)
    assert votes.shape == (31,) and votes.dtype == bool and 0 < votes.sum() < 31
