"""One weighted gradient step of an image–text model: the only place where a loss becomes new weights.

N rows, S x S pixels, L tokens, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from curation.models.clip import TowerOutput
from curation.numerics.contrastive import PairLoss, pick_accuracy


class PairBatch(NamedTuple):
    """N rows to train on, on the model's device."""

    pixels: Tensor  # uint8 (N, S, S, 3)
    tokens: Tensor  # int64 (N, L)


class StepReport(NamedTuple):
    """What a step saw, all of it before the weights changed."""

    loss: float  # mean of weight * loss
    losses: Tensor  # (N,) unweighted, detached
    accuracy: float  # share of images whose own text is nearest, within the batch
    grad_norm: float  # before clipping
    logit_scale: float


def contrastive_step(
    model: Callable[[Tensor, Tensor], TowerOutput] | nn.Module,
    batch: PairBatch,
    *,
    weights: Tensor,
    optimizer: Optimizer,
    objective: PairLoss,
    max_grad_norm: float = 1.0,
) -> StepReport:
    """Minimise mean(weights * losses) by one step of `optimizer`. `model` is a ClipNetwork or wraps one.

    `weights` (N,), as in a Selection. ValueError, before the model or the optimizer's state has changed, if weights do
    not fit the batch, or a loss or the gradient is not finite: then the batch is bad, or the run has diverged.
    """
    if weights.shape != (len(batch.pixels),) or not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise ValueError(
            f"weights must be finite, >= 0 and ({len(batch.pixels)},) like the batch, "
            f"got {tuple(weights.shape)} from {weights.min().item()} to {weights.max().item()}"
            if weights.numel()
            else f"weights must be ({len(batch.pixels)},) like the batch, got none"
        )
    optimizer.zero_grad(set_to_none=True)
    image_ND, text_ND, logit_scale, logit_bias = model(batch.pixels, batch.tokens)
    losses = objective(image_ND, text_ND, logit_scale=logit_scale, logit_bias=logit_bias)
    loss = (weights * losses).mean()
    if not torch.isfinite(loss):
        rows = (~torch.isfinite(losses)).nonzero().flatten().tolist()
        raise ValueError(
            f"the step's batch is bad: loss {loss.item()}, not finite in rows {rows[:10]} of {len(losses)}"
        )
    loss.backward()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    grad_norm = clip_grad_norm_(parameters, max_grad_norm)
    if not torch.isfinite(grad_norm):
        optimizer.zero_grad(set_to_none=True)
        raise ValueError(
            f"the step's batch is bad: loss {loss.item()} is finite, its gradient's norm is {grad_norm.item()}"
        )
    optimizer.step()
    return StepReport(
        loss=loss.item(),
        losses=losses.detach(),
        accuracy=pick_accuracy(image_ND.detach(), text_ND.detach()).item(),
        grad_norm=grad_norm.item(),
        logit_scale=logit_scale.item(),
    )
