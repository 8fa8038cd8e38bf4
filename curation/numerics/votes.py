"""From scores that were logged round after round to one verdict per row: votes, and what they come to together.

Grad-Mimic's second stage (arXiv:2501.06708; its code was not released, so aggregation is our completion). In each round
every row is called useful or not by one of three binarisers; the rounds' votes are aggregated by majority or by a
one-coin model, in which each round is right about a row with a probability of its own (Dawid and Skene 1979, with one
parameter per annotator). Votes of one run's rounds are strongly correlated, so that model is over-confident: report
both.

A round's votes are read again for each iteration and never held beside another round's: memory is a few numbers per row
and one per round, whatever the number of rounds.

N rows, m of them with a vote in a round, T rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple, get_args

import numpy as np

Binariser = Literal["threshold", "two_means", "mixture"]
Aggregator = Literal["majority", "one_coin"]
BINARISERS: tuple[Binariser, ...] = get_args(Binariser)
AGGREGATORS: tuple[Aggregator, ...] = get_args(Aggregator)

MAX_ITERATIONS = 2000
CHANGE = 1e-6
ACCURACY_BOUNDS = (0.501, 0.999)


class RoundVotes(NamedTuple):
    """What one round says of m distinct rows: their places in [0, N) and True for useful."""

    rows: np.ndarray
    votes: np.ndarray


Rounds = Callable[[], Iterable[RoundVotes]]
"""All rounds in order, each time it is called."""


class Verdict(NamedTuple):
    """Of each row: the probability that it is useful, NaN if no round knows it; and each round's accuracy."""

    useful: np.ndarray
    accuracies: np.ndarray | None
    """(T,), of the one-coin model only."""

    @property
    def keep(self) -> np.ndarray:
        """(N,) bool: more likely useful than not."""
        return self.useful > 0.5


def binarise(scores_m: np.ndarray, weights_m: np.ndarray, *, by: Binariser) -> np.ndarray:
    """Votes (m,) bool of a batch's or a round's scores; weights of mean 1 within each batch serve the threshold."""
    if by == "threshold":
        return weights_m > 1
    return two_means_votes(scores_m) if by == "two_means" else mixture_votes(scores_m)


def two_means_votes(scores_m: np.ndarray) -> np.ndarray:
    """True for the upper of two clusters, (m,) bool: the exact optimum of 1-D 2-means. All True if all are equal.

    The clusters are the two sides of a cut of the sorted scores, so all cuts are tried: m log m.
    """
    values = np.asarray(scores_m, np.float64)
    ordered = np.sort(values)
    if len(ordered) < 2 or ordered[0] == ordered[-1]:
        return np.ones(len(values), bool)
    below = np.arange(1, len(ordered))
    centred = ordered - ordered.mean()
    # The sum of squares between the clusters is what 2-means maximises; centred, the upper sum is minus the lower.
    lower = np.cumsum(centred)[:-1]
    between = np.where(ordered[1:] > ordered[:-1], lower**2 * (1 / below + 1 / (len(ordered) - below)), -np.inf)
    cut = int(between.argmax())
    return values > ordered[cut]


def mixture_votes(scores_m: np.ndarray, *, max_iterations: int = 500) -> np.ndarray:
    """True for rows that the component of higher mean explains better, (m,) bool: a mixture of two Gaussians by EM.

    It starts from the two clusters of `two_means_votes`; variances have a floor of 1e-6 of the scores' own. All True if
    all scores are equal.
    """
    values = np.asarray(scores_m, np.float64)
    upper = two_means_votes(values).astype(np.float64)
    if upper.all():
        return np.ones(len(values), bool)
    floor = 1e-6 * values.var()
    share_2m = np.stack([1 - upper, upper])
    previous = -np.inf
    for _ in range(max_iterations):
        mass = share_2m.sum(axis=1)
        means = share_2m @ values / mass
        variances = np.maximum((share_2m * (values - means[:, None]) ** 2).sum(axis=1) / mass, floor)
        log_2m = (
            np.log(mass / len(values))[:, None]
            - 0.5 * np.log(2 * np.pi * variances)[:, None]
            - (values - means[:, None]) ** 2 / (2 * variances[:, None])
        )
        whole_m = np.logaddexp(log_2m[0], log_2m[1])
        share_2m = np.maximum(np.exp(log_2m - whole_m), 1e-300)
        likelihood = float(whole_m.mean())
        if likelihood - previous < 1e-9:
            break
        previous = likelihood
    high = int(means[1] >= means[0])
    return share_2m[high] > 0.5


def aggregate(rounds: Rounds, *, num_rows: int, by: Aggregator) -> Verdict:
    """The verdict of all rounds' votes."""
    share = _vote_share(rounds, num_rows)
    return Verdict(share, None) if by == "majority" else _one_coin(rounds, share)


def _vote_share(rounds: Rounds, num_rows: int) -> np.ndarray:
    """Share of the rounds that call a row useful, of those that know it."""
    useful, known = np.zeros(num_rows), np.zeros(num_rows)
    for rows, votes in rounds():
        useful[rows] += votes
        known[rows] += 1
    return np.divide(useful, known, out=np.full(num_rows, np.nan), where=known > 0)


def _one_coin(rounds: Rounds, share: np.ndarray) -> Verdict:
    """EM of the one-coin model, grad_mimic.md section 4; RuntimeError if it does not settle."""
    known = ~np.isnan(share)
    q = share.copy()
    for _ in range(MAX_ITERATIONS):
        useful = np.clip(q[known].mean(), 1e-12, 1 - 1e-12) if known.any() else 0.5
        evidence, accuracies = np.full(len(q), np.log(useful / (1 - useful))), []
        for rows, votes in rounds():
            accuracy = np.clip(np.where(votes, q[rows], 1 - q[rows]).mean(), *ACCURACY_BOUNDS)
            accuracies.append(accuracy)
            evidence[rows] += np.where(votes, 1.0, -1.0) * np.log(accuracy / (1 - accuracy))
        updated = np.where(known, _sigmoid(evidence), np.nan)
        change = float(np.abs(updated - q)[known].max(initial=0.0))
        q = updated
        if change < CHANGE:
            return Verdict(q, np.array(accuracies))
    raise RuntimeError(f"the one-coin model did not settle in {MAX_ITERATIONS} iterations: it still moved by {change}")


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(values / 2))
