"""One weighted gradient step: the only place where a loss becomes new weights.

The batch may be spread over ranks, and a rank's rows over micro-batches; the loss is that of the whole batch all the
same. Ranks gather their embeddings, each computes the losses of its own rows against all, and gradients flow back to
the rank that holds the row. With micro-batches the embeddings are computed twice: once without gradient to learn what
the loss says about each of them, then part by part to carry it to the weights (GradCache, Gao et al. 2021,
arXiv:2101.06983, Sec. 3); that is exact for a model without dropout.

n rows of this rank, S x S pixels, L tokens, D embedding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from curation.models.clip import TowerOutput
from curation.numerics.contrastive import Batch, PairLoss, softmax_distillation
from curation.training.collectives import gather, gather_with_gradient, ranks, sum_over_ranks


class Distillation(NamedTuple):
    """What the reference says of this rank's rows, and how much of it enters the loss."""

    image: Tensor  # (n, E) unit norm, the reference's
    text: Tensor  # (n, E)
    logit_scale: float  # the reference's
    share: float  # what the distillation's loss is multiplied by


class PairBatch(NamedTuple):
    """This rank's n rows to train on, on the model's device."""

    pixels: Tensor  # uint8 (n, S, S, 3), or features (n, F) for a network that takes them
    tokens: Tensor  # int64 (n, L)
    low_pixels: Tensor | None = None
    """uint8 (m, s, s, 3): images of the last m rows, at low resolution; `pixels` then holds the first n - m."""
    low_patch_size: int | None = None
    """The patch size at which the network embeds those."""
    distillation: Distillation | None = None

    def embedded_by(self, model: Callable[..., TowerOutput]) -> TowerOutput:
        """The model's output for all rows, in their order."""
        if self.low_pixels is None:
            return model(self.pixels, self.tokens)
        return model(self.pixels, self.tokens, self.low_pixels, low_patch_size=self.low_patch_size)

    def parts(self, count: int) -> list[tuple[Tensor, PairBatch]]:
        """Row numbers (n_k,) of each of `count` parts, and the part; each has its share of rows at low resolution."""
        n, full = len(self.tokens), len(self.pixels)
        rows = torch.arange(n, device=self.tokens.device)
        if self.low_pixels is None:
            return [(part, PairBatch(self.pixels[part], self.tokens[part])) for part in rows.chunk(count)]
        both = zip(rows[:full].tensor_split(count), rows[full:].tensor_split(count), strict=True)
        return [
            (
                torch.cat(part),
                PairBatch(
                    self.pixels[part[0]],
                    self.tokens[torch.cat(part)],
                    self.low_pixels[part[1] - full],
                    self.low_patch_size,
                ),
            )
            for part in both
        ]


class StepReport(NamedTuple):
    """What a step saw, all of it before the weights changed; of the whole batch, but for `losses`.

    Losses are the objective's, without the part that a distillation adds, so that runs with and without it compare.
    """

    loss: float  # mean of weight * loss
    mean_loss: float  # mean of loss
    losses: Tensor  # (n,) of this rank's rows, unweighted, detached
    accuracy: float  # share of images whose own text is nearest within the batch; of rows whose class is told right
    grad_norm: float  # before clipping
    logit_scale: float | None  # None for a classifier


class NotFinite(ValueError):
    """A loss or a gradient is not finite: the batch is bad, or the run has diverged. `rows` are this rank's."""

    def __init__(self, message: str, *, rows: list[int]):
        super().__init__(message)
        self.rows = rows
        self.addresses: list[int] = []
        """Of all rows that this rank was at work on, where the one who raises it knows them."""


def contrastive_step(
    model: Callable[[Tensor, Tensor], TowerOutput] | nn.Module,
    batch: PairBatch,
    *,
    weights: Tensor,
    optimizer: Optimizer,
    objective: PairLoss,
    max_grad_norm: float = 1.0,
    micro_batches: int = 1,
    weighted: Sequence[nn.Parameter] | None = None,
    autocast: contextlib.AbstractContextManager | None = None,
) -> StepReport:
    """Minimise mean(weights * losses) over all ranks' rows by one step of `optimizer`. Collective.

    `model` is a ClipNetwork or wraps one; with several ranks it is a DistributedDataParallel. `weights` (n,), as in a
    Selection; they count for the parameters `weighted` alone if any are named, and in one micro-batch. ValueError if
    weights do not fit the batch, NotFinite (on every rank) if a loss or the gradient is not finite: both before the
    weights or the optimizer's state have changed.
    """
    check_weights(weights, len(batch.tokens))
    autocast = autocast or contextlib.nullcontext()

    def backward() -> StepReport:
        if micro_batches > 1:
            return _backward_in_parts(model, batch, weights, objective, micro_batches=micro_batches, autocast=autocast)
        with autocast:
            output = batch.embedded_by(model)
        return _backward(output, weights, objective, weighted=weighted, distillation=batch.distillation)

    if weighted is not None and micro_batches > 1:
        raise ValueError(f"weights for some of the parameters need micro_batches=1, got {micro_batches}")
    return take_step(backward, optimizer=optimizer, max_grad_norm=max_grad_norm)


def check_weights(weights: Tensor, n: int) -> None:
    """ValueError if weights are not those of n rows, as in a Selection."""
    if weights.shape != (n,) or not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise ValueError(
            f"weights must be finite, >= 0 and ({n},) like the batch, "
            f"got {tuple(weights.shape)} from {weights.min().item()} to {weights.max().item()}"
            if weights.numel()
            else f"weights must be ({n},) like the batch, got none"
        )


def take_step(backward: Callable[[], StepReport], *, optimizer: Optimizer, max_grad_norm: float) -> StepReport:
    """One step of `optimizer` along the gradient that `backward` leaves in the parameters, clipped.

    NotFinite if the gradient is not finite, before weights or state have changed.
    """
    optimizer.zero_grad(set_to_none=True)
    seen = backward()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    grad_norm = clip_grad_norm_(parameters, max_grad_norm)
    if not torch.isfinite(grad_norm):
        optimizer.zero_grad(set_to_none=True)
        raise NotFinite(
            f"the step's batch is bad: loss {seen.loss} is finite, its gradient's norm is {grad_norm.item()}", rows=[]
        )
    optimizer.step()
    return seen._replace(grad_norm=grad_norm.item())


def weighted_mean(losses: Tensor, weights: Tensor) -> Tensor:
    """mean(weights * losses) of this rank's rows. NotFinite, on every rank, if any rank's loss is not finite.

    DistributedDataParallel takes the mean of the ranks' gradients, and the mean of their means is the batch's mean.
    """
    loss = (weights * losses).mean()
    num_bad = sum_over_ranks((~torch.isfinite(weights * losses)).sum())
    if num_bad:
        rows = (~torch.isfinite(losses)).nonzero().flatten().tolist()
        raise NotFinite(
            f"the step's batch is bad: loss {loss.item()} on rank {ranks().rank}, not finite in rows {rows[:10]} "
            f"of its {len(losses)}, and in {int(num_bad)} of all ranks",
            rows=rows,
        )
    return loss


def backward_weighted(losses: Tensor, weights: Tensor, *, weighted: Sequence[nn.Parameter] | None = None) -> None:
    """Leave the gradient of mean(weights * losses) in the parameters; of mean(losses) in all that are not `weighted`.

    None: all are. NotFinite, on every rank, if any rank's loss is not finite. Collective.
    """
    loss = weighted_mean(losses, weights)
    if weighted is None:
        loss.backward()
        return
    # DistributedDataParallel takes the mean over ranks of what `backward` leaves; of these it must be taken here.
    gradients = torch.autograd.grad(loss, list(weighted), retain_graph=True)
    losses.mean().backward()
    for parameter, gradient in zip(weighted, gradients, strict=True):
        assert parameter.grad is not None
        parameter.grad.copy_(mean_over_ranks(gradient))


def mean_over_ranks(gradient: Tensor) -> Tensor:
    """What DistributedDataParallel would leave of each rank's gradient. Collective."""
    return sum_over_ranks(gradient) / ranks().world_size if ranks().world_size > 1 else gradient


@torch.no_grad()
def report_of(losses: Tensor, weights: Tensor, *, hits: Tensor, logit_scale: float | None) -> StepReport:
    """The report of a step over all ranks; `hits` is how many of this rank's rows are answered right. Collective."""
    sums = sum_over_ranks(torch.stack([(weights * losses).sum(), losses.sum(), hits.to(losses.dtype)]))
    loss, mean_loss, accuracy = (sums / (ranks().world_size * len(losses))).tolist()
    return StepReport(loss, mean_loss, losses.detach(), accuracy, grad_norm=0.0, logit_scale=logit_scale)


def _backward(
    output: TowerOutput,
    weights: Tensor,
    objective: PairLoss,
    *,
    weighted: Sequence[nn.Parameter] | None = None,
    distillation: Distillation | None = None,
) -> StepReport:
    """Gradients of the whole batch's loss, from this rank's embeddings (n, D)."""
    image_nD, text_nD, logit_scale, logit_bias = output
    rank, world_size = ranks()
    within = None
    if world_size > 1:
        within = Batch(gather_with_gradient(image_nD), gather_with_gradient(text_nD), rank * len(image_nD))
    losses = objective(image_nD, text_nD, logit_scale=logit_scale, logit_bias=logit_bias, within=within)
    trained = losses
    if distillation is not None:
        trained = losses + distillation.share * softmax_distillation(
            image_nD,
            text_nD,
            logit_scale=logit_scale,
            reference=Batch(gather(distillation.image), gather(distillation.text), rank * len(image_nD)),
            reference_scale=distillation.logit_scale,
            within=within,
        )
    backward_weighted(trained, weights, weighted=weighted)
    with torch.no_grad():
        texts_MD = text_nD if within is None else within.text_MD
        own = torch.arange(len(losses), device=losses.device) + (0 if within is None else within.first)
        hits = ((image_nD @ texts_MD.T).argmax(dim=1) == own).sum()
    return report_of(losses, weights, hits=hits, logit_scale=logit_scale.item())


def _backward_in_parts(
    model: Callable[[Tensor, Tensor], TowerOutput] | nn.Module,
    batch: PairBatch,
    weights: Tensor,
    objective: PairLoss,
    *,
    micro_batches: int,
    autocast: contextlib.AbstractContextManager,
) -> StepReport:
    """As `_backward`, holding the activations of one part of the rows at a time."""
    parts = batch.parts(micro_batches)
    with torch.no_grad(), autocast:
        outputs = [part.embedded_by(model) for _, part in parts]
    as_they_were = torch.cat([rows for rows, _ in parts]).argsort()
    image_nD, text_nD = (torch.cat([output[side] for output in outputs])[as_they_were] for side in (0, 1))
    leaves = [value.detach().requires_grad_() for value in (image_nD, text_nD, *outputs[0][2:])]
    seen = _backward(TowerOutput(*leaves), weights, objective, distillation=batch.distillation)
    gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    for index, (rows, part) in enumerate(parts):
        is_last = index == len(parts) - 1
        # Between the ranks gradients travel once, after the last part.
        held = model.no_sync if isinstance(model, DistributedDataParallel) and not is_last else contextlib.nullcontext
        with held():
            with autocast:
                output = part.embedded_by(model)
            carried = (output.image * gradients[0][rows]).sum() + (output.text * gradients[1][rows]).sum()
            # Scale and bias have their whole gradient already; it enters once. Elsewhere it is 0, so that every
            # parameter has a part in each backward pass.
            share = 1.0 if is_last else 0.0
            scalars = output.logit_scale * gradients[2] + output.logit_bias * gradients[3]
            (carried + share * scalars).backward()
    return seen
