"""A training run: a curated pool, a learner, a method that selects what is trained on, and its measurement."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from curation.columns import LEDGER_COLUMNS, ROUND_VALUES, RUN_VALUES
from curation.models.classifier import is_on_features
from curation.recipe.parts import MethodArgument, Part, WeightsSource, WholeRecipe, selector_of
from curation.selector import Selector
from curation.training.learner import LEARNER_COLUMNS
from curation.training.of_round import OfRound
from curation.training.schedules import RateSchedule

STEP_COLUMNS = LEARNER_COLUMNS | {"reference_loss", "comparison_gradient", "head_weight"}
"""What a step alone has: it comes of the learner as it is, or of a reference that runs beside it."""


class Data(Part):
    """What is trained on."""

    run: str = ""
    """Folder or URL of a run of `jobs.curate`: its pool's tars are read, its tables give addresses, captions and the
    reference's embeddings."""
    segment_rows: int = Field(default=256, gt=0)
    """Neighbouring rows that are read as one byte range; a round visits the segments in a seeded random order."""
    max_pixels: int = Field(default=90_000_000, gt=0)
    """An image whose header says more is not decoded."""
    features: str | None = None
    """A column of frozen features (`jobs.fit features`) that the learner takes in place of pixels: no image is read."""
    label: str | None = None
    """A column that names each sample's class, such as json.label; what `train.objective cross_entropy` learns."""
    truth: str | None = None
    """A parquet table with `uid` and a boolean column, for the log alone: which samples are known to be junk."""
    truth_column: str = "junk"


class Weights(Part):
    """A model and where its weights come from."""

    model: str = Field(default="ViT-B-32", min_length=1)
    """An open_clip model, or `nano`. On `data.features` its text tower stands beside two linear layers for the image.
    A classifier is `linear` or `mlp-WIDTH` on features, or a model whose image tower gets a linear head."""
    pretrained: str | None = Field(default=None, min_length=1)
    """open_clip's tag of pretrained weights."""
    checkpoint: str | None = Field(default=None, min_length=1)
    """A local checkpoint instead."""
    seed: int = Field(default=0, ge=0)
    """Seed of random weights, when neither is given."""

    @model_validator(mode="after")
    def _one_source_of_weights(self) -> Self:
        if self.pretrained and self.checkpoint:
            raise ValueError(f"give pretrained or checkpoint, got both: {self.pretrained!r}, {self.checkpoint!r}")
        return self

    def source(self) -> WeightsSource:
        """Tag, checkpoint and seed."""
        return {"pretrained": self.pretrained, "checkpoint": self.checkpoint, "seed": self.seed}


class Reference(Part):
    """The fixed model that a learner is compared with. By default its embeddings are the columns of `data.run`."""

    columns: str = ""
    """The piece that holds its embeddings (`jobs.fit embeddings`); none named: those that `jobs.curate` made."""
    weights: Weights | None = None
    """If given: the columns must be this model's, or with `online` this model embeds each super-batch."""
    online: bool = False
    """Embed each super-batch with the reference again instead of reading its columns: a forward pass for each row."""

    @model_validator(mode="after")
    def _online_names_a_model(self) -> Self:
        if self.online and self.weights is None:
            raise ValueError("reference.online needs reference.weights: which model embeds?")
        return self


class Comparison(Part):
    """The second batch whose mean head gradient `agra` and `influence` compare each row's with; drawn for each step."""

    run: str = ""
    """A run of `jobs.curate` that has `data.features` and `data.label` too. `influence` wants held-out samples whose
    labels are right, and never those that are tested on; `agra` its own noisy pool, so `data.run` itself."""
    rows: int = Field(default=4096, gt=0)
    """Rows that are drawn from it once and held in memory."""
    batch: int = Field(default=0, ge=0)
    """Rows of them that a step compares with; 0: as many as train.sub_batch."""


class LowResolution(Part):
    """Flexi-JEST: candidates are scored at low resolution, and a share of each sub-batch is trained at it.

    Neither size given: all is done at the learner's own resolution. Vision transformers of open_clip's own, on pixels.
    """

    patch_size: int | None = Field(default=None, gt=0)
    """Larger patches on images of the same size; the patch embedding is resampled (the paper: 32 beside 16)."""
    image_size: int | None = Field(default=None, gt=0)
    """Smaller images: candidates are decoded at this size, and of the chosen only those that are trained in full."""
    share: float = Field(default=0.5, ge=0, le=1)
    """Share of the sub-batch that is trained at low resolution. 0: scored low, trained in full."""

    @property
    def is_on(self) -> bool:
        """True if anything is done at low resolution."""
        return self.patch_size is not None or self.image_size is not None


class Train(Part):
    """Steps, batches and the optimiser. Defaults: JEST (arXiv:2406.17711) and SigLIP (arXiv:2303.15343)."""

    num_steps: int = Field(default=1000, gt=0)
    sub_batch: int = Field(default=4096, gt=0)
    """Rows that a step trains on, over all workers (b)."""
    filter_ratio: float = Field(default=0.8, ge=0, lt=1)
    """1 - b/B: the share of each super-batch that is not trained on; 0 trains on all that is loaded."""
    scoring: Literal["trainer", "pool"] = "trainer"
    """trainer: each worker scores its own share of the super-batch. pool: actors of their own score and choose, and the
    workers pull sub-batches from them."""
    publish_every: int = Field(default=1, gt=0)
    """For the pool: steps between two publications of the learner's weights."""
    score_ahead: int = Field(default=0, ge=0)
    """For the pool: a step is scored with weights that are so many steps old, or older until the next publication; so
    many steps are scored while others are trained. 0 with weights published at every step chooses as `trainer` does."""
    choose: Literal["step", "round"] = "step"
    """step: each step's rows come from its super-batch. round: once a round the method chooses from the whole pool by
    stored columns and the ledger, and the steps of the round train on what it chose; filter_ratio is 0 then."""
    keep_fraction: float = Field(default=1.0, gt=0, le=1)
    """With choose round: the share of the pool that a round trains on, to the nearest whole number of sub-batches."""
    scope: Literal["global", "local"] = "global"
    """local: each worker selects from its own share of the super-batch. To measure what that costs."""
    quota: bool = False
    """Each worker trains on as many of its own rows, selected or not. To measure what that costs."""
    score_batch: int = Field(default=1024, gt=0)
    """Rows per forward pass while scoring."""
    micro_batches: int = Field(default=1, gt=0)
    """Parts in which a worker's share of the sub-batch is differentiated; the loss still sees the whole sub-batch."""
    objective: Literal["sigmoid", "softmax", "cross_entropy"] = "sigmoid"
    """sigmoid (SigLIP) and softmax (CLIP) learn from pairs, cross_entropy from labels."""
    distill: float = Field(default=0.0, ge=0)
    """ACED (arXiv:2411.18674): so many times the softmax distillation of the reference is added to the loss."""
    mimic_layer: str = "head.weight"
    """For grad_mimic: the learner's parameter or module whose gradients are compared with the way to the reference's
    weights; empty for the whole network. Of a model of pairs, open_clip's name, as visual.transformer.resblocks.11."""
    weight_scope: Literal["all", "mimic"] = "all"
    """Whose gradients a selection's weights multiply. mimic, grad_mimic's own: the mimic layer's; all other layers
    take the plain mean."""
    learning_rate: float = Field(default=1e-3, gt=0)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    weight_decay: float = Field(default=1e-4, ge=0)
    schedule: RateSchedule = "cosine"
    """Of the learning rate, over the samples of the run whatever a round holds. step: a tenth from a half of them on, a
    hundredth from three quarters on. one-cycle: up from a 25th over the first 30%, then down to almost nothing. What
    follows shapes the cosine alone."""
    warmup: float = Field(default=0.05, ge=0, le=1)
    """Share of the steps."""
    cooldown: float = Field(default=0.0, ge=0, le=1)
    """Share of the steps at the end in which the learning rate falls from `floor` of its peak to 0."""
    floor: float = Field(default=0.0, ge=0, le=1)
    max_grad_norm: float = Field(default=1.0, gt=0)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 autocast on a GPU, float32 on a CPU."""
    compile: bool = False
    """torch.compile the learner."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.warmup + self.cooldown > 1:
            raise ValueError(f"warmup and cooldown must sum to at most 1, got {self.warmup} and {self.cooldown}")
        shape = {name: getattr(self, name) for name in ("warmup", "cooldown", "floor")}
        if self.schedule != "cosine" and (odd := [n for n in shape if shape[n] != type(self).model_fields[n].default]):
            raise ValueError(f"train.{odd[0]} shapes the schedule cosine, not {self.schedule}; got {shape[odd[0]]}")
        if self.sub_batch > self.super_batch:
            raise ValueError(f"sub_batch {self.sub_batch} exceeds the super-batch {self.super_batch}")
        if self.choose == "round" and (self.filter_ratio or self.quota or self.scope == "local"):
            raise ValueError(
                f"train.choose round leaves a step nothing to choose: filter_ratio must be 0, got {self.filter_ratio}, "
                "without quota and with scope global"
            )
        if self.choose == "step" and self.keep_fraction != 1:
            raise ValueError(f"train.keep_fraction {self.keep_fraction} is for choose round; a step has filter_ratio")
        return self

    @property
    def super_batch(self) -> int:
        """Rows that are loaded and scored for a step (B): b / (1 - filter_ratio), to the nearest whole number."""
        return round(self.sub_batch / (1 - self.filter_ratio))


class Evaluate(Part):
    """Measurements on held-out samples while training."""

    shards: str = ""
    """Tars of held-out pairs, as in a pool; neither these nor a run given: no evaluation."""
    run: str = ""
    """Or a run of `jobs.curate` over held-out pairs, for a learner on features: their columns are read."""
    every_steps: int = Field(default=0, ge=0)
    """Also every so many steps; 0: only at the end."""
    max_samples: int = Field(default=5000, gt=0)
    """The first so many pairs that can be read are taken."""
    label_field: str | None = None
    """The json field that names the class: zero-shot classification is measured too."""
    templates: tuple[str, ...] = ("a photo of a {}.",)
    """Prompts of a class; {} is its name."""


class Workers(Part):
    """Where the work runs."""

    workers: int = Field(default=1, gt=0)
    """Ray Train workers, one GPU each; on CPUs as many processes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    scoring_actors: int = Field(default=1, gt=0)
    """Actors of the scoring pool, one GPU each; on CPUs one CPU each. More than `train.score_ahead` find no work."""
    feed_actors: int = Field(default=1, gt=0)
    """Actors per worker that read and decode super-batches ahead; each takes one CPU."""
    decode_threads: int = Field(default=2, gt=0)
    """Threads per feed actor."""
    torch_threads: int = Field(default=1, gt=0)
    """CPU threads per worker for the model."""
    prefetch: int = Field(default=2, gt=0)
    """Super-batches ready ahead of the step that trains on them."""
    stall_s: float = Field(default=300.0, gt=0)
    """Without a step for so long, the run says what each rank does; a rank that hangs as long again is ended, and all
    begin again from the newest checkpoint. Several times the slowest step, evaluation or round's choice."""
    max_failures: int = Field(default=3, ge=0)
    """Restarts of the worker group before the run gives up."""
    wait_for_nodes_s: float = Field(default=0.0, ge=0)
    """On a cluster that grows: ask its autoscaler for what the run needs, and wait so long for it, before it is an
    error that the cluster has too little."""


class Remember(Part):
    """The ledger of the run: what it keeps of each sample's score."""

    actors: int = Field(default=1, gt=0)
    score_log: Literal["auto", "on", "off"] = "auto"
    """Keep each step's raw scores and weights as well, in train/score_log, 24 bytes a row; auto: of grad_mimic."""
    statistic: Literal["last", "mean", "ema"] = "last"
    decay: float = Field(default=0.9, ge=0, lt=1)
    variance: bool = False


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
