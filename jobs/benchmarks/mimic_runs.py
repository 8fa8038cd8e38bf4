"""One linear probe under label noise, its rows weighed by Grad-Mimic, a rival or a control, and what was logged of it.

All arms of a seed share the split, the labels, the initial head and the order of the batches. A step is the package's
own closed form: two matrix products give logits and scores, a third the weighted gradient. AdamW, batches of 256, no
schedule. The authors' 32 rows and learning rate 1e-4 are for a fine-tuned ViT; batch and rate here are the same for all
arms and were not searched.

n rows of a batch, N rows of the pool, F features, C classes, E epochs, A arms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from curation.methods import load_selector
from curation.methods._softmax import softmax_weights
from curation.numerics.gradients import head_gradient, head_projection, head_residual, towards
from curation.selector import Rows

BATCH, LEARNING_RATE, WEIGHT_DECAY = 256, 1e-3, 1e-5
SMALL_POOL, SMALL_BATCH = 4000, 64
"""A pool of fewer rows is cut into smaller batches."""


class Split(NamedTuple):
    """Features and labels of one part of a set."""

    features_NF: Tensor
    labels_N: Tensor


class Parts(NamedTuple):
    """Disjoint parts of a set: the pool, what the reference learns, what chooses the temperature, what is reported."""

    pool: Split
    reference: Split
    validation: Split
    test: Split
    human_N: Tensor
    """People's labels of the pool."""


class Head(NamedTuple):
    """A linear head."""

    weight_CF: Tensor
    bias_C: Tensor

    def accuracy(self, on: Split) -> float:
        """Share of rows whose class is told right."""
        return (self.logits(on.features_NF).argmax(dim=1) == on.labels_N).float().mean().item()

    def logits(self, features_nF: Tensor) -> Tensor:
        """(n, C)."""
        return F.linear(features_nF, *self)


class Step(NamedTuple):
    """What a way to weigh rows may look at."""

    rows: Tensor
    """Places of the batch in the pool (n,)."""
    features_nF: Tensor
    logits_nC: Tensor
    labels_n: Tensor
    head: Head
    rng: Generator


Weigh = Callable[[Step], tuple[Tensor, Tensor | None]]
"""Weights (n,) of mean 1, and the scores that the log keeps, if there are any."""


class Run(NamedTuple):
    """A probe and its log."""

    head: Head
    scores_EN: np.ndarray
    weights_EN: np.ndarray


class Arm(NamedTuple):
    """How a probe weighs its rows. `scope` "mimic" weighs the gradient of the head's weight, "all" the bias's too."""

    weigh: Weigh
    scope: str = "mimic"


def probes(pool: Split, arms: Sequence[Arm], *, num_classes: int, epochs: int, seed: int) -> list[Run]:
    """Train a head for each arm on the pool, all of them on each batch: A heads are one stack of matrices."""
    batch = BATCH if len(pool.labels_N) >= SMALL_POOL else SMALL_BATCH
    rng = torch.Generator().manual_seed(seed)
    own_rngs = [torch.Generator().manual_seed(1_000_000 + 1000 * seed + index) for index in range(len(arms))]
    num_rows, width = pool.features_NF.shape
    begun_CF = (torch.rand(num_classes, width, generator=rng) * 2 - 1) / width**0.5
    weight = nn.Parameter(begun_CF.repeat(len(arms), 1, 1))
    bias = nn.Parameter(torch.zeros(len(arms), num_classes))
    optimizer = torch.optim.AdamW([weight, bias], lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    logged = np.full((2, len(arms), epochs, num_rows), np.nan, np.float32)
    heads = [Head(weight.detach()[index], bias.detach()[index]) for index in range(len(arms))]
    with torch.no_grad():
        for epoch in range(epochs):
            for rows in torch.randperm(num_rows, generator=rng).split(batch):
                features_nF, labels_n = pool.features_NF[rows], pool.labels_N[rows]
                logits_nAC = F.linear(features_nF, weight.flatten(0, 1), bias.flatten()).unflatten(1, bias.shape)
                weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
                for index, (arm, head, own_rng) in enumerate(zip(arms, heads, own_rngs, strict=True)):
                    logits_nC = logits_nAC[:, index]
                    weights_n, scores_n = arm.weigh(Step(rows, features_nF, logits_nC, labels_n, head, own_rng))
                    residual_nC = head_residual(logits_nC, labels_n)
                    weight.grad[index] = head_gradient(residual_nC, features_nF, weights_n)
                    bias_nC = residual_nC * weights_n[:, None] if arm.scope == "all" else residual_nC
                    bias.grad[index] = bias_nC.mean(dim=0)
                    if scores_n is not None:
                        logged[0, index, epoch, rows] = scores_n.numpy()
                        logged[1, index, epoch, rows] = weights_n.numpy()
                optimizer.step()
    return [Run(head, *logged[:, index]) for index, head in enumerate(heads)]


def probe(pool: Split, weigh: Weigh, *, num_classes: int, epochs: int, seed: int) -> Run:
    """One arm alone."""
    [run] = probes(pool, [Arm(weigh)], num_classes=num_classes, epochs=epochs, seed=seed)
    return run


def plain(step: Step) -> tuple[Tensor, Tensor | None]:
    """All rows alike."""
    return torch.ones(len(step.rows)), None


def mimic(reference: Head, temperature: float) -> Weigh:
    """Grad-Mimic's weights on the way to a reference's weights."""

    def weigh(step: Step) -> tuple[Tensor, Tensor | None]:
        direction, _ = towards({"w": step.head.weight_CF}, {"w": reference.weight_CF})
        scores_n = head_projection(step.features_nF, step.logits_nC, step.labels_n, direction["w"])
        return softmax_weights(scores_n, temperature), scores_n

    return weigh


def rho(reference: Head, pool: Split, temperature: float) -> Weigh:
    """Softmax of the reducible loss."""
    reference_N = F.cross_entropy(reference.logits(pool.features_NF), pool.labels_N, reduction="none")

    def weigh(step: Step) -> tuple[Tensor, Tensor | None]:
        scores_n = F.cross_entropy(step.logits_nC, step.labels_n, reduction="none") - reference_N[step.rows]
        return softmax_weights(scores_n, temperature), scores_n

    return weigh


def by_selector(name: str, *, share: float = 1.0, compared_with: Split | None = None, **fields: Any) -> Weigh:
    """A selector's rows and weights; it may keep a `share` of the batch, and compare with a random batch of a split."""
    selector = load_selector(name, **fields)

    def weigh(step: Step) -> tuple[Tensor, Tensor | None]:
        rows: Rows = {
            "head_residual": head_residual(step.logits_nC, step.labels_n),
            "head_input": step.features_nF,
            "uid": torch.stack([step.rows, step.rows], dim=1),
        }
        if compared_with is not None:
            picked = torch.randint(len(compared_with.labels_N), (len(step.rows),), generator=step.rng)
            features_nF, labels_n = compared_with.features_NF[picked], compared_with.labels_N[picked]
            residual_nC = head_residual(step.head.logits(features_nF), labels_n)
            rows["comparison_gradient"] = head_gradient(residual_nC, features_nF)
        n = len(step.rows)
        keep = max(1, round(share * n))
        chosen = selector.select(rows, keep, 0.5, step.rng)
        weights_n = torch.zeros(n)
        weights_n[chosen.indices] = chosen.weights * (n / keep)
        # Only what compares with clean rows has a score that is meant to tell them.
        return weights_n, None if compared_with is None else selector.score(rows, 0.5)

    return weigh


def symmetric_noise(labels_N: Tensor, *, share: float, num_classes: int, rng: Generator) -> Tensor:
    """Labels of which exactly int(share * N) are another class's, each other class alike."""
    noisy_N = labels_N.clone()
    moved = torch.randperm(len(labels_N), generator=rng)[: int(share * len(labels_N))]
    shift = torch.randint(1, num_classes, (len(moved),), generator=rng)
    noisy_N[moved] = (noisy_N[moved] + shift) % num_classes
    return noisy_N


def auc(scores_N: np.ndarray, is_clean_N: np.ndarray) -> float:
    """Probability that a clean row scores above a mislabelled one; ties count half."""
    _, inverse, counts = np.unique(scores_N, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    clean, wrong = int(is_clean_N.sum()), int((~is_clean_N).sum())
    return float((ranks[is_clean_N].sum() - clean * (clean + 1) / 2) / (clean * wrong))


def f1(found_N: np.ndarray, true_N: np.ndarray) -> float:
    """Harmonic mean of precision and recall; 0 if nothing true is found."""
    hits = float((found_N & true_N).sum())
    return 2 * hits / float(found_N.sum() + true_N.sum()) if hits else 0.0
