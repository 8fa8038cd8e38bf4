"""What selectors share that look at all rows at once: unit rows of a column, in an order that the rows' uids give.

Greedy rules part equal scores by place, and a matrix product may round a row differently at another place. So the rows
are brought into the order of a hash of their uid before anything is computed: the same samples are chosen whatever
the order in which they came.

n or N rows, D embedding, K chosen.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from curation.methods._pool_order import uid_column_words
from curation.numerics.sampling import hash_words, tie_hash
from curation.selector import Rows, Selection, uniform_weights


def unit_rows(rows: Rows, column: str) -> Tensor:
    """A column of vectors (N, D), float32 of unit norm. ValueError if it is none, or a row is zero or not finite."""
    vectors_ND = rows[column]
    if vectors_ND.ndim != 2:
        raise ValueError(f"column {column!r} must hold vectors (n, D), got {tuple(vectors_ND.shape)}")
    norms = torch.linalg.vector_norm(vectors_ND, dim=1, dtype=torch.float32)
    wrong = (~(torch.isfinite(norms) & (norms > 0))).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(f"column {column!r} must be finite and not zero, row {wrong[0]} has norm {norms[wrong[0]]}")
    return F.normalize(vectors_ND.float(), dim=1)


def canonical_order(rows: Rows) -> Tensor:
    """Places (n,) int64 of the rows in the order of the hash of their uid, then of the uid itself."""
    words_N2 = uid_column_words(rows["uid"])
    order = np.lexsort((words_N2[:, 1], words_N2[:, 0], tie_hash(words_N2)))
    return torch.from_numpy(order).to(rows["uid"].device)


def random_place(rows: Rows, rng: Generator) -> int:
    """A row drawn evenly, whatever their order: the one whose uid has the highest hash under a seed from `rng`."""
    seed = int(torch.randint(2**63 - 1, (), generator=rng, device=rng.device))
    return int(hash_words(uid_column_words(rows["uid"]), seed).argmax())


def chosen_rows(order: Tensor, chosen_K: Tensor) -> Selection:
    """The selection of the rows at `chosen_K` (K,) of the order, weight 1 each."""
    return Selection(indices=order[chosen_K], weights=uniform_weights(len(chosen_K)).to(order.device))
