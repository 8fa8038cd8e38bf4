"""Orthogonal matching pursuit in a space that is known by inner products alone.

Pati et al. 1993; with weights that are not negative, as Killamsetty et al. 2021 (arXiv:2103.00123, Algorithm 2) match
gradients. A target is approached by a weighted sum of rows: the row that agrees best with what is left of the target
joins the support, and all weights are fitted anew. Rows may be of any width, for only their n x n products are needed;
a step costs a solve of the support's size, so K rows cost K^4 / 4 at worst and are meant for batches.

n rows, K of them on the support.
"""

from __future__ import annotations

import torch
from torch import Tensor


def matching_pursuit(
    gram_nn: Tensor, products_n: Tensor, *, num_rows: int, ridge: float = 0.0, tolerance: float = 0.0
) -> Tensor:
    """Weights (n,) >= 0 with at most `num_rows` that are not 0: sum_i weight_i row_i is close to the target.

    `gram_nn` are the rows' products with each other, `products_n` those with the target, in float64. `ridge` is added
    to the support's diagonal: it keeps one row from carrying everything. It ends early where no row that is left agrees
    with what is left of the target by more than `tolerance`.
    """
    if gram_nn.shape != (len(products_n), len(products_n)):
        raise ValueError(f"gram must be ({len(products_n)}, {len(products_n)}), got {tuple(gram_nn.shape)}")
    gram_nn, products_n = gram_nn.double(), products_n.double()
    weights_n = torch.zeros_like(products_n)
    support: list[int] = []
    while len(support) < num_rows:
        left_n = products_n - gram_nn @ weights_n
        left_n[support] = -torch.inf
        best = int(left_n.argmax())
        if not left_n[best] > tolerance:
            break
        support.append(best)
        weights_n = _fitted(gram_nn, products_n, support, ridge=ridge)
    return weights_n


def _fitted(gram_nn: Tensor, products_n: Tensor, support: list[int], *, ridge: float) -> Tensor:
    """Ridge weights of the support; what comes out negative is taken out, until nothing does."""
    weights_n = torch.zeros_like(products_n)
    rows = torch.tensor(support)
    while len(rows):
        system = gram_nn[rows[:, None], rows] + ridge * torch.eye(len(rows), dtype=gram_nn.dtype)
        if ridge > 0:
            fitted = torch.linalg.solve(system, products_n[rows])
        else:  # least squares, for rows that repeat make the system singular
            fitted = torch.linalg.lstsq(system, products_n[rows, None], driver="gelsd").solution[:, 0]
        if bool((fitted >= 0).all()):
            weights_n[rows] = fitted
            break
        rows = rows[fitted >= 0]
    return weights_n
