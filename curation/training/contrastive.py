"""The plain training loop of an image–text model: batches in, a trained network out, on one process and one device.

Everything random is in the order of the batches, which is a pure function of (seed, step); so a fit that stopped after
k steps goes on as if it never had: load network and optimizer, then `first_step=k`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch.optim import AdamW, Optimizer

from curation.models.clip import ClipNetwork
from curation.numerics.contrastive import PairLoss, sigmoid_loss
from curation.training.schedules import warmup_cosine
from curation.training.step import PairBatch, StepReport, contrastive_step

MAX_LOGIT_SCALE = 100.0
"""CLIP, section 2.5: the learned scale is clipped, lest training becomes unstable."""


def make_optimizer(
    network: torch.nn.Module,
    *,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.95),
) -> Optimizer:
    """AdamW; gains, biases, logit scale and bias (tensors with fewer than two axes) do not decay."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=learning_rate, betas=betas, fused=True)


def shuffled_batches(pairs: PairBatch, *, batch_size: int, seed: int, first_step: int = 0) -> Iterator[PairBatch]:
    """Endless batches of rows in memory, each round in its own order and without its incomplete last batch.

    ValueError if there are fewer rows than `batch_size`.
    """
    pixels, tokens = pairs.pixels, pairs.tokens
    if len(pixels) != len(tokens) or not 1 <= batch_size <= len(pixels):
        raise ValueError(
            f"batch_size must be in [1, {len(pixels)}], got {batch_size}; there are {len(tokens)} captions"
        )
    steps_per_round = len(pixels) // batch_size
    step, order, ordered_round = first_step, torch.empty(0), -1
    while True:
        this_round, place = divmod(step, steps_per_round)
        if this_round != ordered_round:
            generator = torch.Generator().manual_seed(seed + 1_000_003 * this_round)
            order, ordered_round = torch.randperm(len(pixels), generator=generator), this_round
        rows = order[place * batch_size : (place + 1) * batch_size]
        yield PairBatch(pixels[rows], tokens[rows])
        step += 1


def fit_contrastive(
    network: ClipNetwork,
    batches: Iterator[PairBatch],
    *,
    optimizer: Optimizer,
    num_steps: int,
    learning_rate: float = 1e-3,
    warmup: float = 0.05,
    cooldown: float = 0.0,
    objective: PairLoss = sigmoid_loss,
    max_grad_norm: float = 1.0,
    first_step: int = 0,
    report: Callable[[int, StepReport], None] = lambda step, seen: None,
) -> None:
    """Train `network` in place on `batches`, every row with weight 1, from `first_step` up to `num_steps`.

    `report(step, seen)` is called after each step; `step` counts the finished ones. ValueError if batches end early.
    """
    if not 0 <= first_step <= num_steps:
        raise ValueError(f"first_step must be in [0, {num_steps}], got {first_step}")
    network.train()
    for step in range(first_step, num_steps):
        batch = next(batches, None)
        if batch is None:
            raise ValueError(f"batches ended after {step - first_step} of {num_steps - first_step} steps")
        # The middle of the step: neither the first nor the last one has a learning rate of 0.
        factor = warmup_cosine((step + 0.5) / num_steps, warmup=warmup, cooldown=cooldown)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * factor
        seen = contrastive_step(
            network,
            batch,
            weights=torch.ones(len(batch.pixels), device=batch.pixels.device),
            optimizer=optimizer,
            objective=objective,
            max_grad_norm=max_grad_norm,
        )
        with torch.no_grad():
            network.log_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))
        report(step + 1, seen)
