"""Per-sample gradients seen from one direction, without ever forming them.

The derivative of every row's loss along a direction v in weight space is one forward-mode pass (a JVP), whatever the
network; for the last linear layer under cross-entropy it is one matrix product. Grad-Mimic's score is minus that
derivative along the way to a reference's weights: how far a step on this row alone would go towards them.

n rows, F features that the head sees, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.func import jvp


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


def projection(
    losses_of: Callable[[dict[str, Tensor]], Tensor], weights: dict[str, Tensor], direction: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Losses (n,) at `weights`, and -d loss / d eps along `direction` (n,), by one forward-mode pass.

    `losses_of` is a function of the weights alone that torch.func can differentiate: attention must take the math
    kernel, for the fused ones have no forward derivative.
    """
    derived = jvp(losses_of, (weights,), (direction,))
    return derived[0], -derived[1]
