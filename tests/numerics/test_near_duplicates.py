from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from curation.numerics.near_duplicates import highest_cosine_before


def test_by_hand():
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [1.0, 0.0]])
    torch.testing.assert_close(highest_cosine_before(rows), torch.tensor([-1.0, 0.0, 0.8, 1.0]))


@pytest.mark.parametrize("block_rows", [1, 3, 64, 100])
def test_it_is_the_highest_of_the_triangle_whatever_the_block(block_rows):
    rows = F.normalize(torch.randn(65, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    triangle = (rows @ rows.T).masked_fill(torch.ones(65, 65).triu().bool(), -1.0)
    torch.testing.assert_close(highest_cosine_before(rows, block_rows=block_rows), triangle.amax(dim=1))


def test_no_rows_and_one_row():
    assert highest_cosine_before(torch.zeros(0, 3)).shape == (0,)
    assert highest_cosine_before(torch.ones(1, 1)).tolist() == [-1.0]
