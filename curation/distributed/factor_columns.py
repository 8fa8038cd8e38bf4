"""Factors of a curated run: an encoder fitted on its stored features, and two ranks of each row as columns.

    NAME.representativeness   rank in [0, 1] of how well the row's factors cover the pool's common ones
    NAME.rarity               rank in [0, 1] of how rare the row's factors are

The tables are streamed: sums for mean and scale, the encoder's training, one pass that counts how often each factor is
active, one that counts the ranks, and one that writes the columns. Passes run as tasks; memory does not grow with the
pool. What was fitted lies in RUN/fit and is not fitted again, so shards that come later are ranked by the factors of
the pool as it was.

n rows, D features, M units.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from curation.columns import FORMAT_VERSION
from curation.data import manifest, shard_list, storage
from curation.data.lease import Lease
from curation.data.mapped import mapped_arrays
from curation.distributed import stored_columns
from curation.distributed.columns import checked_run
from curation.distributed.embed import STAGE as EMBED_STAGE
from curation.distributed.resources import cluster
from curation.distributed.stored_features import (
    each_group,
    features_of,
    has_features,
    mean_and_length,
    mixed_batches,
    read_features,
)
from curation.numerics.factors import (
    Encoder,
    FactorFacts,
    RankCounts,
    count_units,
    facts_of,
    rarity,
    representativeness,
)
from curation.recipe.columns import FactorsRecipe
from curation.training.factor_encoders import fit_encoder
from curation.training.sparse_autoencoder import SparseAutoencoder

FOLDER, REPORT = "fit", "report.json"
LABEL = "our completion of 2603.04981"
PARTS = ("representativeness", "rarity")
FACTS = ("frequency", "alive", "common", "rare")
OPPOSED = -0.9
"""Below this rank correlation representativeness and rarity are one axis."""


class FactorsRefused(ValueError):
    """The factors are not good enough to rank by."""


class FactorsSummary(NamedTuple):
    """The account of a fit: rows that it is of, shards that have the columns, and what was found."""

    rows: int
    shards: int
    made_now: int
    report: Mapping[str, Any]


def add_factor_columns(recipe: FactorsRecipe) -> FactorsSummary:
    """Fit and write what is not there yet. ValueError or OtherRun if the recipe cannot run, OutputInUse if the run is
    held, FactorsRefused if what was fitted misses the recipe's marks."""
    recipe = checked_factors(recipe)
    with Lease(recipe.run), cluster(num_cpus=recipe.tasks):
        samples = manifest.committed(recipe.run, EMBED_STAGE)
        numbers = [s.number for s in shard_list.load(recipe.run) if s.number in samples and not s.retired]
        how = _how(recipe)
        folder = storage.join(recipe.run, FOLDER, f"{recipe.column}-{manifest.digest(how)[:8]}")
        if not storage.exists(storage.join(folder, REPORT)):
            _fit(recipe, numbers, folder)
        report = manifest.read(storage.join(folder, REPORT))
        check_report(recipe, report)
        maker = FactorRanks(recipe.column, recipe.features, folder, tuple(sorted(how.items())), manifest.digest(report))
        made = stored_columns.make(recipe.run, samples, numbers, maker)
    return FactorsSummary(report["rows"], len(numbers), made, report)


def checked_factors(recipe: FactorsRecipe) -> FactorsRecipe:
    """The recipe with a URL of its run that every node may open. ValueError if it cannot run; nothing is touched."""
    run = checked_run(recipe.run, recipe.column)
    first = min(manifest.committed(run, EMBED_STAGE))
    width = read_features(run, first, recipe.features).shape[1]
    units = (2 if recipe.encoder == "pca" else recipe.units_per_feature) * width
    if recipe.num_active > units:
        raise ValueError(f"num_active is {recipe.num_active}, but {width} features have {units} factors")
    return recipe.model_copy(update={"run": run})


def check_report(recipe: FactorsRecipe, report: Mapping[str, Any]) -> None:
    """FactorsRefused that tells the figures, if an autoencoder's miss the recipe's marks; no other encoder learns."""
    explained, dead = report["explained_variance"], report["dead_share"]
    if explained is None:
        return
    if explained < recipe.min_explained:
        raise FactorsRefused(
            f"the factors explain {explained:.3f} of the features' variance, wanted {recipe.min_explained}: train "
            "longer (--epochs), with more units (--units-per-feature) or more of them a row (--num-active)"
        )
    if dead > recipe.max_dead:
        raise FactorsRefused(
            f"{dead:.1%} of the factors are dead, at most {recipe.max_dead:.0%} may be: fewer units "
            "(--units-per-feature), or train longer (--epochs)"
        )


def _how(recipe: FactorsRecipe) -> dict[str, Any]:
    """All that decides the factors, besides the features themselves."""
    skipped = {"run", "column", "tasks", "torch_threads", "format_version", "min_explained", "max_dead"}
    return recipe.model_dump(mode="json", exclude=skipped)


def _fit(recipe: FactorsRecipe, numbers: Sequence[int], folder: str) -> None:
    begun = time.time()
    mean_D, length, rows = mean_and_length(recipe, numbers)
    plain = Encoder(mean_D, 1 / length, torch.zeros(0, len(mean_D)), torch.zeros(0), recipe.num_active)
    torch.set_num_threads(recipe.torch_threads)
    fitted = fit_encoder(
        lambda batch: map(plain.standardised, mixed_batches(recipe, numbers, batch=batch)),
        recipe.settings(),
        num_rows=rows,
        width=len(mean_D),
    )
    encoder = plain._replace(weight_MD=fitted.weight_MD, bias_M=fitted.bias_M)
    counted = reduce(_Counted.plus, each_group(recipe, numbers, _count, encoder, fitted.decoder))
    facts = facts_of(counted.units_M, counted.rows)
    ranks = reduce(_plus, each_group(recipe, numbers, _count_ranks, encoder, facts))
    correlation = _correlation(sum(each_group(recipe, numbers, _products, encoder, facts, ranks), np.zeros(6)))
    _save(folder, encoder, facts, ranks)
    left_over = None if fitted.decoder is None else counted.left_over / counted.variance
    report = {
        "format_version": FORMAT_VERSION,
        "label": LABEL,
        "encoder": recipe.encoder,
        "rows": counted.rows,
        "features": len(mean_D),
        "units": len(facts.frequency_M),
        **{name: int(getattr(facts, f"{name}_M").sum()) for name in FACTS[1:]},
        "dense": int((facts.frequency_M > 0.5).sum()),
        "dead_share": facts.dead_share,
        "explained_variance": None if left_over is None else 1 - left_over,
        "rank_correlation": correlation,
        "warning": "representativeness and rarity are one axis" if correlation < OPPOSED else None,
        "losses": fitted.losses,
        "seconds": round(time.time() - begun, 3),
    }
    storage.write_bytes(storage.join(folder, REPORT), json.dumps(report, indent=1).encode())


def _save(folder: str, encoder: Encoder, facts: FactorFacts, ranks: Sequence[RankCounts]) -> None:
    arrays = {
        "offset": encoder.offset_D.numpy(),
        "scale": np.array([encoder.scale, encoder.num_active]),
        "weight": encoder.weight_MD.numpy(),
        "bias": encoder.bias_M.numpy(),
        **{name: getattr(facts, f"{name}_M") for name in FACTS},
        **{
            f"{part}_{field}": array
            for part, counts in zip(PARTS, ranks, strict=True)
            for field, array in counts._asdict().items()
        },
    }
    for name, array in arrays.items():
        with storage.write_atomic(storage.join(folder, f"{name}.npy")) as file:
            np.save(file, array)


class Factors(NamedTuple):
    """What was fitted on a pool: enough to rank any row."""

    encoder: Encoder
    facts: FactorFacts
    ranks: tuple[RankCounts, ...]

    def of(self, rows_ND: np.ndarray) -> dict[str, np.ndarray]:
        """The ranks (n,) float32 of rows, by PARTS."""
        scores = scores_of(rows_ND, self.encoder, self.facts)
        return {part: counts.ranks(score) for part, counts, score in zip(PARTS, self.ranks, scores, strict=True)}


@functools.lru_cache(maxsize=2)
def load_factors(folder: str, key: str) -> Factors:
    """What `_save` wrote; `key` tells two fits in one folder apart."""

    def arrays(*names: str) -> list[np.ndarray]:
        return [np.array(array) for array in mapped_arrays(folder, [f"{name}.npy" for name in names])]

    offset, scale, weight, bias = arrays("offset", "scale", "weight", "bias")
    encoder = Encoder(
        torch.from_numpy(offset), float(scale[0]), torch.from_numpy(weight), torch.from_numpy(bias), int(scale[1])
    )
    ranks = tuple(RankCounts(*arrays(*(f"{part}_{field}" for field in RankCounts._fields))) for part in PARTS)
    return Factors(encoder, FactorFacts(*arrays(*FACTS)), ranks)


# What runs in a task: plain functions of one group of shards.


class _Counted(NamedTuple):
    """Rows that activate each unit (M,), rows in all, squared length that the decoder leaves over, and all of it."""

    units_M: np.ndarray
    rows: int
    left_over: float
    variance: float

    def plus(self, other: _Counted) -> _Counted:
        return _Counted(
            self.units_M + other.units_M,
            self.rows + other.rows,
            self.left_over + other.left_over,
            self.variance + other.variance,
        )


@torch.no_grad()
def _count(
    run: str, numbers: list[int], features: Sequence[str], encoder: Encoder, decoder: SparseAutoencoder | None
) -> _Counted:
    counted = []
    for number in numbers:
        rows_nD = torch.from_numpy(read_features(run, number, features))
        active, rows_nD = encoder.active(rows_nD), encoder.standardised(rows_nD)
        written_nD = rows_nD if decoder is None else decoder.decoded(active) + decoder.before_D
        left_over = float((rows_nD - written_nD).square().sum())
        units_M = count_units(active, len(encoder.weight_MD))
        counted.append(_Counted(units_M, len(rows_nD), left_over, float(rows_nD.square().sum())))
    return reduce(_Counted.plus, counted)


def scores_of(rows_ND: np.ndarray, encoder: Encoder, facts: FactorFacts) -> tuple[np.ndarray, np.ndarray]:
    """Representativeness and rarity of rows, (n,) float32 each, before they are ranked."""
    active = encoder.active(torch.from_numpy(rows_ND))
    return representativeness(active, facts).numpy(), rarity(active, facts).numpy()


def _count_ranks(
    run: str, numbers: list[int], features: Sequence[str], encoder: Encoder, facts: FactorFacts
) -> tuple[RankCounts, ...]:
    scores = (scores_of(read_features(run, number, features), encoder, facts) for number in numbers)
    return reduce(_plus, (tuple(map(RankCounts.of, both)) for both in scores))


def _plus(a: Sequence[RankCounts], b: Sequence[RankCounts]) -> tuple[RankCounts, ...]:
    return tuple(mine.plus(theirs) for mine, theirs in zip(a, b, strict=True))


def _products(
    run: str,
    numbers: list[int],
    features: Sequence[str],
    encoder: Encoder,
    facts: FactorFacts,
    ranks: tuple[RankCounts, ...],
) -> np.ndarray:
    """Sums that make up the correlation of both ranks: n, x, y, xx, yy, xy."""
    total = np.zeros(6)
    for number in numbers:
        found = Factors(encoder, facts, ranks).of(read_features(run, number, features))
        x, y = (found[part].astype(np.float64) for part in PARTS)
        total += [len(x), x.sum(), y.sum(), x @ x, y @ y, x @ y]
    return total


def _correlation(sums: np.ndarray) -> float:
    n, x, y, xx, yy, xy = sums.tolist()
    spread = (n * xx - x * x) * (n * yy - y * y)
    return (n * xy - x * y) / spread**0.5 if spread > 0 else 0.0


@dataclass(frozen=True)
class FactorRanks:
    """Columns PIECE.representativeness and PIECE.rarity; null where a row lacks a feature."""

    piece: str
    features: tuple[str, ...]
    folder: str
    how: tuple[tuple[str, Any], ...]
    key: str

    @property
    def needs(self) -> frozenset[str]:
        """The features."""
        return frozenset(self.features)

    @property
    def made_by(self) -> dict[str, Any]:
        """How the factors were fitted, and what came of it."""
        return {**dict(self.how), "fit": self.key}

    def make(self, table: pa.Table) -> dict[str, pa.Array]:
        """The ranks of each row that has all features."""
        has_value = has_features(table, self.features)
        rows_ND = features_of(table.filter(pa.array(has_value)), self.features)
        found = load_factors(self.folder, self.key).of(rows_ND)
        return {part: stored_columns.aligned(pa.array(ranks), has_value) for part, ranks in found.items()}
