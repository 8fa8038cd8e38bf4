"""The parts of a training run, each valid by itself; train.py says which of them fit together."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from curation.recipe.parts import Part, Weights, checked_templates
from curation.training.schedules import RateSchedule


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


class Reference(Part):
    """The fixed model that a learner is compared with. By default its embeddings are the columns of `data.run`."""

    columns: str = ""
    """The piece that holds its embeddings (`jobs.fit embeddings`); none named: those that `jobs.curate` made."""
    weights: Weights | None = None
    """None unless one of its flags is given. Then the columns must be this model's, or with `online` this model embeds
    each super-batch."""
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

    _templates_hold_a_name = field_validator("templates")(checked_templates)


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
