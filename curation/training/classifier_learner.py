"""A classifier in training, and the fixed reference of the same build that it may be compared with.

n rows of this rank, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from curation.models.classifier import Classifier
from curation.models.clip import Precision
from curation.selector import Rows
from curation.training.flops import forward_flops
from curation.training.learner import RowFlops, autocast, check_finite
from curation.training.step import StepReport, check_weights, report_of, take_step, weighted_mean


@dataclass(frozen=True, kw_only=True)
class ClassifierLearner:
    """`network` is on its device and takes `images`, the column "features" or "pixels"; labels are int64 in [0, C)."""

    network: Classifier
    reference: Classifier | None = None
    images: str = "features"
    score_batch: int = 1024
    precision: Precision = "float32"

    @property
    def saved(self) -> nn.Module:
        """The whole classifier."""
        return self.network

    @property
    def inputs(self) -> tuple[str, ...]:
        """Images and labels."""
        return (self.images, "label")

    @property
    def lacks(self) -> frozenset[str]:
        """Embeddings, which no classifier has, and the reference's loss if there is no reference."""
        absent = {"image_embedding", "text_embedding", "reference_image_embedding", "reference_text_embedding"}
        return frozenset(absent | ({"reference_loss"} if self.reference is None else set()))

    def rows(self, block: Rows, needs: frozenset[str]) -> Rows:
        """Each row's cross-entropy under the learner and under the reference, if the method asks for it."""
        rows: Rows = {}
        if "learner_loss" in needs:
            rows["learner_loss"] = self._losses(self.network, block)
            check_finite(rows["learner_loss"], what="losses")
        if "reference_loss" in needs and self.reference is not None:
            rows["reference_loss"] = self._losses(self.reference, block)
        return rows

    @torch.no_grad()
    def _losses(self, network: Classifier, block: Rows) -> Tensor:
        device = self.network.head.weight.device
        losses = []
        for images, labels in zip(*(block[name].split(self.score_batch) for name in self.inputs), strict=True):
            with autocast(device, self.precision):
                logits = network(images.to(device))
            losses.append(F.cross_entropy(logits, labels.to(device), reduction="none"))
        return torch.cat(losses)

    def step(
        self, model: nn.Module, inputs: list[Tensor], *, weights: Tensor, optimizer: Optimizer, max_grad_norm: float
    ) -> StepReport:
        """A step on the weighted mean of the rows' cross-entropies."""
        images, labels = inputs
        check_weights(weights, len(labels))

        def backward() -> StepReport:
            with autocast(labels.device, self.precision):
                logits = model(images)
            losses = F.cross_entropy(logits, labels, reduction="none")
            weighted_mean(losses, weights).backward()
            return report_of(losses, weights, hits=(logits.argmax(dim=1) == labels).sum(), logit_scale=None)

        return take_step(backward, optimizer=optimizer, max_grad_norm=max_grad_norm)

    def reference_loss(self, selected: Rows) -> float | None:
        """Mean of the chosen rows' losses under the reference, where the method asked for them."""
        return selected["reference_loss"].mean().item() if "reference_loss" in selected else None

    def flops(self, block: Rows) -> RowFlops:
        """The whole classifier's."""
        first = block[self.images][:1]
        reference = 0.0 if self.reference is None else float(forward_flops(self.reference, first))
        return RowFlops(learner=float(forward_flops(self.network, first)), reference=reference)
