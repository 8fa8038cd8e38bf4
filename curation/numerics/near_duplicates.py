"""How alike a row is to the most alike of those before it: what one pass must know to drop later copies.

Rows come in the order of preference. A row falls at a threshold if its highest cosine to any earlier row reaches it, so
a single pass of N^2 D / 2 multiply-adds serves every threshold, and a lower threshold never brings a row back.

N rows, D embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def highest_cosine_before(unit_ND: Tensor, *, block_rows: int = 1024) -> Tensor:
    """Each row's highest cosine to a row before it, (N,) float32; -1 for the first, which has none.

    Rows are float32 of unit norm, so even equal rows may be 1e-6 short of a cosine of 1. Memory block_rows x N float32.
    """
    highest_N = torch.full((len(unit_ND),), -1.0, device=unit_ND.device)
    for first in range(1, len(unit_ND), block_rows):
        last = min(first + block_rows, len(unit_ND))
        cosines_BM = unit_ND[first:last] @ unit_ND[: last - 1].T
        # Row first + i may look at the rows before it only: columns 0 to first + i - 1.
        later = torch.ones_like(cosines_BM, dtype=torch.bool).triu_(diagonal=first)
        highest_N[first:last] = cosines_BM.masked_fill_(later, -1.0).amax(dim=1)
    return highest_N.clamp_(-1.0, 1.0)
