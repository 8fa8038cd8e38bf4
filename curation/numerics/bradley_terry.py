"""Strengths from paired comparisons: Bradley and Terry's model, with Davidson's ties.

Bradley, Terry 1952; Davidson 1970. With pi = exp(theta), the first of two wins with probability pi_a / D, they tie with
nu sqrt(pi_a pi_b) / D, and D is the sum of the three weights. So each vote is a softmax over (theta_a, log nu +
(theta_a + theta_b) / 2, theta_b), which is concave: Newton's method finds its one maximum. Without ties nu is 0, and
this is Bradley and Terry's own model.

A whole batch of tables is fitted at once, because a bootstrap fits a thousand of them.

B tables, P pairs, K models; the last axis of a table is (first wins, tie, second wins).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

MAX_STEPS = 100
MAX_STEP = 2.0
"""Newton's step is cut to this, in units of theta: far from the maximum it would overshoot."""
TOLERANCE = 1e-9
FIXED_LOG_NU = 40.0
"""exp(-40) is no tie in any study: what log nu is where no vote is a tie, and, with the other sign, where all are."""


class Strengths(NamedTuple):
    """theta (B, K), each row summing to 0, and log nu (B,)."""

    theta_BK: np.ndarray
    log_nu_B: np.ndarray


def all_pairs(num_models: int) -> np.ndarray:
    """The unordered pairs (P, 2) of models, the lower number first."""
    return np.stack(np.triu_indices(num_models, 1), 1)


def probabilities(strengths: Strengths, pairs_P2: np.ndarray) -> np.ndarray:
    """Davidson's probabilities (B, P, 3) of each pair's outcomes."""
    first, second = strengths.theta_BK[:, pairs_P2[:, 0]], strengths.theta_BK[:, pairs_P2[:, 1]]
    eta_BP3 = np.stack([first, strengths.log_nu_B[:, None] + (first + second) / 2, second], -1)
    weight_BP3 = np.exp(eta_BP3 - eta_BP3.max(-1, keepdims=True))
    return weight_BP3 / weight_BP3.sum(-1, keepdims=True)


def win_rates(strengths: Strengths, pairs_P2: np.ndarray) -> np.ndarray:
    """What the model expects (B, P): the share of votes for the first of each pair, a tie counted half."""
    chance_BP3 = probabilities(strengths, pairs_P2)
    return chance_BP3[..., 0] + chance_BP3[..., 1] / 2


def elo_points(theta: float) -> float:
    """A strength as Elo shows it, 400 points a factor of ten in the odds, 0 the mean. For display alone."""
    return 400 / math.log(10) * theta


def fit(counts_BP3: np.ndarray, pairs_P2: np.ndarray, *, num_models: int, prior_sd: float | None = 2.0) -> Strengths:
    """The most probable strengths of each table of votes, under a Gaussian prior of `prior_sd` on each theta.

    Without a prior (None) it is the maximum likelihood, which does not exist where a model never wins or never loses,
    or where two groups of models never met: ValueError.
    """
    counts_BP3 = np.asarray(counts_BP3, float)
    if counts_BP3.ndim != 3 or counts_BP3.shape[1:] != (len(pairs_P2), 3) or (counts_BP3 < 0).any():
        raise ValueError(f"counts must be (B, {len(pairs_P2)}, 3) and not negative, got shape {counts_BP3.shape}")
    if prior_sd is not None and prior_sd <= 0:
        raise ValueError(f"prior_sd must be above 0, or None, got {prior_sd}")
    design_P3X = _design(pairs_P2, num_models)
    ridge_X = np.full(num_models + 1, 0.0 if prior_sd is None else prior_sd**-2)
    ridge_X[-1] = 0.0
    # The likelihood does not move along (1, ..., 1); this holds the sum of theta at 0 and costs nothing else.
    level_XX = np.zeros((num_models + 1, num_models + 1))
    level_XX[:-1, :-1] = 1.0
    ties_B, decisive_B = counts_BP3[..., 1].sum(1), counts_BP3[..., [0, 2]].sum((1, 2))
    is_free_B = (ties_B > 0) & (decisive_B > 0)
    at_BX = np.zeros((len(counts_BP3), num_models + 1))
    at_BX[:, -1] = np.where(is_free_B, 0.0, np.where(ties_B > 0, FIXED_LOG_NU, -FIXED_LOG_NU))
    for _ in range(MAX_STEPS):
        step_BX = _newton_step(at_BX, counts_BP3, pairs_P2, design_P3X, ridge_X, level_XX, is_free_B)
        longest_B = np.abs(step_BX).max(1, initial=0.0)
        at_BX += step_BX * np.minimum(1.0, MAX_STEP / np.maximum(longest_B, MAX_STEP))[:, None]
        if longest_B.max(initial=0.0) < TOLERANCE:
            return Strengths(at_BX[:, :-1] - at_BX[:, :-1].mean(1, keepdims=True), at_BX[:, -1])
    raise ValueError("no finite strengths: a model never wins or never loses, or models never met; give a prior_sd")


def _design(pairs_P2: np.ndarray, num_models: int) -> np.ndarray:
    """(P, 3, K + 1): what theta and log nu add to the three exponents of each pair."""
    design_P3X = np.zeros((len(pairs_P2), 3, num_models + 1))
    each = np.arange(len(pairs_P2))
    for column, outcome in ((0, 0), (1, 2)):
        design_P3X[each, outcome, pairs_P2[:, column]] = 1.0
        design_P3X[each, 1, pairs_P2[:, column]] = 0.5
    design_P3X[:, 1, -1] = 1.0
    return design_P3X


def _newton_step(
    at_BX: np.ndarray,
    counts_BP3: np.ndarray,
    pairs_P2: np.ndarray,
    design_P3X: np.ndarray,
    ridge_X: np.ndarray,
    level_XX: np.ndarray,
    is_free_B: np.ndarray,
) -> np.ndarray:
    """The step (B, K + 1) from where we are; 0 along log nu where it is fixed."""
    chance_BP3 = probabilities(Strengths(at_BX[:, :-1], at_BX[:, -1]), pairs_P2)
    votes_BP1 = counts_BP3.sum(-1, keepdims=True)
    slope_BX = np.einsum("bpo,pox->bx", counts_BP3 - votes_BP1 * chance_BP3, design_P3X) - at_BX * ridge_X
    slope_BX -= at_BX @ level_XX
    mean_BPX = np.einsum("bpo,pox->bpx", chance_BP3, design_P3X)
    curve_BXX = np.einsum("bpo,pox,poy->bxy", votes_BP1 * chance_BP3, design_P3X, design_P3X, optimize=True)
    curve_BXX -= np.einsum("bpx,bpy->bxy", votes_BP1 * mean_BPX, mean_BPX, optimize=True)
    curve_BXX += np.diag(ridge_X) + level_XX
    slope_BX[~is_free_B, -1] = 0.0
    curve_BXX[~is_free_B, -1, :] = 0.0
    curve_BXX[~is_free_B, :, -1] = 0.0
    curve_BXX[~is_free_B, -1, -1] = 1.0
    try:
        return np.linalg.solve(curve_BXX, slope_BX[..., None])[..., 0]
    except np.linalg.LinAlgError as error:
        raise ValueError("no finite strengths: some models never met, or never won; give a prior_sd") from error
