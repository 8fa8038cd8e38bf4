"""Linear probe: how well a linear classifier on frozen features tells the classes apart.

Radford et al. 2021 (arXiv:2103.00020), Sec. 3.2: multinomial logistic regression by L-BFGS, started at 0, with a
penalty on the weights and none on the bias. Deviation: features are brought to mean 0 and standard deviation 1 by the
training set's, so that one penalty serves any scale; it is an argument, to be chosen on a validation set.

N training rows, M test rows, F features, C classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_ITERATIONS = 1000


class Probe(NamedTuple):
    """Logits are (features - mean) / std @ weight + bias; weight (F, C), the others (F,), (F,), (C,); float64."""

    mean_F: Tensor
    std_F: Tensor
    weight_FC: Tensor
    bias_C: Tensor

    def logits(self, features_MF: Tensor) -> Tensor:
        """(M, C) float64."""
        return ((features_MF.double() - self.mean_F) / self.std_F) @ self.weight_FC + self.bias_C


def fit_probe(features_NF: Tensor, labels: Tensor, *, num_classes: int, penalty: float = 1e-3) -> Probe:
    """The minimum of mean cross-entropy + penalty / 2 * |weight|^2; labels (N,) int64. A feature that is constant
    counts as 0.

    ValueError if features are not finite (N, F), labels not in [0, C), or the penalty is not above 0, without which
    classes that can be parted have no minimum.
    """
    if features_NF.ndim != 2 or not len(features_NF) or not torch.isfinite(features_NF).all():
        raise ValueError(f"features must be finite (N, F) with N >= 1, got {tuple(features_NF.shape)}")
    if labels.shape != (len(features_NF),) or labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 ({len(features_NF)},), got {labels.dtype} {tuple(labels.shape)}")
    if not bool(((labels >= 0) & (labels < num_classes)).all()):
        raise ValueError(f"labels must be in [0, {num_classes}), got {int(labels.min())} to {int(labels.max())}")
    if not penalty > 0:
        raise ValueError(f"penalty must be above 0, got {penalty}")
    features_NF = features_NF.double()
    mean_F, std_F = features_NF.mean(dim=0), features_NF.std(dim=0, correction=0)
    std_F = torch.where(std_F > 1e-12 * mean_F.abs(), std_F, torch.inf)
    scaled_NF = (features_NF - mean_F) / std_F
    weight_FC = torch.zeros(scaled_NF.shape[1], num_classes, dtype=torch.float64, device=scaled_NF.device)
    bias_C = torch.zeros(num_classes, dtype=torch.float64, device=scaled_NF.device)
    parameters = [weight_FC.requires_grad_(), bias_C.requires_grad_()]
    optimiser = torch.optim.LBFGS(
        parameters, max_iter=MAX_ITERATIONS, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(scaled_NF @ weight_FC + bias_C, labels) + penalty / 2 * weight_FC.square().sum()
        value.backward()
        return value

    optimiser.step(loss)  # pyright: ignore[reportArgumentType]
    return Probe(mean_F, std_F, weight_FC.detach(), bias_C.detach())


def probe_accuracy(probe: Probe, features_MF: Tensor, labels: Tensor) -> float:
    """Share in [0, 1] of the rows whose class has the highest logit; of equal ones the first. ValueError if M is 0."""
    if not len(labels) or len(labels) != len(features_MF):
        raise ValueError(f"features and labels must be of one length above 0, got {len(features_MF)}, {len(labels)}")
    return (probe.logits(features_MF).argmax(dim=1) == labels).double().mean().item()
