"""An image–text model in training, and the fixed reference that it is compared with.

The reference of a method that compares losses or embeddings is `reference`; Grad-Mimic's, whose weights are all that is
wanted of it, is `mimicked`.

n rows of this rank, D embedding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from curation.models.clip import ClipNetwork, Precision, Towers
from curation.numerics.contrastive import blocked_pair_losses, load_objective, pick_accuracy
from curation.selector import Rows
from curation.training.contrastive import MAX_LOGIT_SCALE
from curation.training.flops import tower_flops
from curation.training.learner import (
    LEARNER_COLUMNS,
    REFERENCE_COLUMNS,
    Kept,
    RowFlops,
    WeightScope,
    autocast,
    check_finite,
)
from curation.training.mimic import Alignment, check_fits, cosine_of, layer_of, replaced
from curation.training.mimic_pairs import pair_mimic_flops, pair_mimic_scores
from curation.training.scoring import embed_rows, losses_in_super_batch
from curation.training.step import Distillation, PairBatch, StepReport, contrastive_step


class LowView(NamedTuple):
    """How the learner sees images at low resolution."""

    images: str
    """Their column: the learner's own, seen in larger patches, or one of smaller images."""
    patch_size: int
    share: float
    """Of the rows that are trained on."""


class Reference(NamedTuple):
    """The fixed model: its scale and bias, and the towers that embed online, or None where columns have it done."""

    logit_scale: float
    logit_bias: float
    towers: Towers | None


@dataclass(frozen=True, kw_only=True)
class ContrastiveLearner:
    """`network` is on its device, and takes `images`: the column "pixels", or "features" if it begins at those."""

    network: ClipNetwork
    reference: Reference | None = None
    mimicked: ClipNetwork | None = None
    mimic_layer: str = ""
    """Name of the parameter or module of open_clip's model that mimic scores are made for; empty for all of it."""
    weight_scope: WeightScope = "all"
    images: str = "pixels"
    low: LowView | None = None
    distill: float = 0.0
    """How many times the distillation of the reference is added to the loss."""
    objective: str = "sigmoid"
    score_batch: int = 1024
    micro_batches: int = 1
    precision: Precision = "float32"

    @property
    def saved(self) -> nn.Module:
        """open_clip's own module: the checkpoint is one that open_clip loads."""
        return self.network.clip

    @property
    def inputs(self) -> tuple[str, ...]:
        """Images and tokens, and what the reference says of the rows if it is distilled."""
        return (self.images, "tokens", *(sorted(REFERENCE_COLUMNS) if self.distill else ()))

    @property
    def low_images(self) -> str | None:
        """As `low` names it."""
        return None if self.low is None else self.low.images

    @property
    def lacks(self) -> frozenset[str]:
        """A head, which no such model has; the reference's columns and the mimic score, if there is no reference."""
        lacking = frozenset({"head_residual", "head_input"})
        if self.mimicked is None:
            lacking |= {"mimic_score"}
        if self.reference is None:
            lacking |= REFERENCE_COLUMNS | {"reference_logit_scale", "reference_logit_bias", "reference_loss"}
        return lacking

    def rows(self, block: Rows, needs: frozenset[str]) -> Rows:
        """Embeddings, scale and bias of the learner if the method asks for them; the reference's in any case."""
        rows: Rows = {}
        device = self.network.log_scale.device
        if needs & (LEARNER_COLUMNS - {"mimic_score"}):
            rows["image_embedding"], rows["text_embedding"] = embed_rows(
                self.network,
                block[self.low_images or self.images],
                block["tokens"],
                batch_size=self.score_batch,
                patch_size=None if self.low is None else self.low.patch_size,
                autocast=autocast(device, self.precision),
            )
            check_finite(torch.cat([rows["image_embedding"], rows["text_embedding"]], dim=1), what="embeddings")
            scale, bias = self.network.scale_and_bias()
            rows["logit_scale"], rows["logit_bias"] = scale.detach(), bias.detach()
        if self.reference is not None:
            rows |= self._reference_rows(block, device)
        for name, prefix in (("learner_loss", ""), ("reference_loss", "reference_")):
            if name in needs:
                rows[name] = losses_in_super_batch(
                    rows[f"{prefix}image_embedding"],
                    rows[f"{prefix}text_embedding"],
                    logit_scale=rows[f"{prefix}logit_scale"],
                    logit_bias=rows[f"{prefix}logit_bias"],
                    objective=self.objective,
                )
        if "mimic_score" in needs and self.mimicked is not None:
            with autocast(device, self.precision):
                rows["mimic_score"] = pair_mimic_scores(
                    self.network,
                    self.mimicked,
                    block[self.images],
                    block["tokens"],
                    layer=self.mimic_layer,
                    objective=self.objective,
                    batch_size=self.score_batch,
                )
            check_finite(rows["mimic_score"], what="mimic scores")
        return {name: value for name, value in rows.items() if name not in LEARNER_COLUMNS - needs}

    def keep(self, model: nn.Module, block: Rows, needs: frozenset[str]) -> Kept | None:
        """None: a pair's loss hangs on the rows it is trained with, and attention with tangents is another kernel."""
        return None

    def alignment(self, block: Rows) -> Alignment | None:
        """By how many images pick their own text among the first `score_batch` rows."""
        if self.mimicked is None:
            return None
        layer, reference = layer_of(self.network.clip, self.mimic_layer), layer_of(self.mimicked.clip, self.mimic_layer)
        check_fits(layer, reference)
        images, tokens = (block[name][: self.score_batch] for name in (self.images, "tokens"))

        def accuracy(network: ClipNetwork) -> float:
            return pick_accuracy(*embed_rows(network, images, tokens, batch_size=len(images))).item()

        with replaced(layer, reference):
            swapped = accuracy(self.network)
        return Alignment(
            learner=accuracy(self.network),
            reference=accuracy(self.mimicked),
            swapped=swapped,
            chance=1 / len(images),
            cosine=cosine_of(layer, reference),
            num_rows=len(images),
            is_whole=not self.mimic_layer,
        )

    def _reference_rows(self, block: Rows, device: torch.device) -> Rows:
        assert self.reference is not None
        scale, bias, towers = self.reference
        rows: Rows = {
            "reference_logit_scale": torch.tensor(scale, device=device),
            "reference_logit_bias": torch.tensor(bias, device=device),
        }
        if towers is None:
            return rows | {name: block[name].to(device) for name in REFERENCE_COLUMNS}
        for name, embed, inputs in (
            ("reference_image_embedding", towers.embed_images, block[self.images]),
            ("reference_text_embedding", towers.embed_texts, block["tokens"]),
        ):
            rows[name] = torch.cat([embed(part) for part in inputs.split(self.score_batch)]).to(device)
        return rows

    def step(
        self, model: nn.Module, inputs: list[Tensor], *, weights: Tensor, optimizer: Optimizer, max_grad_norm: float
    ) -> StepReport:
        """A contrastive step; the logit scale stays within its bound."""
        report = contrastive_step(
            model,
            self._batch(inputs),
            weights=weights,
            optimizer=optimizer,
            objective=load_objective(self.objective),
            max_grad_norm=max_grad_norm,
            micro_batches=self.micro_batches,
            weighted=self._weighted,
            autocast=autocast(self.network.log_scale.device, self.precision),
        )
        with torch.no_grad():
            self.network.log_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))
        return report

    def _batch(self, inputs: list[Tensor]) -> PairBatch:
        """A sub-batch's inputs by name."""
        images, tokens, *others = inputs
        low, patch_size = (others.pop(), self.low.patch_size) if self.low else (None, None)
        if not self.distill:
            return PairBatch(images, tokens, low, patch_size)
        assert self.reference is not None
        said = dict(zip(sorted(REFERENCE_COLUMNS), others, strict=True))
        distillation = Distillation(
            said["reference_image_embedding"],
            said["reference_text_embedding"],
            self.reference.logit_scale,
            self.distill,
        )
        return PairBatch(images, tokens, low, patch_size, distillation)

    @property
    def _weighted(self) -> list[nn.Parameter] | None:
        return None if self.weight_scope == "all" else list(layer_of(self.network.clip, self.mimic_layer).values())

    def reference_loss(self, selected: Rows) -> float | None:
        """The chosen rows' loss under the reference, from its embeddings."""
        if not selected.keys() >= REFERENCE_COLUMNS:
            return None
        losses = blocked_pair_losses(
            selected["reference_image_embedding"],
            selected["reference_text_embedding"],
            logit_scale=selected["reference_logit_scale"],
            logit_bias=selected["reference_logit_bias"],
            objective=self.objective,
        )
        return losses.mean().item()

    def flops(self, block: Rows, needs: frozenset[str]) -> RowFlops:
        """Both towers'; a mimic score's pass, which carries tangents, in place of the plain one or beside it."""
        tokens, size = block["tokens"][:1], self.network.preprocess.size
        # Where candidates come as smaller images there is none in full.
        images = block[self.images][:1] if self.images in block else _blank_image(size)
        full = sum(tower_flops(self.network, images, tokens))
        low, share = full, 0.0
        if self.low is not None:
            low = sum(tower_flops(self.network, block[self.low.images][:1], tokens, patch_size=self.low.patch_size))
            share = self.low.share
        scoring = low
        if "mimic_score" in needs:
            plain = low if needs & (LEARNER_COLUMNS - {"mimic_score"}) else 0
            scoring = plain + pair_mimic_flops(self.network, images, tokens, layer=self.mimic_layer)
        towers = None if self.reference is None else self.reference.towers
        return RowFlops(
            scoring=scoring,
            training=share * low + (1 - share) * full,
            reference=0.0 if towers is None else sum(tower_flops(towers.network, images, tokens)),
        )


def _blank_image(size: int | tuple[int, int]) -> Tensor:
    height, width = (size, size) if isinstance(size, int) else size
    return torch.zeros(1, height, width, 3, dtype=torch.uint8)
