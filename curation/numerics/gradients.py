"""Per-sample gradients seen from one direction, without ever forming them.

The derivative of every row's loss along a direction v in weight space is one forward-mode pass (a JVP), whatever the
network; for the last linear layer under cross-entropy it is one matrix product. Grad-Mimic's score is minus that
derivative along the way to a reference's weights: how far a step on this row alone would go towards them.

Under cross-entropy the gradient of a row's loss by the head's weight is an outer product, (p - y) h^T. So its norm, its
product with any direction and the products of all pairs of rows come from the two factors, in n (C + F) memory.

n rows, F features that the head sees, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.func import jvp
from torch.nn import functional as F


def towards(weights: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], float]:
    """The unit direction from weights to reference, by name, and its length; all zeros if they are equal.

    ValueError if names or shapes differ.
    """
    if weights.keys() != reference.keys():
        raise ValueError(f"weights and reference differ in names: {sorted(weights.keys() ^ reference.keys())}")
    for name, value in weights.items():
        if value.shape != reference[name].shape:
            raise ValueError(f"{name} is {tuple(value.shape)}, in the reference {tuple(reference[name].shape)}")
    task = {name: reference[name].detach() - value.detach() for name, value in weights.items()}
    length = torch.stack([value.double().square().sum() for value in task.values()]).sum().sqrt().item()
    return {name: value / length if length else value for name, value in task.items()}, length


def head_projection(features_nF: Tensor, logits_nC: Tensor, labels_n: Tensor, direction_CF: Tensor) -> Tensor:
    """-d loss / d eps of the cross-entropy when the head's weight moves by eps * direction, (n,).

    (y - p) . (direction h): the gradient of row i is (p_i - y_i) h_i^T. grad_mimic.md, section 3 (derived).
    """
    moved_nC = features_nF @ direction_CF.T
    own_n = moved_nC.gather(1, labels_n[:, None])[:, 0]
    return own_n - (logits_nC.softmax(dim=1) * moved_nC).sum(dim=1)


def head_residual(logits_nC: Tensor, labels_n: Tensor) -> Tensor:
    """p - y, (n, C): the factor of a row's head gradient that is not what the head saw."""
    residual_nC = logits_nC.softmax(dim=1)
    residual_nC[torch.arange(len(labels_n), device=labels_n.device), labels_n] -= 1
    return residual_nC


def logits_and_way(
    seen_nF: Tensor, weight_CF: Tensor, bias_C: Tensor, way_CF: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Logits (n, C) float32, and what the head would say of the rows with the weights `way` and no bias, (n, C).

    One matrix product for both: a head is narrow and its input wide, so the time goes to reading the input once.
    """
    if way_CF is None:
        return F.linear(seen_nF, weight_CF, bias_C).float(), None
    classes = weight_CF.shape[0]
    both = F.linear(seen_nF, torch.cat([weight_CF, way_CF]), F.pad(bias_C, (0, classes))).float()
    return both[:, :classes], both[:, classes:]


def loss_and_residual(logits_nC: Tensor, labels_n: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropies (n,), and `head_residual` (n, C), of one softmax. Not to be differentiated."""
    residual_nC, own_n1 = logits_nC.log_softmax(dim=1), labels_n[:, None]
    losses_n = -residual_nC.gather(1, own_n1)[:, 0]
    return losses_n, residual_nC.exp_().scatter_add_(1, own_n1, residual_nC.new_full((), -1.0).expand(own_n1.shape))


def head_gradient(residual_nC: Tensor, input_nF: Tensor, weights_n: Tensor | None = None) -> Tensor:
    """The mean over rows of weight * head gradient, (C, F)."""
    weighted_nC = residual_nC if weights_n is None else residual_nC * weights_n[:, None]
    return weighted_nC.T @ input_nF / input_nF.shape[0]


def head_gradient_norms(residual_nC: Tensor, input_nF: Tensor) -> Tensor:
    """Frobenius norms (n,) of the rows' head gradients."""
    return residual_nC.norm(dim=1) * input_nF.norm(dim=1)


def head_gradient_products(residual_nC: Tensor, input_nF: Tensor, gradient_CF: Tensor) -> Tensor:
    """Inner products (n,) float32 of the rows' head gradients with one gradient.

    In float64: in float32 the last bits of a row hang on how many rows stand beside it, and by them a pool is cut.
    """
    seen_nC = input_nF.double() @ gradient_CF.double().T
    return (seen_nC * residual_nC.double()).sum(dim=1).float()


def head_gram(residual_nC: Tensor, input_nF: Tensor) -> Tensor:
    """Inner products (n, n) of the rows' head gradients with each other."""
    return (residual_nC @ residual_nC.T) * (input_nF @ input_nF.T)


def projection(
    losses_of: Callable[[dict[str, Tensor]], Tensor], weights: dict[str, Tensor], direction: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Losses (n,) at `weights`, and -d loss / d eps along `direction` (n,), by one forward-mode pass.

    `losses_of` is a function of the weights alone that torch.func can differentiate: attention must take the math
    kernel, for the fused ones have no forward derivative.
    """
    derived = jvp(losses_of, (weights,), (direction,))
    return derived[0], -derived[1]
