"""A recipe's made columns: languages, heads, clusters and ratings, as makers of `stored_columns`."""

from __future__ import annotations

import functools
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.nn import functional as F

from curation.data import manifest, storage, tables
from curation.data.mapped import mapped_arrays
from curation.data.pieces import Record
from curation.distributed import stored_columns
from curation.distributed.guards import embedded_by
from curation.distributed.rating_columns import percentile_maker, rating_maker
from curation.distributed.stored_columns import ColumnMaker
from curation.distributed.tasks import in_groups, ordered
from curation.models.heads import Head, HeadLayout, head_digest, load_head
from curation.models.language import Identify, language_model_digest, load_language_model
from curation.numerics.neighbors import fit_centroids, nearest_centroids
from curation.numerics.sampling import tie_hash, uid_words
from curation.recipe import CurateRecipe
from curation.recipe.made_columns import Clusters, EmbeddingHead, Language, MadeColumns, Percentile, Rating

FOLDER = "fit"


def make_columns(recipe: CurateRecipe, samples: Mapping[int, Record], numbers: Sequence[int]) -> None:
    """Make what the recipe's selection reads and is not there yet.

    ValueError if a model cannot be read or does not fit the embeddings, OtherRun if a column is there, made otherwise.
    """
    for column in recipe.columns:
        stored_columns.make(recipe.output, samples, numbers, _maker(recipe.output, column, samples, numbers))


def _maker(output: str, column: MadeColumns, samples: Mapping[int, Record], numbers: Sequence[int]) -> ColumnMaker:
    if isinstance(column, Rating):
        return rating_maker(column)
    if isinstance(column, Percentile):
        return percentile_maker(output, column, numbers, folder=FOLDER)
    if isinstance(column, Language):
        return Languages(column.name, column.model, language_model_digest(column.model))
    if isinstance(column, EmbeddingHead):
        load_head(column.checkpoint, column.layout)  # what is wrong with it is told here, not by every task
        digest = head_digest(column.checkpoint, column.layout)
        return HeadScores(column.name, column.checkpoint, column.layout, column.column, digest)
    return _clusters(output, column, samples, numbers)


@dataclass(frozen=True)
class Languages:
    """Columns PIECE.label and PIECE.probability."""

    piece: str
    model: str
    digest: str
    needs = frozenset({"caption"})

    @property
    def made_by(self) -> dict[str, Any]:
        """The model."""
        return {"language_model": self.digest}

    def make(self, table: pa.Table) -> dict[str, pa.Array]:
        """The likeliest language of each caption; a caption that is null, as cached embeddings may have, has none."""
        captions = table["caption"]
        labels, probabilities = _language_model(self.model, self.digest)(captions.drop_null().to_pylist())
        has_caption = captions.is_valid().to_numpy()
        columns = {"label": pa.array(labels, pa.string()), "probability": pa.array(probabilities, pa.float32())}
        return {part: stored_columns.aligned(values, has_caption) for part, values in columns.items()}


@functools.lru_cache(maxsize=1)
def _language_model(path: str, digest: str) -> Identify:
    _check_file(path, language_model_digest(path), digest)
    return load_language_model(path)


@functools.lru_cache(maxsize=4)
def _head(path: str, layout: HeadLayout, digest: str) -> Head:
    _check_file(path, head_digest(path, layout), digest)
    return load_head(path, layout)


def _check_file(path: str, digest: str, wanted: str) -> None:
    """ValueError if a node's file is not the one by which the column is known."""
    if digest != wanted:
        raise ValueError(f"{path} on {socket.gethostname()} is another file than where the job runs")


@dataclass(frozen=True)
class HeadScores:
    """A column PIECE.score."""

    piece: str
    checkpoint: str
    layout: HeadLayout
    column: str
    digest: str

    @property
    def needs(self) -> frozenset[str]:
        """The embedding."""
        return frozenset({self.column})

    @property
    def made_by(self) -> dict[str, Any]:
        """The head, and what it is a head of."""
        return {"head": self.digest, "column": self.column}

    def make(self, table: pa.Table) -> dict[str, pa.Array]:
        """The head's score of each row that has the embedding."""
        vectors_MD, has_value = stored_columns.vectors_of(table, self.column)
        scores = np.zeros(0, np.float32)
        if len(vectors_MD):
            scores = _head(self.checkpoint, self.layout, self.digest)(vectors_MD)
        return {"score": stored_columns.aligned(pa.array(scores, pa.float32()), has_value)}


@dataclass(frozen=True)
class NearestCluster:
    """Columns PIECE.cluster and, with a target, PIECE.target_rows: how many of its rows are in the same cluster."""

    piece: str
    folder: str
    """Where centroids.npy and target_rows.npy lie."""
    column: str
    has_target: bool
    how: tuple[tuple[str, Any], ...]

    @property
    def needs(self) -> frozenset[str]:
        """The embedding."""
        return frozenset({self.column})

    @property
    def made_by(self) -> dict[str, Any]:
        """The centroids' origin, and the target's."""
        return dict(self.how)

    def make(self, table: pa.Table) -> dict[str, pa.Array]:
        """The cluster of each row that has the embedding."""
        vectors_MD, has_value = stored_columns.vectors_of(table, self.column)
        centroids_KD, target_rows_K = _centroids(self.folder)
        clusters = nearest(vectors_MD, centroids_KD) if len(vectors_MD) else np.zeros(0, np.int32)
        columns = {"cluster": pa.array(clusters, pa.int32())}
        if self.has_target:
            columns["target_rows"] = pa.array(target_rows_K[clusters], pa.int64())
        return {part: stored_columns.aligned(values, has_value) for part, values in columns.items()}


def nearest(rows_ND: np.ndarray, centroids_KD: np.ndarray) -> np.ndarray:
    """The cluster of each row, (n,) int32, by cosine."""
    rows = F.normalize(torch.from_numpy(np.array(rows_ND, np.float32)), dim=1)
    return nearest_centroids(rows, torch.from_numpy(np.array(centroids_KD))).numpy().astype(np.int32)


@functools.lru_cache(maxsize=4)
def _centroids(folder: str) -> tuple[np.ndarray, np.ndarray]:
    centroids_KD, target_rows_K = mapped_arrays(folder, ["centroids.npy", "target_rows.npy"])
    return centroids_KD, target_rows_K


def _clusters(output: str, column: Clusters, samples: Mapping[int, Record], numbers: Sequence[int]) -> NearestCluster:
    """The maker of clusters; the centroids are fitted once, and stay when shards are added to the pool."""
    how: dict[str, Any] = {
        "column": column.column,
        "num_clusters": column.num_clusters,
        "rows_per_cluster": column.rows_per_cluster,
        "seed": column.seed,
    }
    target: Mapping[int, Record] = {}
    run = storage.absolute(column.target) if column.target else ""
    if column.target:
        target = embedded_by(run, what=f"columns {column.name!r}: target", samples=samples, numbers=numbers)
        how["target"] = manifest.digest([[n, target[n]["sha256"], target[n]["key"]] for n in sorted(target)])
    folder = storage.join(output, FOLDER, f"{column.name}-{manifest.digest(how)[:8]}")
    if not storage.exists(storage.join(folder, "target_rows.npy")):
        limit = column.num_clusters * column.rows_per_cluster
        rows_ND = sampled_rows(output, numbers, column.column, limit=limit)
        if len(rows_ND) < column.num_clusters:
            raise ValueError(f"columns {column.name!r}: {column.num_clusters} clusters of {len(rows_ND)} rows")
        unit_ND = F.normalize(torch.from_numpy(rows_ND.astype(np.float32)), dim=1)
        centroids = fit_centroids(unit_ND, num_clusters=column.num_clusters, seed=column.seed, max_rows=limit).numpy()
        _save(storage.join(folder, "centroids.npy"), centroids)
        counts = np.zeros(column.num_clusters, np.int64)
        inputs = ((run, group, column.column, folder) for group in in_groups(sorted(target)))
        for part in ordered(_count_target, inputs):
            counts += part
        _save(storage.join(folder, "target_rows.npy"), counts)
    return NearestCluster(column.name, folder, column.column, bool(target), tuple(sorted(how.items())))


def sampled_rows(output: str, numbers: Sequence[int], column: str, *, limit: int) -> np.ndarray:
    """At most `limit` vectors (m, D) float16 of a pool, those of the lowest hash of the uid, in that order.

    So the same rows for any order and number of shards, and memory is that of twice the sample.
    """
    parts = ordered(_lowest_of, ((output, group, column, limit) for group in in_groups(numbers)))
    ties, vectors = _lowest(parts, limit)
    assert len(ties) == len(vectors)
    return vectors


def _lowest(parts: Iterable[tuple[np.ndarray, np.ndarray]], limit: int) -> tuple[np.ndarray, np.ndarray]:
    """The `limit` rows of the lowest hashes (m,) uint64 of all parts, ascending, with their vectors (m, D)."""
    best: tuple[np.ndarray, np.ndarray] | None = None
    for part in parts:
        merged = part if best is None else tuple(map(np.concatenate, zip(best, part, strict=True)))
        order = np.argsort(merged[0], kind="stable")[:limit]
        best = merged[0][order], merged[1][order]
    return best if best is not None else (np.zeros(0, np.uint64), np.zeros((0, 1), np.float16))


def _save(url: str, array: np.ndarray) -> None:
    with storage.write_atomic(url) as out:
        np.save(out, array)


# What runs in a task.


def _lowest_of(output: str, numbers: list[int], column: str, limit: int) -> tuple[np.ndarray, np.ndarray]:
    def each() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for number in numbers:
            table = _with_vectors(output, number, column, ["uid"])
            yield tie_hash(uid_words(table["uid"].to_pylist())), tables.as_array(table[column], name=column)

    return _lowest(each(), limit)


def _count_target(run: str, numbers: list[int], column: str, folder: str) -> np.ndarray:
    """How many of a target's rows are nearest to each centroid, (K,) int64."""
    centroids_KD = mapped_arrays(folder, ["centroids.npy"])[0]
    counts = np.zeros(len(centroids_KD), np.int64)
    for number in numbers:
        table = _with_vectors(run, number, column, [])
        if table.num_rows:
            clusters = nearest(tables.as_array(table[column], name=column), centroids_KD)
            counts += np.bincount(clusters, minlength=len(counts))
    return counts


def _with_vectors(run: str, number: int, column: str, others: list[str]) -> pa.Table:
    """Columns of the rows of a shard that have a vector."""
    table = tables.read(run, number, ["status", column, *others])
    return table.filter((pc.field("status") == "ok") & pc.field(column).is_valid())
