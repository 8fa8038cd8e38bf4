"""Columns that a selection makes before it begins, out of what is stored: a language, a score, a cluster."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from curation.models.heads import HeadLayout
from curation.recipe.parts import Part, json_argument


class Language(Part):
    """Columns NAME.label and NAME.probability: the caption's language, by a fastText model."""

    make: Literal["language"]
    name: str = "language"
    model: str = Field(min_length=1)
    """A file on every node: lid.176.bin, as DataComp uses, or lid.176.ftz."""


class EmbeddingHead(Part):
    """A column NAME.score: what a local head makes of a stored embedding."""

    make: Literal["embedding_head"]
    name: str = Field(min_length=1)
    checkpoint: str = Field(min_length=1)
    """A state dict on every node."""
    layout: HeadLayout
    column: str = "image_embedding"
    """The embedding that it is a head of; its model must be the one that the head was trained on."""


class Clusters(Part):
    """Columns NAME.cluster, and with a target NAME.target_rows: k-means of the embeddings, and the target's share.

    DataComp's image-based rule (arXiv:2304.14108, Sec. 4.2) keeps the rows whose nearest centroid is that of a row of
    the target, so those with target_rows >= 1.
    """

    make: Literal["clusters"]
    name: str = Field(min_length=1)
    num_clusters: int = Field(gt=0)
    """DataComp: 100,000."""
    target: str | None = Field(default=None, min_length=1)
    """A run of `jobs.curate` over the curated set, embedded by the same model."""
    column: str = "image_embedding"
    rows_per_cluster: int = Field(default=256, gt=0)
    """Rows of the pool that the centroids are fitted on, for each cluster."""
    seed: int = Field(default=0, ge=0)


class Rating(Part):
    """A column NAME.logit: what a rater of `jobs.fit rater` makes of stored features. Of one taught in mode code also
    NAME.released, the released scoring script's, which depends on 255 neighbours."""

    make: Literal["rating"]
    name: str = "rating"
    rater: str = Field(min_length=1)
    """Folder or URL of the run of `jobs.fit rater`. The features are those that it was taught on."""


class Percentile(Part):
    """A column NAME: where a row stands among all by another column, 0 for the highest."""

    make: Literal["percentile"]
    name: str = "rating_percentile"
    of: str = "rating.logit"
    max_rows: int = Field(default=1 << 20, gt=0)
    """Rows that percentiles are read off; a pool of no more has exact ones. They stay when shards are added."""


MadeColumns = Annotated[Language | EmbeddingHead | Clusters | Rating | Percentile, Field(discriminator="make")]
MadeColumnsArgument = Annotated[tuple[MadeColumns, ...], json_argument(tuple[MadeColumns, ...], tuple)]
