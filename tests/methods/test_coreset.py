from __future__ import annotations

import pytest
import torch
from torch import Generator

from curation.methods.coreset import Coreset
from curation.selector import Rows, take


@pytest.fixture
def rows() -> Rows:
    rng = Generator().manual_seed(0)
    return {
        "image_embedding": torch.randn(200, 6, generator=rng) * 3,
        "uid": torch.randint(-(2**62), 2**62, (200, 2), generator=rng),
    }


def radius(rows: Rows, chosen: torch.Tensor) -> float:
    unit = torch.nn.functional.normalize(rows["image_embedding"], dim=1)
    return float(torch.cdist(unit, unit[chosen]).min(dim=1).values.max())


def test_what_is_kept_covers_the_rest_better_than_a_random_draw(rows):
    chosen = Coreset().select(rows, 40, 0.0, Generator().manual_seed(1)).indices
    at_random = [torch.randperm(200, generator=Generator().manual_seed(seed))[:40] for seed in range(5)]
    assert radius(rows, chosen) < min(radius(rows, drawn) for drawn in at_random)


def test_the_first_row_is_drawn_evenly_by_the_seed(rows):
    firsts = [int(Coreset().select(rows, 1, 0.0, Generator().manual_seed(seed)).indices) for seed in range(400)]
    counts = torch.bincount(torch.tensor(firsts), minlength=200)
    assert counts.max() <= 10  # of 400 in 200 places: above that with a chance of 10**-4
    assert (counts > 0).sum() > 150


def test_the_order_of_the_rows_does_not_matter(rows):
    permutation = torch.randperm(200, generator=Generator().manual_seed(2))
    plain, permuted = (
        Coreset().select(r, 50, 0.0, Generator().manual_seed(3)).indices for r in (rows, take(rows, permutation))
    )
    assert torch.equal(permutation[permuted], plain)


def test_the_score_is_the_distance_from_the_mean():
    vectors = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
    rows = {"image_embedding": vectors, "uid": torch.arange(6).reshape(3, 2)}
    expected = torch.tensor([2**0.5 / 3, 8**0.5 / 3, 2**0.5 / 3])
    torch.testing.assert_close(Coreset().score(rows, 0.0), expected)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (torch.ones(3), r"column 'image_embedding' must hold vectors \(n, D\), got \(3,\)"),
        (torch.tensor([[1.0], [0.0], [1.0]]), "must be finite and not zero, row 1 has norm 0.0"),
        (torch.tensor([[1.0], [torch.nan], [1.0]]), "must be finite and not zero, row 1 has norm nan"),
    ],
)
def test_vectors_without_a_direction_are_refused(vectors, message):
    with pytest.raises(ValueError, match=message):
        Coreset().select({"image_embedding": vectors, "uid": torch.arange(6).reshape(3, 2)}, 1, 0.0, Generator())


def test_another_column_may_be_named(rows):
    other = {"features": rows["image_embedding"], "uid": rows["uid"]}
    assert Coreset(column="features").needs == {"features", "uid"}
    chosen = Coreset(column="features").select(other, 20, 0.0, Generator().manual_seed(4)).indices
    assert torch.equal(chosen, Coreset().select(rows, 20, 0.0, Generator().manual_seed(4)).indices)
