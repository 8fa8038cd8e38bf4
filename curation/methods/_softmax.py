"""Weights by the softmax of a score over the batch, as Grad-Mimic and its rivals set them.

n rows.
"""

from __future__ import annotations

import math

from torch import Tensor


def softmax_weights(scores_n: Tensor, temperature: float) -> Tensor:
    """n * softmax(score / temperature), (n,) float32 of mean 1. Grad-Mimic (arXiv:2501.06708), "normed_proj"."""
    return scores_n.shape[0] * (scores_n.double() / temperature).softmax(dim=0).float()


def check_temperature(temperature: float) -> None:
    """ValueError if it is not positive and finite."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
