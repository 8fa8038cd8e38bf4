"""GraNd: keep the rows whose gradient is longest, for those move the weights most.

Source: Paul et al. 2021 (arXiv:2107.07075), Eq. 3: the score of a row is the expected norm of its loss's gradient early
in training, over initialisations. Under label noise the longest gradients are the wrong labels'; it is a rival here.

Deviations. The gradient is that of the head's weight, in closed form from what the head saw (the paper's is that of the
whole network, and finds the last layer's alike). Online it is scored by the learner as it is, in place of the mean over
initialisations; offline, a column that is such a mean may take its place.

n rows, C classes, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Generator, Tensor

from curation.methods._pool_order import select_by_sort_key
from curation.numerics.gradients import head_gradient_norms
from curation.selector import Rows, Selection, check_needs


@dataclass(frozen=True)
class Grand:
    """The rows with the longest head gradients, each with weight 1."""

    needs = frozenset({"head_residual", "head_input", "uid"})
    fixed_size = True
    unbiased = False

    @property
    def records(self) -> Literal["score"]:
        """The ledger keeps the norm, whose mean over steps is the paper's expectation."""
        return "score"

    def score(self, rows: Rows, progress: float) -> Tensor:
        """The gradient's norm (n,) float32."""
        check_needs(self, rows)
        return head_gradient_norms(rows["head_residual"].float(), rows["head_input"].float())

    def sort_key(self, rows: Rows, progress: float, seed: int) -> Tensor:
        """The score."""
        return self.score(rows, progress)

    def select(self, rows: Rows, keep: int | None, progress: float, rng: Generator) -> Selection:
        """The `keep` rows of the highest score."""
        return select_by_sort_key(self, rows, keep=keep, progress=progress, rng=rng)
