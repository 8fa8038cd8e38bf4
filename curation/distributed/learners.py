"""From a training recipe to the learner that a worker trains, and to what it is measured on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from curation.columns import JSON_PREFIX
from curation.data.held_out import HeldOut, held_out_of_run, read_held_out
from curation.data.read_rules import ReadRules
from curation.distributed.evaluate import ClassEvaluation, Evaluation, PairEvaluation
from curation.distributed.feed import LOW_PIXELS
from curation.models.classifier import Classifier, build_classifier
from curation.models.clip import ClipNetwork, Precision, build_network, load_towers
from curation.models.flexi import native_patch_size
from curation.models.resize import load_resize
from curation.recipe import TrainRecipe
from curation.recipe.parts import Weights
from curation.training.classifier_learner import ClassifierLearner
from curation.training.contrastive_learner import ContrastiveLearner, LowView, Reference
from curation.training.learner import Learner


@dataclass(frozen=True)
class LearnerSpec:
    """What recipe and pool say of the learner: small values only."""

    recipe: TrainRecipe
    precision: Precision
    rules: ReadRules
    num_features: int | None
    """Width of the features that the learner begins at; None if it sees pixels."""
    classes: tuple[str, ...]
    """The labels that it learns; none if it learns pairs."""
    reference_scale: float | None
    reference_bias: float | None
    """Of the model whose embeddings are the columns; None where none are read."""


def build_learner(spec: LearnerSpec, device: torch.device, *, clip: nn.Module | None = None) -> Learner:
    """The learner at its beginning, and its reference; `clip` is open_clip's module to learn, if there is one already.

    ValueError if that is another model than the recipe's learner.
    """
    recipe, train = spec.recipe, spec.recipe.train
    images = "pixels" if recipe.data.features is None else "features"
    if recipe.is_classifier:
        reference = recipe.reference.weights
        return ClassifierLearner(
            network=_classifier(spec, recipe.learner).to(device),
            reference=None if reference is None else _classifier(spec, reference).to(device).eval(),
            images=images,
            mimic_layer=train.mimic_layer,
            weight_scope=train.weight_scope,
            score_batch=train.score_batch,
            precision=spec.precision,
        )
    learner = recipe.learner
    network = build_network(learner.model, **learner.source(), num_features=spec.num_features)
    if clip is not None:
        network = _around(clip, network)
    return ContrastiveLearner(
        network=network.to(device),
        low=_low_view(spec, network),
        distill=train.distill,
        reference=_reference(spec, device),
        mimicked=_mimicked(spec, device) if recipe.mimics else None,
        mimic_layer=train.mimic_layer,
        weight_scope=train.weight_scope,
        images=images,
        objective=train.objective,
        score_batch=train.score_batch,
        micro_batches=train.micro_batches,
        precision=spec.precision,
    )


def _around(clip: nn.Module, network: ClipNetwork) -> ClipNetwork:
    """The model that is there, seen as the recipe's learner is."""
    wanted, there = (
        {name: tuple(value.shape) for name, value in module.state_dict().items()} for module in (network.clip, clip)
    )
    if wanted != there:
        differs = sorted(set(wanted.items()) ^ set(there.items()))[0]
        raise ValueError(f"the model is not the one that learner.model names: {differs[0]} {list(differs[1])} differs")
    return ClipNetwork(clip, network.preprocess)


def _low_view(spec: LearnerSpec, network: ClipNetwork) -> LowView | None:
    low = spec.recipe.low_resolution
    if not low.is_on:
        return None
    visual = cast(Any, network.clip).visual
    return LowView(
        images="pixels" if low.image_size is None else LOW_PIXELS,
        patch_size=low.patch_size or native_patch_size(visual),
        share=low.share,
    )


def _classifier(spec: LearnerSpec, weights: Weights) -> Classifier:
    return build_classifier(
        weights.model,
        num_classes=len(spec.classes),
        num_features=spec.num_features,
        **weights.source(),
    )


def _reference(spec: LearnerSpec, device: torch.device) -> Reference | None:
    weights = spec.recipe.reference.weights
    if spec.recipe.reference.online and weights is not None:
        towers = load_towers(
            weights.model,
            **weights.source(),
            precision=spec.precision,
            device=str(device),
            num_features=spec.num_features,
        )
        return Reference(towers.logit_scale, towers.logit_bias, towers)
    if spec.reference_scale is None or spec.reference_bias is None:
        return None
    return Reference(spec.reference_scale, spec.reference_bias, None)


def _mimicked(spec: LearnerSpec, device: torch.device) -> ClipNetwork:
    """The network whose weights Grad-Mimic goes towards."""
    weights = spec.recipe.reference.weights
    assert weights is not None
    network = build_network(weights.model, **weights.source(), num_features=spec.num_features)
    return network.to(device).eval().requires_grad_(False)


def load_evaluation(spec: LearnerSpec, held_out: HeldOut) -> Evaluation:
    """The held-out samples, ready to be measured on."""
    recipe = spec.recipe
    if recipe.is_classifier:
        return ClassEvaluation(held_out, classes=spec.classes, batch_size=recipe.train.score_batch)
    return PairEvaluation(
        held_out,
        model=recipe.learner.model,
        templates=recipe.evaluate.templates,
        batch_size=recipe.train.score_batch,
    )


def load_held_out(spec: LearnerSpec) -> HeldOut | None:
    """What the recipe measures on; None if it measures nothing."""
    recipe, evaluate = spec.recipe, spec.recipe.evaluate
    if not evaluate.shards and not evaluate.run:
        return None
    # A classifier is measured by the labels that it learns, unless others are named.
    label = recipe.data.label if evaluate.label_field is None else JSON_PREFIX + evaluate.label_field
    if evaluate.run:
        features = str(recipe.data.features)
        return held_out_of_run(evaluate.run, max_samples=evaluate.max_samples, features=features, label=label)
    return read_held_out(
        evaluate.shards,
        max_samples=evaluate.max_samples,
        resize=load_resize(recipe.learner.model, pretrained=recipe.learner.pretrained),
        rules=spec.rules,
        max_pixels=recipe.data.max_pixels,
        label_field=None if label is None else label.removeprefix(JSON_PREFIX),
    )
