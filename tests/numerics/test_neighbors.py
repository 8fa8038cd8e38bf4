from __future__ import annotations

import faiss
import pytest
import torch
from torch.nn import functional as F

from curation.numerics.neighbors import fit_centroids, nearest_centroids, similar_pairs


def blobs(num_blobs, rows_each, *, seed=0, width=16, noise=0.05):
    rng = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(num_blobs, width, generator=rng), dim=1)
    rows = centres.repeat_interleave(rows_each, dim=0) + noise * torch.randn(
        num_blobs * rows_each, width, generator=rng
    )
    return F.normalize(rows, dim=1)


def test_separate_blobs_become_clusters_of_their_own():
    rows = blobs(5, 40)
    centroids = fit_centroids(rows, num_clusters=5, seed=1)
    assert centroids.shape == (5, 16)
    assert centroids.dtype == torch.float32
    torch.testing.assert_close(centroids.norm(dim=1), torch.ones(5))
    clusters = nearest_centroids(rows, centroids).reshape(5, 40)
    assert (clusters == clusters[:, :1]).all()
    assert len(clusters[:, 0].unique()) == 5


@pytest.fixture
def faiss_threads():
    before = faiss.omp_get_max_threads()
    yield faiss.omp_set_num_threads
    faiss.omp_set_num_threads(before)


def test_an_equal_seed_gives_equal_centroids_for_any_number_of_threads(faiss_threads):
    rows, fits = blobs(30, 20, noise=0.5), []
    for threads in (1, 2, 1):
        faiss_threads(threads)
        fits.append(fit_centroids(rows, num_clusters=10, seed=3, max_rows=400))
    assert torch.equal(fits[0], fits[1])
    assert torch.equal(fits[0], fits[2])
    assert not torch.equal(fits[0], fit_centroids(rows, num_clusters=10, seed=4, max_rows=400))


def test_the_sample_is_drawn_from_all_rows():
    rows = blobs(5, 40)  # blob after blob, so the first 60 rows are from two of them
    centroids = fit_centroids(rows, num_clusters=15, seed=1, max_rows=60)
    assert (rows @ centroids.T).amax(dim=1).min() > 0.9


def test_global_random_state_is_left_as_it_was():
    before = torch.get_rng_state()
    fit_centroids(blobs(3, 20), num_clusters=3, seed=0, max_rows=30)
    assert torch.equal(torch.get_rng_state(), before)


def test_as_many_clusters_as_rows_puts_a_centroid_on_each():
    rows = blobs(4, 1)
    centroids = fit_centroids(rows, num_clusters=4, seed=0)
    assert sorted(nearest_centroids(rows, centroids).tolist()) == [0, 1, 2, 3]


def test_centroids_that_are_not_spherical_are_means():
    rows = torch.tensor([[0.0, 0.0], [0.0, 2.0], [10.0, 0.0], [10.0, 4.0]])
    centroids = fit_centroids(rows, num_clusters=2, seed=0, spherical=False)
    assert sorted(centroids.tolist()) == [[0.0, 1.0], [10.0, 2.0]]


def test_the_nearest_centroid_is_that_of_all_distances_in_blocks_of_any_size():
    rows, centroids = blobs(20, 10, noise=1.0), blobs(7, 1, seed=1)
    expected = torch.cdist(rows.double(), centroids.double()).argmin(dim=1)
    for block_rows in (1, 33, 65_536):
        assert torch.equal(nearest_centroids(rows, centroids, block_rows=block_rows), expected)
    assert torch.equal(nearest_centroids(rows.half().float(), centroids), nearest_centroids(rows.half(), centroids))
    none = nearest_centroids(rows[:0], centroids)
    assert none.shape == (0,)
    assert none.dtype == torch.int64


@pytest.mark.parametrize(("fields", "complaint"), [
    ({"num_clusters": 31}, r"num_clusters must be in \[1, 30\], the rows to fit on, got 31"),
    ({"num_clusters": 9, "max_rows": 8}, r"num_clusters must be in \[1, 8\], the rows to fit on, got 9"),
    ({"num_clusters": 0}, r"num_clusters must be in \[1, 0\], the rows to fit on, got 0"),
    ({"num_clusters": 3, "num_iterations": 0}, "num_iterations must be at least 1, got 0"),
])  # fmt: skip
def test_clusters_that_cannot_be_fitted_are_refused(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        fit_centroids(blobs(3, 10), seed=0, **fields)


def test_malformed_rows_and_centroids_are_refused():
    rows = torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"rows must be floats \(N, D\), got torch.float32 \(4,\)"):
        fit_centroids(torch.ones(4), num_clusters=2, seed=0)
    with pytest.raises(ValueError, match=r"rows must be floats \(N, D\), got torch.int64 \(4, 3\)"):
        nearest_centroids(rows.long(), rows)
    with pytest.raises(ValueError, match="rows must be finite, row 2 is not"):
        fit_centroids(rows.index_fill(0, torch.tensor([2]), torch.nan), num_clusters=2, seed=0)
    with pytest.raises(ValueError, match="centroids must be finite, row 0 is not"):
        nearest_centroids(rows, rows * torch.inf)
    with pytest.raises(ValueError, match=r"centroids must be \(K, 3\) with K >= 1 to fit the rows, got \(4, 2\)"):
        nearest_centroids(rows, rows[:, :2])
    with pytest.raises(ValueError, match=r"centroids must be \(K, 3\) with K >= 1 to fit the rows, got \(0, 3\)"):
        nearest_centroids(rows, rows[:0])
    with pytest.raises(ValueError, match="block_rows must be at least 1, got 0"):
        nearest_centroids(rows, rows, block_rows=0)


def test_similar_pairs_are_those_of_all_cosines():
    rows = blobs(6, 20, noise=0.2)
    cosines = rows @ rows.T
    expected = (cosines.triu(diagonal=1) > 0.8).nonzero()
    assert 0 < len(expected) < 7140
    assert torch.equal(similar_pairs(rows, min_cosine=0.8), expected)
    assert similar_pairs(rows[:1], min_cosine=0.8).shape == (0, 2)
