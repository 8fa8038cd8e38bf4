"""What a step needs of the model in training, whatever its objective: the columns it makes, its gradient, its cost.

Two satisfy it: image–text models (`contrastive_learner`) and classifiers (`classifier_learner`).

n rows of this rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from curation.models.clip import Precision
from curation.selector import Rows
from curation.training.collectives import ranks, sum_over_ranks
from curation.training.mimic import Alignment
from curation.training.step import NotFinite, StepReport

WeightScope = Literal["all", "mimic"]
"""Whose gradients a selection's weights multiply: every parameter's, or the mimic layer's."""

LEARNER_COLUMNS = frozenset(
    {"image_embedding", "text_embedding", "learner_loss", "mimic_score", "head_residual", "head_input"}
)
"""Columns that cost a forward pass of the learner for each row of the super-batch."""
REFERENCE_COLUMNS = frozenset({"reference_image_embedding", "reference_text_embedding"})


class RowFlops(NamedTuple):
    """Floating-point operations of one forward pass per row."""

    scoring: float
    """Of the learner, as it scores."""
    training: float
    """Of the learner, as it is trained: the mean, where rows are seen at two resolutions."""
    reference: float
    """Of a reference that runs online; 0 where its columns are stored."""


class Kept(NamedTuple):
    """A forward pass whose activations are kept, so that a step on all of its rows needs no other."""

    rows: Rows
    """The columns that come of it."""
    step: Callable[[Tensor, Optimizer, float], StepReport]
    """Of weights (n,), an optimiser and the longest gradient; once."""


class Learner(Protocol):
    """A model in training. All ranks call its methods together."""

    @property
    def network(self) -> nn.Module:
        """What is trained, on its device."""
        ...

    @property
    def saved(self) -> nn.Module:
        """The module whose state is the checkpoint's."""
        ...

    @property
    def inputs(self) -> tuple[str, ...]:
        """Columns of a block that a training pass takes: those that travel when a row changes rank."""
        ...

    @property
    def low_images(self) -> str | None:
        """The column of images that are seen at low resolution: in scoring, and of some rows in training; or None."""
        ...

    @property
    def lacks(self) -> frozenset[str]:
        """Names of columns that it cannot make, because there is no reference."""
        ...

    def rows(self, block: Rows, needs: frozenset[str]) -> Rows:
        """The columns and run values of `needs` that come from learner and reference, and what the log says of rows."""
        ...

    def keep(self, model: nn.Module, block: Rows, needs: frozenset[str]) -> Kept | None:
        """As `rows`, where a step on the whole block follows; None if it cannot be had of one forward pass."""
        ...

    def alignment(self, block: Rows) -> Alignment | None:
        """How well the reference's mimic layer fits, on this rank's rows; None if no reference has one.

        ValueError if it has another shape.
        """
        ...

    def step(
        self, model: nn.Module, inputs: list[Tensor], *, weights: Tensor, optimizer: Optimizer, max_grad_norm: float
    ) -> StepReport:
        """A step on n rows, `inputs` as in a SubBatch; `model` is `network`, or wraps it.

        NotFinite before anything has changed.
        """
        ...

    def reference_loss(self, selected: Rows) -> float | None:
        """Mean loss of the chosen rows under the reference, as a batch of their own; None if it cannot be told."""
        ...

    def flops(self, block: Rows, needs: frozenset[str]) -> RowFlops:
        """What a row costs when a method needs these columns."""
        ...


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager:
    """bfloat16 where the precision says so; nothing otherwise."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def check_finite(values_n: Tensor, *, what: str) -> None:
    """NotFinite on every rank if any row's values are not finite: the run has diverged. Collective."""
    bad = ~torch.isfinite(values_n).reshape(len(values_n), -1).all(dim=1)
    if num_bad := int(sum_over_ranks(bad.sum())):
        rows = bad.nonzero().flatten().tolist()
        raise NotFinite(
            f"the learner's {what} are not finite in rows {rows[:10]} of rank {ranks().rank}, "
            f"and in {num_bad} of all ranks",
            rows=rows,
        )
