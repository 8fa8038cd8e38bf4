"""Typicality: choose rows of dense regions that keep their distance from one another, neither outliers nor copies.

Source: the rule of a Lightly blog post on curation for generative models, whose formula is not published; typicality
itself is TypiClust's (Hacohen et al. 2022, arXiv:2202.02794, Eq. 1: the inverse of the mean distance to the 20 nearest
neighbours). The distance to what is chosen is the local spacing of what is left, typicality the inverse of the local
spacing, so their product takes from each region in proportion to its own spacing.

Variants, by `rule`:

    product     argmax of distance^sd * typicality^sw, begun with the most typical row; ours, recommended
    lightly     argmax of sd log(A + distance^2) + sw log(W + w), A and W the sums of squared nearest distances and of w
                over what is chosen, w = mean exp(-distance / mean distance): what lightly-mundig 0.1.16 does (inferred
                from its behaviour). A and W grow, so it soon adds where the product multiplies, and takes outliers
    typiclust   the authors' code: k-means, then cluster after cluster, largest first, the most typical row inside it
    top         the most typical rows, whatever their distance

Deviations. Typicality is capped at its 99.9% quantile, because copies have a mean distance of nearly 0. TypiClust has
no labelled rows here, and when all clusters of more than 5 rows are used up it goes on with the small ones instead of
failing; its typicality is of squared distances, as in the released code.

N rows, D embedding, Q neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from curation.methods._in_memory import canonical_order, check_bucket_sizes, chosen_rows, unit_rows
from curation.numerics.greedy import greedy_by_distance, greedy_by_spacing
from curation.numerics.neighbors import fit_centroids, nearest_centroids, nearest_distances
from curation.selector import Rows, Selection, check_keep, check_needs, num_rows

RULES = ("product", "lightly", "typiclust", "top")
EPSILON = 1e-5
CAP_QUANTILE = 0.999
COPY_DISTANCE = 1e-12
"""What a copy of a chosen row counts as distant, so that copies come last, and among them the typical first."""
SMALL_CLUSTER = 5


def inverse_typicality(distances_NQ: Tensor) -> Tensor:
    """1 / (mean distance to the neighbours + 1e-5), (N,), capped at its 99.9% quantile. TypiClust, Eq. 1."""
    typicality_N = 1 / (distances_NQ.mean(dim=1) + EPSILON)
    return typicality_N.minimum(typicality_N.quantile(CAP_QUANTILE))


def exponential_typicality(distances_NQ: Tensor) -> Tensor:
    """Mean over the neighbours of exp(-distance / mean of all the distances), (N,); 1 if all rows are equal."""
    mean = distances_NQ.mean()
    return torch.ones_like(distances_NQ[:, 0]) if mean == 0 else torch.exp(-distances_NQ / mean).mean(dim=1)


def product_rule(rows_ND: Tensor, typicality_N: Tensor, *, keep: int, sd: float, sw: float) -> Tensor:
    """Rows (keep,) int64: the most typical, then each time argmax of distance^sd * typicality^sw."""
    weights_N = typicality_N**sw

    def score(nearest2_M: Tensor, places_M: Tensor) -> Tensor:
        return nearest2_M.clamp_min(COPY_DISTANCE**2) ** (sd / 2) * weights_N[places_M]

    return greedy_by_spacing(rows_ND, keep=keep, first=int(typicality_N.argmax()), score=score)


def accumulating_rule(rows_ND: Tensor, typicality_N: Tensor, *, keep: int, sd: float, sw: float) -> Tensor:
    """Rows (keep,) int64: the most typical, then each time argmax of sd log(A + distance^2) + sw log(W + typicality).

    The least positive float32 is added to A, so that copies of a single chosen row have a logarithm.
    """

    def scores(nearest2_N: Tensor, chosen: list[int]) -> Tensor:
        among_chosen = nearest2_N[chosen].sum() if len(chosen) > 1 else nearest2_N.new_zeros(())
        tiny = torch.finfo(nearest2_N.dtype).tiny
        return sd * (among_chosen + nearest2_N + tiny).log() + sw * (typicality_N[chosen].sum() + typicality_N).log()

    return greedy_by_distance(rows_ND, keep=keep, first=int(typicality_N.argmax()), scores=scores)


def typiclust(rows_ND: Tensor, *, keep: int, num_neighbors: int, max_clusters: int, seed: int) -> Tensor:
    """Rows (keep,) int64: by turns of the clusters, largest first, the most typical row that is left in each."""
    num_clusters = min(keep, max_clusters)
    centroids_KD = fit_centroids(rows_ND, num_clusters=num_clusters, seed=seed, spherical=False)
    clusters_N = nearest_centroids(rows_ND, centroids_KD)
    sizes = torch.bincount(clusters_N, minlength=num_clusters)
    by_size = sizes.sort(descending=True, stable=True).indices.tolist()
    left = {cluster: (clusters_N == cluster).nonzero().flatten() for cluster in by_size}
    chosen: list[int] = []
    for group in (
        [cluster for cluster in by_size if sizes[cluster] > SMALL_CLUSTER],
        [cluster for cluster in by_size if sizes[cluster] <= SMALL_CLUSTER],
    ):
        while len(chosen) < keep and any(len(left[cluster]) for cluster in group):
            for cluster in [cluster for cluster in group if len(left[cluster])][: keep - len(chosen)]:
                place = _most_typical(rows_ND[left[cluster]], num_neighbors=num_neighbors)
                chosen.append(int(left[cluster][place]))
                left[cluster] = torch.cat([left[cluster][:place], left[cluster][place + 1 :]])
    return torch.tensor(chosen, dtype=torch.int64, device=rows_ND.device)


def _most_typical(rows_ND: Tensor, *, num_neighbors: int) -> int:
    """Place of the row with the least mean squared distance to its neighbours; the first, if none has a neighbour."""
    num_neighbors = min(num_neighbors, len(rows_ND) // 2)
    return int(nearest_distances(rows_ND, num_neighbors).square().mean(dim=1).argmin()) if num_neighbors else 0


@dataclass(frozen=True)
class Typicality:
    """Typical rows that keep their distance; each distance is the Euclidean one of unit vectors."""

    rule: Literal["product", "lightly", "typiclust", "top"] = "product"
    num_neighbors: int = 20
    """Neighbours of which typicality is made; fewer where there are fewer rows."""
    distance_strength: float = 1.0
    """sd. Product and lightly only."""
    typicality_strength: float = 1.0
    """sw. Product and lightly only; 2 already collapses the product onto the densest clusters."""
    max_clusters: int = 500
    """Typiclust only: at most this many, fewer if fewer rows are kept."""
    column: str = "image_embedding"
    """Which vectors: ours, or a later column such as one of `jobs.fit features`."""
    exact_rows: int = 100_000
    """Up to so many rows of a pool are chosen from as one set."""
    bucket_rows: int = 20_000
    """Above that, k-means cuts the pool into buckets of about this many, and each has its quota."""
    fixed_size = True
    unbiased = False

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"rule must be one of {RULES}, got {self.rule!r}")
        for name in ("num_neighbors", "max_clusters"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("distance_strength", "typicality_strength"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be finite and at least 0, got {getattr(self, name)}")
        check_bucket_sizes(self)

    @property
    def needs(self) -> frozenset[str]:
        """The vectors, and the uid for ties."""
        return frozenset({self.column, "uid"})

    @property
    def records(self) -> Literal["score"]:
        """The ledger keeps the typicality."""
        return "score"

    @property
    def bucket_by(self) -> Literal["clusters"]:
        """A large pool is cut by k-means."""
        return "clusters"

    @property
    def quota(self) -> Literal["proportional"]:
        """By rows: the product takes from each region in proportion to what is in it."""
        return "proportional"

    def score(self, rows: Rows, progress: float) -> Tensor:
        """Typicality (n,) float32 among these rows; 0 for an only one."""
        check_needs(self, rows)
        return self._typicality(unit_rows(rows, self.column))

    def select(self, rows: Rows, keep: int | None, progress: float, rng: Generator) -> Selection:
        """`keep` rows in the order of choice, weight 1 each; the same samples for any order of the rows.

        Only typiclust draws from `rng`, the seed of its clusters.
        """
        check_needs(self, rows)
        return self.select_scored(rows, check_keep(keep, num_rows(rows)), progress, rng)[0]

    def select_scored(self, rows: Rows, keep: int, progress: float, rng: Generator) -> tuple[Selection, Tensor]:
        """The same, and all rows' typicality (n,)."""
        order = canonical_order(rows)
        rows_ND = unit_rows(rows, self.column)[order]
        typicality_N = self._typicality(rows_ND)
        scores_N = torch.empty_like(typicality_N)
        scores_N[order] = typicality_N
        return chosen_rows(order, self._chosen(rows_ND, typicality_N, keep, rng) if keep else order[:0]), scores_N

    def _chosen(self, rows_ND: Tensor, typicality_N: Tensor, keep: int, rng: Generator) -> Tensor:
        if self.rule == "typiclust":
            seed = int(torch.randint(2**31 - 1, (), generator=rng, device=rng.device))
            return typiclust(
                rows_ND, keep=keep, num_neighbors=self.num_neighbors, max_clusters=self.max_clusters, seed=seed
            )
        if self.rule == "top":
            return typicality_N.sort(descending=True, stable=True).indices[:keep]
        by_rule = product_rule if self.rule == "product" else accumulating_rule
        return by_rule(rows_ND, typicality_N, keep=keep, sd=self.distance_strength, sw=self.typicality_strength)

    def _typicality(self, rows_ND: Tensor) -> Tensor:
        num_neighbors = min(self.num_neighbors, len(rows_ND) - 1)
        if num_neighbors < 1:
            return rows_ND.new_zeros(len(rows_ND))
        distances_NQ = nearest_distances(rows_ND, num_neighbors)
        return exponential_typicality(distances_NQ) if self.rule == "lightly" else inverse_typicality(distances_NQ)
