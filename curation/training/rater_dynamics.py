"""How the ranges of a rating train: the loss of each over the epochs, and how much its gradient still changes.

Alchemist, 2025 (arXiv:2512.16905), Fig. 3: the head has a low loss and a gradient that hardly moves, the middle is most
active, the tail hardly learns. Computed afterwards, from snapshots of the proxy, for the rating is known only then.

n rows, R ranges, S snapshots, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from curation.training.rater import Rows, losses

ROWS_PER_PASS = 256


class Dynamics(NamedTuple):
    """By snapshot and range, (S, R): mean loss, norm of the mean gradient, norm of its change since the last snapshot
    (NaN for the first)."""

    loss: np.ndarray
    gradient_norm: np.ndarray
    gradient_change: np.ndarray


def dynamics(
    proxy: nn.Module, snapshots: Sequence[Mapping[str, Any]], rows: Rows, percentile_n: np.ndarray, *, ranges: int = 10
) -> Dynamics:
    """Of rows whose percentiles (n,) are known, 0 for the highest rating, in equal ranges.

    The proxy ends as the last snapshot. ValueError if a range has no row.
    """
    of_range = np.minimum((percentile_n * ranges).astype(np.int64), ranges - 1)
    members = [np.flatnonzero(of_range == number) for number in range(ranges)]
    if empty := [number for number, places in enumerate(members) if not len(places)]:
        raise ValueError(f"range {empty[0]} of {ranges} holds no row")
    shape = len(snapshots), ranges
    found = Dynamics(*(np.full(shape, np.nan) for _ in Dynamics._fields))
    before: list[Tensor] = []
    for number, snapshot in enumerate(snapshots):
        proxy.load_state_dict(snapshot)
        now = []
        for place, places in enumerate(members):
            found.loss[number, place], gradient_P = _mean_loss_and_gradient(proxy, rows.at(places))
            found.gradient_norm[number, place] = gradient_P.norm().item()
            if before:
                found.gradient_change[number, place] = (gradient_P - before[place]).norm().item()
            now.append(gradient_P)
        before = now
    return found


def _mean_loss_and_gradient(proxy: nn.Module, rows: Rows) -> tuple[float, Tensor]:
    """Of a range's rows: the mean loss, and its gradient by all parameters in a row, (P,)."""
    parameters = [parameter for parameter in proxy.parameters() if parameter.requires_grad]
    total, gradients = 0.0, [torch.zeros_like(parameter) for parameter in parameters]
    for some in torch.arange(len(rows)).split(ROWS_PER_PASS):
        loss = losses(proxy, rows.at(some)).sum() / len(rows)
        told = torch.autograd.grad(loss, parameters, allow_unused=True)
        total += loss.item()
        gradients = [whole if part is None else whole + part for whole, part in zip(gradients, told, strict=True)]
    return total, torch.cat([gradient.flatten() for gradient in gradients])
