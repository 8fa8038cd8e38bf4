from __future__ import annotations

import numpy as np
import torch

from curation.training.step_facts import KnownJunk, facts_of, fit_clusters

UIDS = np.array([[5, 0], [1, 9], [1, 2], [2**64 - 1, 7]], dtype=np.uint64)


def rows(words: list[list[int]]) -> torch.Tensor:
    return torch.from_numpy(np.array(words, dtype=np.uint64).view(np.int64))


def test_junk_is_the_share_of_the_rows_that_are_known() -> None:
    junk = KnownJunk(UIDS, np.array([True, False, True, True]))
    assert junk.share(rows([[1, 2], [1, 9]])) == 0.5
    assert junk.share(rows([[2**64 - 1, 7], [5, 0], [1, 2]])) == 1.0
    assert junk.share(rows([[1, 9], [77, 0], [0, 0]])) == 0.0
    assert junk.share(rows([[1, 3], [2**64 - 1, 8]])) is None


def test_facts_see_copies_and_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.nn.functional.normalize(torch.randn(40, 8, generator=generator), dim=1)
    clusters = fit_clusters(image, seed=0)
    assert clusters.shape == (40, 8)
    same = image[:1].expand(10, 8)
    uid = torch.zeros(10, 2, dtype=torch.int64)
    copies = facts_of({"reference_image_embedding": same.half(), "uid": uid}, centroids_KD=clusters, junk=None)
    assert copies == {"effective_clusters": 1.0, "duplicate_share": 1.0, "junk_share": None}
    varied = facts_of({"reference_image_embedding": image[:10], "uid": uid}, centroids_KD=clusters, junk=None)
    assert round(varied["effective_clusters"] or 0, 6) == 10.0 and varied["duplicate_share"] == 0.0


def test_what_cannot_be_told_is_none() -> None:
    assert set(facts_of({"uid": torch.zeros(2, 2)}, centroids_KD=None, junk=None).values()) == {None}
