from __future__ import annotations

import pytest
import torch

from curation.numerics import distances
from curation.numerics.distances import nearest_keys, nearest_others, squared_distance_blocks


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "BLOCK_ROWS", 4)
    monkeypatch.setattr(distances, "BLOCK_KEYS", 7)


def drawn(seed: int, n: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.usefixtures("small_blocks")
def test_blocks_tile_the_matrix_of_all_distances() -> None:
    query, key = drawn(0, 10), drawn(1, 16)
    whole = torch.full((10, 16), torch.nan, dtype=torch.float64)
    for block in squared_distance_blocks(query, key):
        assert whole[block.rows, block.keys].isnan().all()
        whole[block.rows, block.keys] = block.squared_RS
    torch.testing.assert_close(whole, torch.cdist(query, key).square())


@pytest.mark.usefixtures("small_blocks")
def test_the_nearest_keys_are_those_of_a_full_sort_and_name_their_places() -> None:
    query, key = drawn(2, 10), drawn(3, 16)
    near, places = nearest_keys(query, key, 3)
    want = torch.cdist(query, key).sort(dim=1)
    torch.testing.assert_close(near, want.values[:, :3])
    assert torch.equal(places, want.indices[:, :3])


def test_rows_far_from_the_origin_keep_their_distances_in_single_precision() -> None:
    query, key = drawn(4, 10, torch.float32), drawn(5, 16, torch.float32)
    (near,) = squared_distance_blocks(query + 1e4, key + 1e4)
    want = torch.cdist((query + 1e4).double(), (key + 1e4).double()).square()
    torch.testing.assert_close(near.squared_RS.double(), want, rtol=1e-3, atol=1e-3)


def test_no_square_is_negative_and_an_equal_row_is_the_nearest() -> None:
    key = drawn(6, 50, torch.float16)
    near, places = nearest_keys(key, key, 1)
    assert torch.equal(places[:, 0], torch.arange(50)) and near.max() < 2e-3 and near.min() >= 0


@pytest.mark.usefixtures("small_blocks")
def test_a_row_is_left_out_of_its_own_neighbours_by_place_so_a_twin_counts() -> None:
    rows = torch.tensor([5.0, 5, 7, 5, 5, 9, 5, 5, 5, 5, 5])[:, None]
    near = nearest_others(rows, 2)
    assert near[2].tolist() == [2, 2] and near[5].tolist() == [2, 4]
    assert (near[rows[:, 0] == 5] == 0).all()
    x = drawn(7, 20)
    torch.testing.assert_close(nearest_others(x, 4), torch.cdist(x, x).sort(dim=1).values[:, 1:5])


def test_what_has_no_distance_is_refused() -> None:
    with pytest.raises(ValueError, match=r"queries must be finite floats \(n, D\), got torch.float64 \(5,\)"):
        nearest_keys(drawn(0, 3)[0], drawn(0, 3), 1)
    with pytest.raises(ValueError, match="keys must be finite floats"):
        nearest_keys(drawn(0, 3), drawn(0, 3) / 0, 1)
    with pytest.raises(ValueError, match="queries and keys must be of one width, got 4 and 5"):
        nearest_keys(drawn(0, 3)[:, :4], drawn(0, 3), 1)
    with pytest.raises(ValueError, match=r"num_neighbors must be in \[1, 3\], the keys, got 4"):
        nearest_keys(drawn(0, 3), drawn(0, 3), 4)
    with pytest.raises(ValueError, match=r"num_neighbors must be in \[1, 2\], the other rows, got 3"):
        nearest_others(drawn(0, 3), 3)
