"""Columns that are added to a curated run: features, another model's embeddings, verdicts, factors."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from curation.numerics.votes import Aggregator, Binariser
from curation.recipe.curate import Compute
from curation.recipe.parts import Part, Weights, WeightsSource, WholeRecipe
from curation.training.factor_encoders import EncoderKind, EncoderSettings


class Network(Part):
    """A frozen network that turns an image into features."""

    library: Literal["open_clip", "timm", "torchvision", "cifar", "tflite", "phash", "pixels"] = "open_clip"
    model: str = Field(default="ViT-B-32", min_length=1)
    """The library's name of the model; of a tflite network the file; of a perceptual hash 64, its bits; of pixels the
    side."""
    pretrained: str | None = Field(default=None, min_length=1)
    """The library's tag of pretrained weights."""
    checkpoint: str | None = Field(default=None, min_length=1)
    """A local state dict instead."""
    seed: int = Field(default=0, ge=0)
    """Seed of random weights, when neither is given."""

    def source(self) -> WeightsSource:
        """Tag, checkpoint and seed."""
        return {"pretrained": self.pretrained, "checkpoint": self.checkpoint, "seed": self.seed}


class ColumnsRecipe(WholeRecipe):
    """What both kinds of recipe say: the run whose shards get columns, and where the work runs."""

    run: str = ""
    """Folder or URL of a run of `jobs.curate`."""
    column: str = ""
    """The columns' name: letters, digits, - and _."""
    batch_size: int = Field(default=128, gt=0)
    """Rows per forward pass; a batch never crosses a shard, and the last one is padded."""
    max_pixels: int = Field(default=90_000_000, gt=0)
    """An image whose header says more has no value."""
    compute: Compute = Compute()


class FeaturesRecipe(ColumnsRecipe):
    """A column NAME (F,) float16: what a frozen network makes of each image."""

    network: Network = Network()


class QualityRecipe(ColumnsRecipe):
    """Columns NAME.sharpness (variance of the Laplacian) and NAME.plainness (share of the commonest tone), float32."""

    max_side: int = Field(default=256, ge=8)
    """A longer side is shrunk to this first, nothing is enlarged: sharpness compares at one scale only."""


class EmbeddingsRecipe(ColumnsRecipe):
    """Columns NAME.image_embedding and NAME.text_embedding (D,) float16 and NAME.clip_score: another model's."""

    weights: Weights = Weights()
    features: str | None = None
    """The column of features that the model takes in place of pixels."""


class MimicRecipe(WholeRecipe):
    """Columns NAME.keep, NAME.useful, NAME.score and NAME.rank: what a training run's score log says of its pool."""

    run: str = ""
    """Folder or URL of the run of `jobs.curate` that was trained on."""
    column: str = "mimic"
    """The columns' name: letters, digits, - and _."""
    log: str = ""
    """Folder or URL of the run of `jobs.train` whose score log is read."""
    binariser: Binariser = "threshold"
    """How a row's score becomes a vote. threshold: its weight is above its batch's mean. two_means and mixture: it is
    in the upper of two clusters, or of two Gaussians."""
    aggregator: Aggregator = "majority"
    """How votes become a verdict. one_coin: each round has an accuracy of its own; over-confident, for rounds agree."""
    over: Literal["round", "step"] = "round"
    """Whose scores are clustered together: a round's, or each step's."""


class FactorsRecipe(WholeRecipe):
    """Columns NAME.representativeness and NAME.rarity: ranks by the factors of features that the run stores."""

    run: str = ""
    """Folder or URL of a run of `jobs.curate`."""
    column: str = "factors"
    """The columns' name: letters, digits, - and _."""
    features: tuple[str, ...] = ("image_embedding",)
    """Columns of vectors or numbers, side by side: embeddings of images or texts, features, scores."""
    encoder: EncoderKind = "sae"
    """What finds the factors: a sparse autoencoder, or what it must beat."""
    units_per_feature: int = Field(default=8, gt=0)
    """Factors per feature; on a CPU 4 will do. (`pca` has two, one for each sign.)"""
    num_active: int = Field(default=32, gt=0)
    """Factors that a row activates; 16 where there are few features."""
    epochs: int = Field(default=50, gt=0)
    """Passes over the pool to train the autoencoder."""
    max_steps: int | None = Field(default=None, gt=0)
    """At most so many steps, for pools of which a part of one pass is enough."""
    batch_size: int = Field(default=2048, gt=0)
    learning_rate: float = Field(default=1e-3, gt=0)
    """Falls to a tenth."""
    dead_after_epochs: int = Field(default=5, gt=0)
    """A factor that no row activates for so long is revived."""
    min_explained: float = Field(default=0.75, ge=0, le=1)
    """The autoencoder is refused below this share of the features' variance."""
    max_dead: float = Field(default=0.1, ge=0, le=1)
    """Factors are refused if more than this share is never active."""
    tasks: int = Field(default=2, gt=0)
    """CPUs that a Ray of our own has."""
    torch_threads: int = Field(default=1, gt=0)
    seed: int = Field(default=0, ge=0)

    def settings(self) -> EncoderSettings:
        """What decides the encoder, besides the rows."""
        return EncoderSettings(
            kind=self.encoder,
            units_per_feature=self.units_per_feature,
            num_active=self.num_active,
            epochs=self.epochs,
            max_steps=self.max_steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            dead_after_epochs=self.dead_after_epochs,
            seed=self.seed,
        )
