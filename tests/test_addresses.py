import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation import addresses
from curation.addresses import MAX_ROWS_PER_SHARD, MAX_SHARDS


@given(
    shard=st.integers(0, MAX_SHARDS - 1),
    rows=st.lists(st.integers(0, MAX_ROWS_PER_SHARD - 1), max_size=20),
)
def test_an_address_unpacks_to_the_shard_and_row_it_was_packed_from(shard, rows):
    packed = addresses.pack(shard, np.array(rows, dtype=np.int64))
    assert packed.dtype == np.int64
    assert (packed >= 0).all()
    assert addresses.shard_of(packed).tolist() == [shard] * len(rows)
    assert addresses.row_of(packed).tolist() == rows


def test_an_address_is_shard_number_times_2_20_plus_row():
    assert addresses.pack(3, np.array([0, 7])).tolist() == [3 * 2**20, 3 * 2**20 + 7]


@pytest.mark.parametrize("shard", [-1, MAX_SHARDS])
def test_a_shard_number_out_of_range_is_refused(shard):
    with pytest.raises(ValueError, match=r"shard number must be in \[0, 8796093022208\), got"):
        addresses.pack(shard, np.array([0]))


@pytest.mark.parametrize("row", [-1, MAX_ROWS_PER_SHARD])
def test_a_row_out_of_range_is_refused(row):
    with pytest.raises(ValueError, match=r"rows must be in \[0, 1048576\)"):
        addresses.pack(0, np.array([0, row]))


@given(sizes=st.lists(st.integers(0, 9), max_size=8))
def test_flat_positions_number_the_rows_of_all_shards_without_gaps(sizes):
    offsets = addresses.prefix_sums(np.array(sizes, dtype=np.int64))
    all_rows = [addresses.pack(shard, np.arange(size)) for shard, size in enumerate(sizes)]
    flat = addresses.flat_positions(np.concatenate([np.zeros(0, np.int64), *all_rows]), offsets)
    assert flat.tolist() == list(range(sum(sizes)))
    assert offsets[-1] == sum(sizes)


@pytest.mark.parametrize("size", [-1, MAX_ROWS_PER_SHARD + 1])
def test_a_shard_size_out_of_range_is_refused(size):
    with pytest.raises(ValueError, match=r"shard sizes must be in \[0, 1048576\]"):
        addresses.prefix_sums(np.array([1, size]))


@pytest.mark.parametrize(
    ("shard", "row"),
    [(0, 2), (1, 0), (2, 3), (3, 0), (MAX_SHARDS - 1, 0)],
    ids=["row past its shard", "empty shard", "row past the last shard", "shard past the last", "largest shard"],
)
def test_an_address_that_no_shard_holds_is_named(shard, row):
    offsets = addresses.prefix_sums(np.array([2, 0, 3]))
    wrong = addresses.pack(shard, np.array([row]))
    with pytest.raises(KeyError, match=f"address {wrong[0]} is not in the pool"):
        addresses.flat_positions(np.concatenate([addresses.pack(0, np.array([1])), wrong]), offsets)


def test_a_negative_address_and_an_empty_pool_hold_nothing():
    with pytest.raises(KeyError, match="address -5 is not in the pool"):
        addresses.flat_positions(np.array([-5]), addresses.prefix_sums(np.array([2])))
    with pytest.raises(KeyError, match="address 0 is not in the pool"):
        addresses.flat_positions(np.array([0]), addresses.prefix_sums(np.array([], dtype=np.int64)))
