"""A classifier in training, and the fixed reference of the same build that it may be compared with.

For Grad-Mimic the reference is where the weights should go: each row's mimic score is made here, in closed form where
the mimic layer is the head's weight, by one forward-mode pass for any other. The way there is computed anew at each
step: a stale one would point back once the weights have passed. Where all rows that are scored are trained on, what the
head saw and said is kept from the scoring pass. If nothing but a head is trained, a step is then two matrix products
without automatic differentiation: one gives the logits and the way to the reference, the other the gradient.

n rows of this rank, F features that the head sees, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from curation.models.classifier import Classifier
from curation.models.clip import Precision
from curation.numerics.gradients import (
    head_gradient,
    head_projection,
    head_residual,
    logits_and_way,
    loss_and_residual,
    projection,
    towards,
)
from curation.selector import Rows
from curation.training.flops import forward_flops, tangent_flops
from curation.training.learner import Kept, RowFlops, WeightScope, autocast, check_finite
from curation.training.mimic import Alignment, check_fits, cosine_of, layer_of, replaced
from curation.training.step import (
    StepReport,
    backward_weighted,
    check_weights,
    mean_over_ranks,
    report_of,
    take_step,
    weighted_mean,
)

HEAD = "head.weight"
OF_THE_HEAD = frozenset({"learner_loss", "mimic_score", "head_residual", "head_input"})
"""Columns that what the head saw and said is enough for, if the mimic layer is the head's weight."""


@dataclass(frozen=True, kw_only=True)
class ClassifierLearner:
    """`network` is on its device and takes `images`, the column "features" or "pixels"; labels are int64 in [0, C)."""

    network: Classifier
    reference: Classifier | None = None
    images: str = "features"
    mimic_layer: str = HEAD
    """Name of the parameter, or of the module, whose gradients are compared with the way to the reference's weights;
    empty for the whole network."""
    weight_scope: WeightScope = "all"
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
    def low_images(self) -> None:
        """A classifier sees its images at one resolution."""

    @property
    def lacks(self) -> frozenset[str]:
        """Embeddings, which no classifier has, and the reference's loss if there is no reference."""
        absent = {"image_embedding", "text_embedding", "reference_image_embedding", "reference_text_embedding"}
        return frozenset(absent | ({"reference_loss", "mimic_score"} if self.reference is None else set()))

    def rows(self, block: Rows, needs: frozenset[str]) -> Rows:
        """Each row's cross-entropy under learner and reference, its mimic score, the factors of its head gradient."""
        made: list[Rows] = []
        if self._seen_plainly(needs):
            direction = self._direction() if "mimic_score" in needs else {}
            with torch.no_grad(), autocast(self._device, self.precision):
                for images, labels in self._batches(block):
                    seen = self.network.seen_by_head(images)
                    logits = self.network.head(seen).float()
                    losses = F.cross_entropy(logits, labels, reduction="none")
                    made.append(self._of_the_head(seen, logits, losses, labels, direction, needs))
        rows = {name: torch.cat([part[name] for part in made]) for name in (made[0] if made else {})}
        if self._is_moved(needs):
            rows["mimic_score"] = self.mimic_scores(block)
        return self._checked(rows | self._reference_rows(block, needs))

    def keep(self, model: nn.Module, block: Rows, needs: frozenset[str]) -> Kept | None:
        """The columns and the step of one forward pass; None if the mimic layer is another than the head's weight."""
        if not needs & OF_THE_HEAD or self._is_moved(needs):
            return None
        images, labels = (block[name].to(self._device) for name in self.inputs)
        if next(self.network.tower.parameters(), None) is None:
            return self._keep_head(block, images, labels, needs)
        with autocast(self._device, self.precision):
            logits, seen = model(images, with_seen=True)
        losses = F.cross_entropy(logits, labels, reduction="none")
        direction = self._direction() if "mimic_score" in needs else {}
        with torch.no_grad():
            rows = self._of_the_head(seen.detach(), logits.detach(), losses.detach(), labels, direction, needs)
        rows = self._checked(rows | self._reference_rows(block, needs))

        def step(weights: Tensor, optimizer: Optimizer, max_grad_norm: float) -> StepReport:
            check_weights(weights, len(labels))
            return take_step(
                lambda: self._backward(losses, logits, labels, weights),
                optimizer=optimizer,
                max_grad_norm=max_grad_norm,
            )

        return Kept(rows, step)

    @torch.no_grad()
    def _keep_head(self, block: Rows, images: Tensor, labels: Tensor, needs: frozenset[str]) -> Kept:
        """As `keep`, where the head's are the only parameters: the gradient is written out."""
        head, task_CF = self.network.head, None
        if "mimic_score" in needs:
            assert self.reference is not None
            if self.reference.head.weight.shape != head.weight.shape:
                check_fits({HEAD: head.weight}, {HEAD: self.reference.head.weight})
            task_CF = self.reference.head.weight - head.weight
        with autocast(self._device, self.precision):
            seen_nF = self.network.seen_by_head(images)
            logits_nC, moved_nC = logits_and_way(seen_nF, head.weight, head.bias, task_CF)
        losses_n, residual_nC = loss_and_residual(logits_nC, labels)
        rows: Rows = {"learner_loss": losses_n, "head_residual": residual_nC, "head_input": seen_nF}
        rows = {name: value for name, value in rows.items() if name in needs}
        if task_CF is not None and moved_nC is not None:
            length = task_CF.norm().clamp_min(torch.finfo(torch.float32).tiny)
            rows["mimic_score"] = -(residual_nC * moved_nC).sum(dim=1) / length
        rows = self._checked(rows | self._reference_rows(block, needs))

        @torch.no_grad()
        def backward(weights_n: Tensor) -> StepReport:
            weighted_mean(losses_n, weights_n)
            weighted_nC = residual_nC * weights_n[:, None]
            of_bias_nC = weighted_nC if self.weight_scope == "all" else residual_nC
            head.weight.grad = mean_over_ranks(head_gradient(weighted_nC, seen_nF.float()))
            head.bias.grad = mean_over_ranks(of_bias_nC.mean(dim=0))
            hits = (logits_nC.argmax(dim=1) == labels).sum()
            return report_of(losses_n, weights_n, hits=hits, logit_scale=None)

        def step(weights: Tensor, optimizer: Optimizer, max_grad_norm: float) -> StepReport:
            check_weights(weights, len(labels))
            return take_step(lambda: backward(weights), optimizer=optimizer, max_grad_norm=max_grad_norm)

        return Kept(rows, step)

    def _of_the_head(
        self,
        seen_nF: Tensor,
        logits_nC: Tensor,
        losses: Tensor,
        labels: Tensor,
        direction: dict[str, Tensor],
        needs: frozenset[str],
    ) -> Rows:
        rows: Rows = {}
        if "learner_loss" in needs:
            rows["learner_loss"] = losses
        if HEAD in direction and self.mimic_layer == HEAD:
            rows["mimic_score"] = head_projection(seen_nF.float(), logits_nC, labels, direction[HEAD])
        if "head_residual" in needs:
            rows["head_residual"] = head_residual(logits_nC, labels)
        if "head_input" in needs:
            rows["head_input"] = seen_nF.float()
        return rows

    def _is_moved(self, needs: frozenset[str]) -> bool:
        """The mimic score takes a pass with tangents, for its layer is another than the head's weight."""
        return "mimic_score" in needs and self.mimic_layer != HEAD

    def _seen_plainly(self, needs: frozenset[str]) -> bool:
        """A column comes of a plain pass and the head."""
        return bool(needs & (OF_THE_HEAD - {"mimic_score"} if self._is_moved(needs) else OF_THE_HEAD))

    def _checked(self, rows: Rows) -> Rows:
        for name, what in (("learner_loss", "losses"), ("mimic_score", "mimic scores")):
            if name in rows:
                check_finite(rows[name], what=what)
        return rows

    def _reference_rows(self, block: Rows, needs: frozenset[str]) -> Rows:
        if "reference_loss" not in needs or self.reference is None:
            return {}
        losses = []
        with torch.no_grad(), autocast(self._device, self.precision):
            for images, labels in self._batches(block):
                losses.append(F.cross_entropy(self.reference(images), labels, reduction="none"))
        return {"reference_loss": torch.cat(losses)}

    def mimic_scores(self, block: Rows) -> Tensor:
        """-d loss / d eps along the unit direction to the reference's weights, (n,) float32; 0 where they are reached.

        By one forward-mode pass; grad_mimic.md, section 3. ValueError if there is no such layer, or it has another
        shape in the reference.
        """
        weights = {name: value.detach() for name, value in layer_of(self.network, self.mimic_layer).items()}
        direction = self._direction()
        scores = []
        # The fused attention kernels have no forward derivative.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            for images, labels in self._batches(block):

                def losses_of(layer: dict[str, Tensor], images: Tensor = images, labels: Tensor = labels) -> Tensor:
                    logits = functional_call(self.network, layer, (images,))
                    return F.cross_entropy(logits, labels, reduction="none")

                scores.append(projection(losses_of, weights, direction)[1])
        return torch.cat(scores)

    @torch.no_grad()
    def mean_head_gradient(self, images: Tensor, labels: Tensor) -> Tensor:
        """The mean of the rows' gradients of the head's weight, (C, F), at the weights as they are."""
        total = torch.zeros_like(self.network.head.weight)
        for some, of_some in self._batches({self.images: images, "label": labels}):
            with autocast(self._device, self.precision):
                seen = self.network.seen_by_head(some)
                logits = self.network.head(seen).float()
            total += len(of_some) * head_gradient(head_residual(logits, of_some), seen.float())
        return total / len(labels)

    def alignment(self, block: Rows) -> Alignment | None:
        """By the accuracy of labels, which may be noisy, on the first `score_batch` rows."""
        if self.reference is None:
            return None
        layer, reference = layer_of(self.network, self.mimic_layer), layer_of(self.reference, self.mimic_layer)
        check_fits(layer, reference)
        images, labels = next(self._batches(block))

        @torch.no_grad()
        def accuracy(network: Classifier) -> float:
            return (network(images).argmax(dim=1) == labels).float().mean().item()

        with replaced(layer, reference):
            swapped = accuracy(self.network)
        return Alignment(
            learner=accuracy(self.network),
            reference=accuracy(self.reference),
            swapped=swapped,
            chance=1 / self.network.head.out_features,
            cosine=cosine_of(layer, reference),
            num_rows=len(labels),
            is_whole=not self.mimic_layer,
        )

    def _direction(self) -> dict[str, Tensor]:
        assert self.reference is not None
        layer, reference = layer_of(self.network, self.mimic_layer), layer_of(self.reference, self.mimic_layer)
        return towards(layer, reference)[0]

    def _batches(self, block: Rows) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = (block[name].split(self.score_batch) for name in self.inputs)
        return ((one.to(self._device), other.to(self._device)) for one, other in zip(images, labels, strict=True))

    @property
    def _device(self) -> torch.device:
        return self.network.head.weight.device

    def step(
        self, model: nn.Module, inputs: list[Tensor], *, weights: Tensor, optimizer: Optimizer, max_grad_norm: float
    ) -> StepReport:
        """A step on the weighted mean of the rows' cross-entropies."""
        images, labels = inputs
        check_weights(weights, len(labels))

        def backward() -> StepReport:
            with autocast(labels.device, self.precision):
                logits = model(images)
            return self._backward(F.cross_entropy(logits, labels, reduction="none"), logits, labels, weights)

        return take_step(backward, optimizer=optimizer, max_grad_norm=max_grad_norm)

    def _backward(self, losses: Tensor, logits: Tensor, labels: Tensor, weights: Tensor) -> StepReport:
        weighted = None if self.weight_scope == "all" else list(layer_of(self.network, self.mimic_layer).values())
        backward_weighted(losses, weights, weighted=weighted)
        return report_of(losses, weights, hits=(logits.argmax(dim=1) == labels).sum(), logit_scale=None)

    def reference_loss(self, selected: Rows) -> float | None:
        """Mean of the chosen rows' losses under the reference, where the method asked for them."""
        return selected["reference_loss"].mean().item() if "reference_loss" in selected else None

    def flops(self, block: Rows, needs: frozenset[str]) -> RowFlops:
        """The whole classifier's, with tangents where a mimic score takes a pass of its own; the reference's only
        where its loss is needed: a mimic score takes its weights."""
        first = block[self.images][:1]
        is_run = self.reference is not None and "reference_loss" in needs
        scoring = flops = float(forward_flops(self.network, first))
        if self._is_moved(needs):
            layer = layer_of(self.network, self.mimic_layer)
            scoring = tangent_flops(self.network, layer, first) + (flops if self._seen_plainly(needs) else 0.0)
        return RowFlops(
            scoring=scoring,
            training=flops,
            reference=float(forward_flops(self.reference, first)) if is_run and self.reference else 0.0,
        )
