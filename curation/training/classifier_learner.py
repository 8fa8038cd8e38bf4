"""A classifier in training, and the fixed reference of the same build that it may be compared with.

For Grad-Mimic the reference is where the weights should go: each row's mimic score is made here, in closed form where
the mimic layer is the head's weight, by one forward-mode pass for any other. The way there is computed anew at each
step: a stale one would point back once the weights have passed.

n rows of this rank, F features that the head sees, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from curation.models.classifier import Classifier
from curation.models.clip import Precision
from curation.numerics.gradients import head_projection, projection, towards
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
    mimic_layer: str = "head.weight"
    """Name of the parameter, or of the module, whose gradients are compared with the way to the reference's weights;
    empty for the whole network."""
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
        return frozenset(absent | ({"reference_loss", "mimic_score"} if self.reference is None else set()))

    def rows(self, block: Rows, needs: frozenset[str]) -> Rows:
        """Each row's cross-entropy under learner and reference, and its mimic score, if the method asks for them."""
        rows: Rows = {}
        if "learner_loss" in needs:
            rows["learner_loss"] = self._losses(self.network, block)
            check_finite(rows["learner_loss"], what="losses")
        if "reference_loss" in needs and self.reference is not None:
            rows["reference_loss"] = self._losses(self.reference, block)
        if "mimic_score" in needs:
            rows["mimic_score"] = self.mimic_scores(block)
            check_finite(rows["mimic_score"], what="mimic scores")
        return rows

    def mimic_scores(self, block: Rows) -> Tensor:
        """-d loss / d eps along the unit direction to the reference's weights, (n,) float32; 0 where they are reached.

        grad_mimic.md, section 3. ValueError if there is no such layer, or it has another shape in the reference.
        """
        assert self.reference is not None
        weights = self._layer(self.network)
        direction, _ = towards(weights, self._layer(self.reference))
        device = self.network.head.weight.device
        scores = []
        for images, labels in zip(*(block[name].split(self.score_batch) for name in self.inputs), strict=True):
            here = images.to(device), labels.to(device)
            if self.mimic_layer == "head.weight":
                scores.append(self._head_scores(*here, direction["head.weight"]))
            else:
                scores.append(self._layer_scores(*here, weights, direction))
        return torch.cat(scores).detach()

    @torch.no_grad()
    def _head_scores(self, images: Tensor, labels: Tensor, direction_CF: Tensor) -> Tensor:
        features = self.network.seen_by_head(images)
        return head_projection(features, self.network.head(features), labels, direction_CF)

    def _layer_scores(
        self, images: Tensor, labels: Tensor, weights: dict[str, Tensor], direction: dict[str, Tensor]
    ) -> Tensor:
        def losses_of(layer: dict[str, Tensor]) -> Tensor:
            logits = functional_call(self.network, layer, (images,))
            return F.cross_entropy(logits, labels, reduction="none")

        # The fused attention kernels have no forward derivative.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            return projection(losses_of, weights, direction)[1]

    def _layer(self, network: Classifier) -> dict[str, Tensor]:
        inside = f"{self.mimic_layer}." if self.mimic_layer else ""
        layer = {
            name: value.detach()
            for name, value in network.named_parameters()
            if name == self.mimic_layer or name.startswith(inside)
        }
        if not layer:
            raise ValueError(f"no parameter is in mimic_layer {self.mimic_layer!r} of {type(network.tower).__name__}")
        return layer

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

    def flops(self, block: Rows, needs: frozenset[str]) -> RowFlops:
        """The whole classifier's; the reference's only where its loss is needed: a mimic score takes its weights."""
        first = block[self.images][:1]
        is_run = self.reference is not None and "reference_loss" in needs
        return RowFlops(
            learner=float(forward_flops(self.network, first)),
            reference=float(forward_flops(self.reference, first)) if is_run and self.reference else 0.0,
        )
