"""Encoders that find the factors of features: the sparse autoencoder, and what it must beat.

    sae      the TopK sparse autoencoder of our completion of arXiv:2603.04981
    kmeans   directions to the centroids of k-means: a row's nearest few are its factors
    pca      both signs of each principal component
    random   random directions

n rows, D features, M units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from curation.numerics.neighbors import ROWS_PER_CLUSTER, fit_centroids
from curation.training.autoencoder import AutoencoderSettings, fit_autoencoder
from curation.training.sparse_autoencoder import SparseAutoencoder

LOGGED_LOSSES = 20
EncoderKind = Literal["sae", "kmeans", "pca", "random"]
Stream = Callable[[int], Iterator[Tensor]]
"""Endless batches (n, D) of standardised rows, of the batch size that is asked for, mixed, pass after pass."""


@dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """What decides an encoder, besides the rows."""

    kind: EncoderKind = "sae"
    units_per_feature: int = 8
    num_active: int = 32
    epochs: int = 50
    max_steps: int | None = None
    batch_size: int = 2048
    learning_rate: float = 1e-3
    dead_after_epochs: int = 5
    seed: int = 0


class Fitted(NamedTuple):
    """A fitted encoder's matrix and bias, and what writes rows again, if it can."""

    weight_MD: Tensor
    bias_M: Tensor
    decoder: SparseAutoencoder | None = None
    losses: tuple[float, ...] = ()
    """Share of the variance left over, at about 20 moments of the training."""


def fit_encoder(stream: Stream, settings: EncoderSettings, *, num_rows: int, width: int) -> Fitted:
    """The encoder of a pool of `num_rows` rows of `width` features. ValueError if it cannot be fitted."""
    batch, units = min(settings.batch_size, num_rows), settings.units_per_feature * width
    per_epoch = max(1, num_rows // batch)
    if settings.kind == "sae":
        return _sparse_autoencoder(stream(batch), settings, units=units, width=width, per_epoch=per_epoch)
    if settings.kind == "pca":
        rows = stream(batch)
        second_DD = torch.zeros(width, width, dtype=torch.float64)
        for _ in range(per_epoch):
            rows_nD = next(rows).double()
            second_DD += rows_nD.T @ rows_nD
        components = torch.linalg.eigh(second_DD).eigenvectors.T.flip(0).float()
        return Fitted(torch.cat([components, -components]), torch.zeros(2 * width))
    if settings.kind == "kmeans":
        enough = min(per_epoch, -(-ROWS_PER_CLUSTER * units // batch))
        rows = stream(batch)
        unit_nD = F.normalize(torch.cat([next(rows) for _ in range(enough)]), dim=1)
        centroids_MD = fit_centroids(unit_nD, num_clusters=units, seed=settings.seed)
        return Fitted(centroids_MD, torch.zeros(units))
    generator = torch.Generator().manual_seed(settings.seed)
    return Fitted(F.normalize(torch.randn(units, width, generator=generator), dim=1), torch.zeros(units))


def _sparse_autoencoder(
    batches: Iterator[Tensor], settings: EncoderSettings, *, units: int, width: int, per_epoch: int
) -> Fitted:
    num_steps = min(settings.max_steps or settings.epochs * per_epoch, settings.epochs * per_epoch)
    model = SparseAutoencoder(width, num_units=units, num_active=settings.num_active, seed=settings.seed)
    how = AutoencoderSettings(
        num_steps=num_steps,
        dead_after=min(settings.dead_after_epochs * per_epoch, max(1, num_steps // 10)),
        learning_rate=settings.learning_rate,
        final_learning_rate=settings.learning_rate / 10,
    )
    losses = fit_autoencoder(model, batches, how)
    bias_M = (model.encoder_bias_M - model.encoder_MD @ model.before_D).detach()
    return Fitted(model.encoder_MD.detach(), bias_M, model, tuple(losses[:: max(1, len(losses) // LOGGED_LOSSES)]))
