"""What a pairwise study came to: win rates, strengths, agreement, and how many votes are still needed.

Every interval but Wilson's is a bootstrap that draws whole raters: votes of one person go together, and drawing votes
one by one gives intervals that are too narrow. With R raters the bootstrap's deviation is widened by sqrt(R / (R - 1))
and by Student's t of R - 1 degrees, without which few raters would look surer than they are (two raters: a factor of
9). A few may agree by chance, and then their deviation is next to nothing: below FEW_RATERS it is never taken for less
than that of drawing votes. One rater has no such interval.

R raters, P pairs, K models, B draws; outcomes are FIRST, TIE, SECOND.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from curation.numerics import bradley_terry
from curation.numerics.bradley_terry import all_pairs, elo_points
from curation.numerics.intervals import Z_95, t_95, wilson
from curation.numerics.krippendorff import krippendorff_alpha

FIRST, TIE, SECOND = 0, 1, 2
DRAWS = 1000
PRIOR_SD = 2.0
DETECT = 0.6
"""The true win rate that a study is to tell from a half: the one that the article claims."""
Z_POWER_80 = 0.841621
FEW_RATERS = 5

Bounds = tuple[float, float]


class Vote(NamedTuple):
    """One vote on a matchup, two images of two models; models by number, the lower one first."""

    rater: int
    matchup: int
    first: int
    second: int
    outcome: int


class Rate(NamedTuple):
    """A share with both intervals; None where there is no vote, or but one rater."""

    value: float | None
    wilson: Bounds
    bootstrap: Bounds | None


class Pair(NamedTuple):
    """What the votes on two models say. Rates are the first one's."""

    first: str
    second: str
    wins: int
    ties: int
    losses: int
    rate_ties_half: Rate
    rate_decisive: Rate
    expected: float
    """The rate with ties half that the strengths give."""
    residual: float | None
    """Observed minus expected: what no order of strengths explains."""
    residual_bootstrap: Bounds | None
    still_needed: int
    """Decisive votes."""


class Model(NamedTuple):
    """One model's strength, 0 the mean; and the same as Elo points, for display."""

    name: str
    votes: int
    theta: float
    bootstrap: Bounds | None
    elo: float
    elo_bootstrap: Bounds | None


class Results(NamedTuple):
    """All of it. `models` has the strongest first."""

    num_votes: int
    num_raters: int
    models: list[Model]
    pairs: list[Pair]
    tie_share: float | None
    nu: float
    """Davidson's: at equal strength a tie is nu times as likely as a win."""
    num_shared: int
    """Matchups that two raters or more have voted on."""
    alpha_nominal: float | None
    alpha_interval: float | None
    detect: float
    warnings: list[str]


def votes_needed(win_rate: float) -> int:
    """Decisive votes to tell this true win rate from a half: two-sided 5%, power 80%. ValueError outside (.5, 1)."""
    if not 0.5 < win_rate < 1:
        raise ValueError(f"win_rate must be above 0.5 and below 1, got {win_rate}")
    deviation = Z_95 / 2 + Z_POWER_80 * math.sqrt(win_rate * (1 - win_rate))
    return math.ceil((deviation / (win_rate - 0.5)) ** 2)


def analyse(
    names: Sequence[str], votes: Sequence[Vote], *, detect: float = DETECT, draws: int = DRAWS, seed: int = 0
) -> Results:
    """The results of a study of two models or more. ValueError if there are fewer, or a vote is none of theirs."""
    if len(names) < 2:
        raise ValueError(f"a pairwise study needs two models, got {list(names)}")
    pairs_P2 = all_pairs(len(names))
    counts_RP3 = _counts(votes, pairs_P2)
    raters, counts_P3 = len(counts_RP3), counts_RP3.sum(0)
    fitted = bradley_terry.fit(counts_P3[None], pairs_P2, num_models=len(names), prior_sd=PRIOR_SD)
    by_rater = _redrawn(drawn_raters(counts_RP3, draws, seed), pairs_P2, len(names))
    # A rater who never saw a pair says nothing of it.
    raters_P = (counts_RP3.sum(2) > 0).sum(0)
    is_few = raters_P.min() < FEW_RATERS
    by_vote = _redrawn(_drawn_votes(counts_P3, draws, seed), pairs_P2, len(names)) if is_few else by_rater
    theta_K, expected_P = fitted.theta_BK[0], bradley_terry.win_rates(fitted, pairs_P2)[0]
    models = []
    for place in np.argsort(-theta_K, kind="stable"):
        theta = float(theta_K[place])
        bounds = clustered_interval(theta, by_rater.theta_BK[:, place], by_vote.theta_BK[:, place], raters=raters)
        points = None if bounds is None else (elo_points(bounds[0]), elo_points(bounds[1]))
        involved = int(counts_P3[(pairs_P2 == place).any(1)].sum())
        models.append(Model(names[int(place)], involved, theta, bounds, elo_points(theta), points))
    pairs = [
        _pair(
            (names[int(first)], names[int(second)]),
            counts_P3[p],
            float(expected_P[p]),
            by_rater.of_pair(p),
            by_vote.of_pair(p),
            raters=int(raters_P[p]),
            detect=detect,
        )
        for p, (first, second) in enumerate(pairs_P2)
    ]
    outcomes, matchups = np.array([v.outcome for v in votes], int), np.array([v.matchup for v in votes], int)
    return Results(
        num_votes=len(votes),
        num_raters=raters,
        models=models,
        pairs=pairs,
        tie_share=float(counts_P3[:, TIE].sum() / len(votes)) if votes else None,
        nu=float(np.exp(fitted.log_nu_B[0])),
        num_shared=int((np.unique(matchups, return_counts=True)[1] >= 2).sum()),
        alpha_nominal=krippendorff_alpha(matchups, outcomes - TIE),
        alpha_interval=krippendorff_alpha(matchups, outcomes - TIE, metric="interval"),
        detect=detect,
        warnings=_warnings(raters, pairs),
    )


def clustered_interval(value: float, by_rater_B: np.ndarray, by_vote_B: np.ndarray, *, raters: int) -> Bounds | None:
    """95% interval around `value` from what it came to with raters, and with votes, drawn anew; None for one rater."""
    by_rater_B, by_vote_B = by_rater_B[np.isfinite(by_rater_B)], by_vote_B[np.isfinite(by_vote_B)]
    if raters < 2 or len(by_rater_B) < 2 or len(by_vote_B) < 2:
        return None
    deviation = math.sqrt(raters / (raters - 1)) * float(by_rater_B.std(ddof=1))
    if raters < FEW_RATERS:
        deviation = max(deviation, float(by_vote_B.std(ddof=1)))
    half = t_95(raters - 1) * deviation
    return float(value - half), float(value + half)


class _Redrawn(NamedTuple):
    """What a bootstrap drew: tables (B, P, 3), strengths (B, K) and expected rates (B, P)."""

    counts_BP3: np.ndarray
    theta_BK: np.ndarray
    expected_BP: np.ndarray

    def of_pair(self, pair: int) -> _RedrawnPair:
        half_B = _share(self.counts_BP3[:, pair], ties_half=True)
        return _RedrawnPair(
            half_B, _share(self.counts_BP3[:, pair], ties_half=False), half_B - self.expected_BP[:, pair]
        )


class _RedrawnPair(NamedTuple):
    """The same of one pair, (B,) each."""

    half_B: np.ndarray
    decisive_B: np.ndarray
    residual_B: np.ndarray


def _redrawn(counts_BP3: np.ndarray, pairs_P2: np.ndarray, num_models: int) -> _Redrawn:
    fitted = bradley_terry.fit(counts_BP3, pairs_P2, num_models=num_models, prior_sd=PRIOR_SD)
    return _Redrawn(counts_BP3, fitted.theta_BK, bradley_terry.win_rates(fitted, pairs_P2))


def _counts(votes: Sequence[Vote], pairs_P2: np.ndarray) -> np.ndarray:
    """Votes (R, P, 3) by rater, pair and outcome."""
    place_of = {(int(first), int(second)): place for place, (first, second) in enumerate(pairs_P2)}
    raters = {rater: place for place, rater in enumerate(sorted({vote.rater for vote in votes}))}
    counts_RP3 = np.zeros((len(raters), len(pairs_P2), 3))
    for vote in votes:
        if (vote.first, vote.second) not in place_of or vote.outcome not in (FIRST, TIE, SECOND):
            raise ValueError(f"a vote must be on two known models, the lower first, with outcome 0 to 2, got {vote}")
        counts_RP3[raters[vote.rater], place_of[vote.first, vote.second], vote.outcome] += 1
    return counts_RP3


def drawn_raters(counts_RP3: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """Tables (B, P, 3), each of as many raters drawn with replacement; none if there is but one rater."""
    raters = len(counts_RP3)
    if raters < 2:
        return np.zeros((0, *counts_RP3.shape[1:]))
    times_BR = np.random.default_rng(seed).multinomial(raters, [1 / raters] * raters, size=draws)
    return np.tensordot(times_BR, counts_RP3, 1)


def _drawn_votes(counts_P3: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """Tables (B, P, 3), each pair's votes drawn one by one with replacement."""
    rng = np.random.default_rng([seed, 1])
    total_P1 = np.maximum(counts_P3.sum(1, keepdims=True), 1)
    shares_P3 = np.where(counts_P3.sum(1, keepdims=True) > 0, counts_P3 / total_P1, 1 / 3)
    return rng.multinomial(counts_P3.sum(1).astype(int), shares_P3, size=(draws, len(counts_P3))).astype(float)


def _pair(
    names: tuple[str, str],
    counts_3: np.ndarray,
    expected: float,
    by_rater: _RedrawnPair,
    by_vote: _RedrawnPair,
    *,
    raters: int,
    detect: float,
) -> Pair:
    wins, ties, losses = (int(count) for count in counts_3)
    half, decisive = (float(_share(counts_3[None], ties_half=ties_half)[0]) for ties_half in (True, False))

    def interval(value: float, place: int) -> Bounds | None:
        return None if math.isnan(value) else clustered_interval(value, by_rater[place], by_vote[place], raters=raters)

    return Pair(
        *names,
        wins=wins,
        ties=ties,
        losses=losses,
        rate_ties_half=_rate(half, wilson(wins + ties / 2, wins + ties + losses), interval(half, 0)),
        rate_decisive=_rate(decisive, wilson(wins, wins + losses), interval(decisive, 1)),
        expected=expected,
        residual=None if math.isnan(half) else half - expected,
        residual_bootstrap=interval(half - expected, 2),
        still_needed=max(0, votes_needed(detect) - wins - losses),
    )


def _share(counts_B3: np.ndarray, *, ties_half: bool) -> np.ndarray:
    """The first one's share (B,), NaN without votes."""
    gained_B = counts_B3[:, FIRST] + (counts_B3[:, TIE] / 2 if ties_half else 0)
    voted_B = counts_B3.sum(1) if ties_half else counts_B3[:, FIRST] + counts_B3[:, SECOND]
    return np.divide(gained_B, voted_B, out=np.full(len(counts_B3), np.nan), where=voted_B > 0)


def _rate(value: float, wilson_bounds: Bounds, found: Bounds | None) -> Rate:
    """A share and its intervals, none of which leaves [0, 1]."""
    bounds = None if found is None else (max(0.0, found[0]), min(1.0, found[1]))
    return Rate(None if math.isnan(value) else value, wilson_bounds, bounds)


def _warnings(raters: int, pairs: Sequence[Pair]) -> list[str]:
    """What a reader must know before the figures."""
    told = []
    if raters == 1:
        told.append("One rater: no interval over raters, and nothing about anybody else.")
    elif 1 < raters < FEW_RATERS:
        told.append(f"{raters} raters: intervals over raters rest on very few people.")
    if short := [f"{pair.first} and {pair.second}" for pair in pairs if pair.still_needed]:
        told.append(f"Votes are still needed for {len(short)} of {len(pairs)} pairs.")
    if any(pair.wins + pair.losses + pair.ties == 0 for pair in pairs):
        told.append("Some pairs have no vote: strengths of those models rest on the others and on the prior.")
    return told
