"""A training run: a curated pool, a learner, a method that selects what is trained on, and its measurement.

The parts are in train_parts.py; what is said here is which of them fit together.
"""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from curation.columns import LEDGER_COLUMNS, ROUND_VALUES, RUN_VALUES
from curation.models.classifier import is_on_features
from curation.recipe.parts import MethodArgument, Weights, WholeRecipe, selector_of
from curation.recipe.train_parts import Comparison, Data, Evaluate, LowResolution, Reference, Remember, Train, Workers
from curation.selector import Selector
from curation.training.learner import LEARNER_COLUMNS
from curation.training.of_round import OfRound

STEP_COLUMNS = LEARNER_COLUMNS | {"reference_loss", "comparison_gradient", "head_weight"}
"""What a step alone has: it comes of the learner as it is, or of a reference that runs beside it."""


class TrainRecipe(WholeRecipe):
    """A training run: super-batches from a curated pool, a selection from each, a weighted step, a ledger."""

    name: str = "debug"
    data: Data = Data()
    learner: Weights = Weights()
    reference: Reference = Reference()
    comparison: Comparison = Comparison()
    low_resolution: LowResolution = LowResolution()
    method: MethodArgument = Field(default_factory=lambda: {"name": "jest"})
    """{"name": a file in curation/methods, and the fields of its selector}; `uniform` is the rival of all."""
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    compute: Workers = Workers()
    ledger: Remember = Remember()
    checkpoint_every: int = Field(default=500, gt=0)
    """Steps between checkpoints; the last step always makes one."""
    output: str = ""
    """Folder or URL of the run."""
    seed: int = Field(default=0, ge=0)
    """Seed of the order of the rounds and of the selection."""

    @model_validator(mode="after")
    def _can_run(self) -> Self:
        selector = self.selector()
        if not selector.fixed_size and not self.is_round_wise:
            raise ValueError(
                f"method {self.method['name']!r} decides by itself how many rows to keep, a step needs exactly "
                f"train.sub_batch={self.train.sub_batch}"
            )
        for name in ("sub_batch", "super_batch"):
            if getattr(self.train, name) % self.compute.workers:
                raise ValueError(
                    f"compute.workers={self.compute.workers} must divide train.{name}={getattr(self.train, name)}"
                )
        if self.train.sub_batch // self.compute.workers < self.train.micro_batches:
            raise ValueError(f"train.micro_batches={self.train.micro_batches} is more than a worker's rows of a step")
        return self

    @model_validator(mode="after")
    def _learner_fits(self) -> Self:
        data, model, on_labels = self.data, self.learner.model, self.is_classifier
        if on_labels != (data.label is not None):
            raise ValueError(f"train.objective {self.train.objective} and data.label {data.label} do not fit")
        if is_on_features(model) and not (on_labels and data.features):
            raise ValueError(f"learner.model {model!r} classifies features: it needs data.features and cross_entropy")
        if on_labels and data.features and not is_on_features(model):
            raise ValueError(f"on data.features a classifier is linear or mlp-WIDTH, got learner.model {model!r}")
        if data.features and self.learner.pretrained:
            raise ValueError(f"learner.pretrained {self.learner.pretrained!r} is of a model that sees pixels")
        if self.evaluate.shards and self.evaluate.run:
            raise ValueError("evaluate: give shards or run, got both")
        if self.evaluate.shards and data.features:
            raise ValueError("evaluate.shards hold pixels; a learner on data.features is measured on evaluate.run")
        if self.evaluate.run and not data.features:
            raise ValueError("evaluate.run is for a learner on data.features; give evaluate.shards")
        if on_labels and self.train.micro_batches > 1:
            raise ValueError("train.micro_batches are for the losses of pairs; a classifier's sub_batch may be smaller")
        if self.mimics and self.reference.weights is None:
            raise ValueError(
                f"method {self.method['name']!r} goes towards a reference's weights: name them, as in "
                "--reference.weights.checkpoint FILE"
            )
        self._comparison_fits()
        self._rounds_fit()
        if self.train.weight_scope == "mimic" and not self.mimics:
            raise ValueError(f"train.weight_scope mimic is grad_mimic's, not {self.method['name']!r}'s")
        if self.train.weight_scope == "mimic" and self.train.micro_batches > 1:
            raise ValueError("train.weight_scope mimic needs train.micro_batches 1: two gradients come of one graph")
        if on_labels and self.reference.columns:
            raise ValueError(
                "reference.columns are embeddings; a classifier is compared with reference.weights, online"
            )
        return self

    @model_validator(mode="after")
    def _can_be_scored_in_a_pool(self) -> Self:
        train = self.train
        if train.scoring == "trainer":
            if train.publish_every != 1 or train.score_ahead:
                raise ValueError("train.publish_every and train.score_ahead are for train.scoring pool")
        elif train.scope != "global" or train.quota:
            raise ValueError("train.scope local and train.quota are for scoring that is spread over the workers")
        elif self.mimics or self.selector().needs & LEDGER_COLUMNS:
            raise ValueError(
                f"train.scoring pool cannot make what method {self.method['name']!r} needs: a reference's weights, or "
                "the ledger as it stands after the step before"
            )
        return self

    @model_validator(mode="after")
    def _can_be_had_at_low_resolution(self) -> Self:
        low, is_of_pixels = self.low_resolution, self.data.features is None and not self.is_classifier
        if low.is_on and (not is_of_pixels or self.mimics):
            raise ValueError("low_resolution is for pairs whose images are pixels, and for methods that score by them")
        if low.image_size is not None and self.reference.online:
            raise ValueError("low_resolution.image_size leaves no full images for reference.online: cache its columns")
        if self.train.distill and (self.is_classifier or self.mimics):
            raise ValueError("train.distill is for pairs, from the reference whose embeddings are compared with")
        return self

    def _comparison_fits(self) -> None:
        """ValueError if the method compares with a batch that nobody can make, or nobody asked for."""
        name, run = self.method["name"], self.comparison.run
        if not self.compares:
            if run:
                raise ValueError(f"comparison.run is for agra and influence, method {name!r} compares with no batch")
            return
        if not run:
            raise ValueError(
                f"method {name!r} compares with the gradient of a second batch: name its run, as in --comparison.run "
                "RUN (held-out samples for influence, data.run itself for agra)"
            )
        if not (self.is_classifier and self.data.features):
            raise ValueError(f"method {name!r} compares gradients of a head: it needs cross_entropy and data.features")
        if self.train.scoring == "pool":
            raise ValueError(f"train.scoring pool makes no comparison gradient, which method {name!r} needs")

    def _rounds_fit(self) -> None:
        """ValueError if the method cannot be asked the way it would be."""
        selector, method = self.selector(), self.method["name"]
        if not self.is_round_wise:
            if of_rounds := sorted(selector.needs & ROUND_VALUES):
                raise ValueError(f"method {method!r} needs {of_rounds[0]!r}, which only --train.choose round has")
            return
        if self.train.scoring == "pool" or self.low_resolution.is_on:
            raise ValueError(
                "train.choose round scores no super-batch: train.scoring is trainer, low_resolution is off"
            )
        if of_step := sorted(selector.needs & (STEP_COLUMNS | {name for name in RUN_VALUES if "logit" in name})):
            raise ValueError(
                f"method {method!r} needs {of_step[0]!r} of the learner as it is, so it chooses in a step; a round "
                "knows stored columns and the ledger"
            )
        if selector.records == "loss" and self.train.micro_batches > 1:
            raise ValueError(f"method {method!r} remembers each row's loss, which needs train.micro_batches 1")
        if "ledger_variance" in selector.needs and not self.ledger.variance:
            raise ValueError(
                f"method {method!r} needs a running variance: --ledger.statistic ema --ledger.variance True"
            )
        if "label" in selector.needs and self.data.label is None:
            raise ValueError(f"method {method!r} has budgets for classes: name their column, as in --data.label")

    @property
    def is_classifier(self) -> bool:
        """True if the learner learns labels, False if it learns pairs."""
        return self.train.objective == "cross_entropy"

    def step_selector(self) -> Selector:
        """What a step selects by: the method, or what a round has left for the step to do."""
        return OfRound(self.selector().records) if self.is_round_wise else self.selector()

    @property
    def is_round_wise(self) -> bool:
        """True if the method chooses once a round from the whole pool, False if each step does from its super-batch."""
        return self.train.choose == "round"

    @property
    def mimics(self) -> bool:
        """True if the method's score is made of a reference's weights."""
        return "mimic_score" in self.selector().needs

    @property
    def compares(self) -> bool:
        """True if the method compares with the gradient of a second batch."""
        return "comparison_gradient" in self.selector().needs

    @property
    def logs_scores(self) -> bool:
        """True if the run keeps a score log."""
        return self.ledger.score_log == "on" or (self.ledger.score_log == "auto" and self.mimics)

    def selector(self) -> Selector:
        """The method's selector."""
        return selector_of(self.method)
