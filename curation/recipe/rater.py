"""Teaching a rater: a pool's features, a proxy, the bilevel training, and the splits that it may see."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from curation.recipe.parts import Part, WholeRecipe
from curation.training.rater import Bilevel, RaterSpec
from curation.training.rater_run import ProxySpec, RaterShape


class Splits(Part):
    """Three parts that share no content: rows with one sha256 are in one part, by a hash of it."""

    validation_share: float = Field(default=0.1, gt=0, lt=1)
    test_share: float = Field(default=0.1, gt=0, lt=1)
    """Rows that training never sees; the proxy's loss on them is told after each epoch."""
    validation_run: str = ""
    """Another run of `jobs.curate`, with the same columns, whose rows validate in place of a part of the pool: what
    the pool should become good at. A row of it that is in the pool's parts too is an error."""
    max_train_rows: int = Field(default=200_000, gt=0)
    """So many rows, those of the lowest hash: each worker holds them in memory. The ratings are of all rows."""
    max_validation_rows: int = Field(default=50_000, gt=0)
    max_test_rows: int = Field(default=10_000, gt=0)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _leave_something(self) -> Self:
        if self.validation_share + self.test_share >= 1:
            raise ValueError("splits: validation_share and test_share must leave train rows, they sum to 1 or more")
        return self


class RaterNetwork(Part):
    """The rater: Linear-GELU on frozen features, an instance head, and a group head."""

    group: bool = True
    """clean: a term inside the logit, of the batch's mean and variance. paper, code: a factor of the whole batch."""
    temperature: float = Field(default=1.0, gt=0)
    """Mode clean: of the softmax over the batch."""
    width: int = Field(default=128, gt=0)
    hidden: int = Field(default=64, gt=0)
    rating_batches: int = Field(default=8, ge=4)
    """Batches that a rating is averaged over."""

    def shape(self) -> RaterShape:
        """As training takes it."""
        return RaterShape(**self.model_dump())


class Proxy(Part):
    """The generative model whose losses teach the rater."""

    kind: Literal["autoregressive", "masked", "function"] = "autoregressive"
    width: int = Field(default=128, gt=0)
    num_tokens: int = Field(default=64, gt=0)
    """Autoregressive: equal pieces of a row, each a word of the codebook."""
    num_codes: int = Field(default=256, gt=1)
    per_number: bool = False
    """Autoregressive: standardise each number by itself; for features. Pixels share one scale."""
    components: int = Field(default=64, gt=0)
    """Masked: principal components of each half of a row."""
    function: str = ""
    """kind function: package.module:name, which takes (rows (n, G), condition width, seed) and gives an nn.Module with
    `prepare` and a loss for each row (`curation.models.proxies.Proxy`). A GPU's diffusion model comes in here."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        self.spec()
        return self

    def spec(self) -> ProxySpec:
        """As training takes it."""
        return ProxySpec(**self.model_dump())


class Teach(Part):
    """The bilevel training; see `curation/training/rater.py` for the modes."""

    mode: Bilevel = "clean"
    use_reference: bool | None = None
    """Eq. 6: a row's cost is its loss minus that of a proxy trained on train rows alone; Eq. 9: its loss. None: Eq. 6
    in mode paper, Eq. 9 in the others."""
    batch_size: int = Field(default=32, ge=2)
    """Rows over which a softmax runs."""
    groups: int = Field(default=2, gt=0)
    """Such batches in a step, shared by the workers."""
    epochs: int = Field(default=10, gt=0)
    steps_per_epoch: int | None = Field(default=None, gt=0)
    """None: one pass over the validation rows."""
    warmup_steps: int | None = Field(default=None, ge=1)
    """Of the reference alone; None: an epoch's."""
    validation_share: float = Field(default=1.0, ge=0, le=1)
    """g of the first epoch: the share of the validation loss in the proxy's."""
    share_decay: float = Field(default=0.03, ge=0, le=1)
    """What g loses an epoch."""
    learning_rate: float = Field(default=1e-3, gt=0)
    rater_learning_rate: float | None = Field(default=None, gt=0)
    """None: the proxy's."""
    entropy: float = Field(default=0.0, ge=0)
    """What the weights' entropy takes off the rater's cost: above 0 no single row gets all of a batch's weight."""
    weight_decay: float = Field(default=0.05, ge=0)
    clip: float = Field(default=2.0, gt=0)

    def spec(self) -> RaterSpec:
        """As training takes it."""
        return RaterSpec(**self.model_dump())


class RaterRecipe(WholeRecipe):
    """A rater taught on a curated pool's features: OUTPUT/rater.pt, which makes a column of `jobs.curate`."""

    name: str = "debug"
    run: str = ""
    """Folder or URL of a run of `jobs.curate`: the pool."""
    features: str = "image_embedding"
    """The column that the rater sees."""
    modelled: str | None = None
    """The column that the proxy models, such as pixels of `jobs.fit features`; none: `features`."""
    condition: str | None = None
    """The column that the proxy is told, such as text_embedding."""
    splits: Splits = Splits()
    rater: RaterNetwork = RaterNetwork()
    proxy: Proxy = Proxy()
    teach: Teach = Teach()
    workers: int = Field(default=1, gt=0)
    """Ray Train workers; they divide `teach.groups`. The result is the same for any number, up to rounding."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    checkpoint_every: int = Field(default=200, gt=0)
    """Steps."""
    output: str = ""
    """Folder or URL of the run."""
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _workers_divide_the_groups(self) -> Self:
        if self.teach.groups % self.workers:
            raise ValueError(f"workers={self.workers} must divide teach.groups={self.teach.groups}")
        return self


class RatingsRecipe(WholeRecipe):
    """What the ratings of a run look like: pictures, tables and curves in RUN/fit/NAME."""

    run: str = ""
    """Folder or URL of the run of `jobs.curate` that was rated."""
    percentile: str = "rating_percentile"
    """The column of percentiles."""
    rater: str = ""
    """The run of `jobs.fit rater`, for the curves of its training; none: no curves."""
    rows: int = Field(default=2_000, gt=0)
    """Rows whose images are opened, those of the lowest hash of the uid."""
    images: int = Field(default=30, gt=0)
    """Images of each range."""
    side: int = Field(default=96, ge=16)
    """Pixels of an image on its sheet."""
