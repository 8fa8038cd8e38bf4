"""Training a TopK sparse autoencoder, units that died brought back.

Source: Gao et al. 2024 (arXiv:2406.04093), App. A: where a unit has not been active for long, the most active of such
units have to write what is left over of each row; that loss, by the left-over's own size, is added at 1/32. Directions
are scaled back to length 1 after each step (the published code does it before, and its lengths drift).

n rows, D features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from curation.numerics.factors import top_units
from curation.training.sparse_autoencoder import SparseAutoencoder, Written


@dataclass(frozen=True, kw_only=True)
class AutoencoderSettings:
    """How it is trained. Our completion of arXiv:2603.04981, whose settings are not public."""

    num_steps: int
    dead_after: int
    """Steps without a row after which a unit is dead."""
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-4
    revive: float = 1 / 32
    """Weight of the loss that revives dead units."""


def fit_autoencoder(model: SparseAutoencoder, batches: Iterator[Tensor], settings: AutoencoderSettings) -> list[float]:
    """Train in place on batches (n, D) of rows of mean 0; each step's share of the variance that is left over.

    ValueError if the batches end early, or a loss is not finite.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    silent_M = torch.zeros(len(model.decoder_MD), dtype=torch.int64)
    losses = []
    for step in range(settings.num_steps):
        rows_nD = next(batches, None)
        if rows_nD is None:
            raise ValueError(f"batches ended after {step} of {settings.num_steps} steps")
        span = settings.learning_rate - settings.final_learning_rate
        factor = 0.5 * (1 + math.cos(math.pi * step / settings.num_steps))
        optimizer.param_groups[0]["lr"] = settings.final_learning_rate + span * factor
        written = model(rows_nD)
        loss = _left_over(rows_nD, written.rows_nD)
        revived = _revival(model, rows_nD, written, silent_M >= settings.dead_after)
        optimizer.zero_grad(set_to_none=True)
        (loss + settings.revive * revived).backward()
        if not torch.isfinite(loss):
            raise ValueError(f"the autoencoder's loss is {loss.item()} at step {step}; lower its learning rate")
        optimizer.step()
        model.normalise()
        silent_M += 1
        silent_M[written.active.units_NK[written.active.values_NK > 0]] = 0
        losses.append(loss.item())
    return losses


def _left_over(rows_nD: Tensor, written_nD: Tensor) -> Tensor:
    """Share of the rows' squared length that is not written."""
    return (rows_nD - written_nD).square().sum() / rows_nD.square().sum().clamp_min(1e-12)


def _revival(model: SparseAutoencoder, rows_nD: Tensor, written: Written, is_dead_M: Tensor) -> Tensor:
    """How badly the dead units write what is left over; 0 if none is dead."""
    num_dead = int(is_dead_M.sum())
    if not num_dead:
        return rows_nD.new_zeros(())
    among = min(rows_nD.shape[1] // 2 or 1, num_dead)
    active = top_units(written.responses_nM.masked_fill(~is_dead_M, -torch.inf), among)
    rest_nD = (rows_nD - written.rows_nD).detach()
    return _left_over(rest_nD, model.decoded(active)).nan_to_num(0.0)
