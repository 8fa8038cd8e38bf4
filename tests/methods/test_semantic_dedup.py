from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Generator, Tensor

from curation.methods.exact_duplicates import ExactDuplicates
from curation.methods.semantic_dedup import SemanticDedup
from curation.selector import Rows, take
from jobs.planted_pool import planted_pool


def on_circle(*degrees: float) -> Tensor:
    return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])


def rows_of(vectors: Tensor, **columns: Tensor) -> Rows:
    uid = torch.randint(-(2**62), 2**62, (len(vectors), 2), generator=Generator().manual_seed(3))
    return {"image_embedding": vectors, "uid": uid, **columns}


def kept(selector, rows: Rows) -> list[int]:
    return selector.select(rows, None, 0.0, Generator()).indices.tolist()


def test_of_a_group_the_one_farthest_from_the_mean_stays():
    # The mean points at about 45 degrees; 10 and 12 are near copies, and so are 80 and 79.
    rows = rows_of(on_circle(10, 12, 45, 80, 79))
    assert kept(SemanticDedup(min_cosine=math.cos(math.radians(3))), rows) == [0, 2, 3]


def test_of_a_group_the_best_of_a_column_stays_and_no_value_is_the_worst():
    score = torch.tensor([0.1, 0.9, 0.5, torch.nan, 0.2])
    rows = rows_of(on_circle(10, 12, 45, 80, 79), clip_score=score)
    assert kept(SemanticDedup(min_cosine=math.cos(math.radians(3)), prefer="clip_score"), rows) == [1, 2, 4]


def test_a_row_falls_to_a_preferred_one_even_if_that_falls_itself():
    # A chain 0 - 2 - 4 - 6 degrees, the first preferred: 4 is near to 2, 2 to 0; so 0 alone stays.
    score = torch.tensor([4.0, 3.0, 2.0, 1.0])
    rows = rows_of(on_circle(0, 2, 4, 6), clip_score=score)
    selector = SemanticDedup(min_cosine=math.cos(math.radians(3)), prefer="clip_score")
    assert kept(selector, rows) == [0]
    # With the two ends preferred, both stay.
    assert kept(selector, {**rows, "clip_score": torch.tensor([4.0, 1.0, 2.0, 3.0])}) == [0, 3]


def test_the_score_is_one_minus_the_highest_cosine_with_a_preferred_row():
    score = torch.tensor([1.0, 3.0, 2.0])
    found = SemanticDedup(prefer="clip_score").score(rows_of(on_circle(0, 60, 90), clip_score=score), 0.0)
    torch.testing.assert_close(found, torch.tensor([1 - 0.5, 2.0, 1 - math.cos(math.radians(30))]))


def test_a_lower_threshold_removes_what_a_higher_one_does_and_more():
    pool = planted_pool(seed=0)
    rows = rows_of(pool.rows)
    stay = [set(kept(SemanticDedup(min_cosine=cosine), rows)) for cosine in (0.9999, 0.95, 0.9, 0.5)]
    assert all(fewer < more for more, fewer in itertools.pairwise(stay))


def test_planted_copies_fall_and_nothing_else_does():
    pool = planted_pool(seed=1)
    left_out = set(range(len(pool.rows))) - set(kept(SemanticDedup(min_cosine=0.999), rows_of(pool.rows)))
    copies = {row for row, original in enumerate(pool.copy_of.tolist()) if original >= 0}
    originals = {pool.copy_of[row].item() for row in copies}
    assert len(left_out) == len(copies)
    assert left_out <= copies | originals


@pytest.mark.parametrize("prefer", ["farthest", "clip_score"])
def test_the_order_of_the_rows_does_not_matter(prefer):
    vectors = planted_pool(seed=2, width=16).rows[:300]
    rows = rows_of(vectors, clip_score=torch.zeros(300))
    permutation = torch.randperm(300, generator=Generator().manual_seed(4))
    selector = SemanticDedup(min_cosine=0.97, prefer=prefer)
    permuted = permutation[torch.tensor(kept(selector, take(rows, permutation)))]
    assert sorted(permuted.tolist()) == kept(selector, rows)
    assert len(permuted) < 300


def test_no_rows_stay_of_none():
    assert kept(SemanticDedup(), rows_of(torch.zeros(0, 4))) == []


def test_a_number_of_rows_cannot_be_asked_for():
    with pytest.raises(ValueError, match="keep must be None, how many rows stay is the outcome; got 3"):
        SemanticDedup().select(rows_of(on_circle(1, 2, 3)), 3, 0.0, Generator())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_cosine": 1.5}, r"min_cosine must be in \(-1, 1\], got 1.5"),
        ({"bucket_rows": 0}, r"bucket_rows must be in \[1, exact_rows\], got 0 and 20000"),
        ({"bucket_rows": 50, "exact_rows": 49}, r"bucket_rows must be in \[1, exact_rows\], got 50 and 49"),
    ],
)
def test_fields_out_of_range_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        SemanticDedup(**fields)


def test_of_equal_images_the_best_scoring_stays():
    sha256 = torch.tensor([[1, 1], [1, 2], [1, 1], [1, 2], [1, 1]])
    score = torch.tensor([0.1, 0.2, 0.3, torch.nan, 0.3])
    rows = rows_of(on_circle(1, 2, 3, 4, 5), sha256=sha256, clip_score=score)
    stay = kept(ExactDuplicates(), rows)
    assert stay[0] == 1 and len(stay) == 2 and stay[1] in (2, 4)  # 2 and 4 are equal: the hash of the uid decides
    permutation = torch.tensor([4, 3, 2, 1, 0])
    permuted = kept(ExactDuplicates(), take(rows, permutation))
    assert sorted(permutation[permuted].tolist()) == stay
