import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.data.uid_sort import ROW_DTYPE, UidSort, later_copies, splitters

WORD = st.one_of(st.integers(0, 3), st.integers(0, 2**64 - 1), st.sampled_from([2**63 - 1, 2**63, 255 << 56, 256]))
UIDS = st.lists(st.tuples(WORD, WORD), max_size=60).map(lambda uids: np.array(uids, np.uint64).reshape(-1, 2))


def sort(words, addresses, *, bounds, rows_per_bucket=4, splits=()):
    """The blocks of a sort to which the rows were added in parts."""
    with tempfile.TemporaryDirectory() as folder:
        by_uid = UidSort(Path(folder), splitters_P2=bounds, rows_per_bucket=rows_per_bucket)
        for part in np.split(np.arange(len(words)), splits):
            by_uid.add(words[part], addresses[part])
        return [block.copy() for block in by_uid.sorted_blocks()]


def in_memory(words, addresses):
    return sorted(zip(words[:, 0].tolist(), words[:, 1].tolist(), addresses.tolist(), strict=True))


def whole(blocks):
    return np.concatenate([np.zeros(0, ROW_DTYPE), *blocks])


@settings(max_examples=150, deadline=None)
@given(words=UIDS, sample=UIDS, splits=st.lists(st.integers(0, 60), max_size=4).map(sorted), seed=st.integers(0, 9))
def test_any_uids_in_any_parts_between_any_splitters_come_back_as_an_in_memory_sort_has_them(
    words, sample, splits, seed
):
    addresses = np.random.default_rng(seed).permutation(len(words)).astype(np.int64) - 5
    bounds = splitters(sample, num_rows=len(words), rows_per_bucket=4)
    blocks = sort(words, addresses, bounds=bounds, splits=splits)
    assert whole(blocks).tolist() == in_memory(words, addresses)
    ends = [set(map(tuple, block[["high", "low"]].tolist())) for block in blocks]
    assert len(set().union(*ends)) == sum(map(len, ends)), "a uid is in two blocks"


@settings(max_examples=60, deadline=None)
@given(words=UIDS)
def test_later_copies_are_all_but_the_lowest_address_of_each_uid(words):
    addresses = np.arange(len(words))[::-1].astype(np.int64)
    blocks = sort(words, addresses, bounds=splitters(words, num_rows=len(words), rows_per_bucket=4))
    lowest: dict[tuple, int] = {}
    for uid, address in zip(map(tuple, words.tolist()), addresses.tolist(), strict=True):
        lowest[uid] = min(address, lowest.get(uid, address))
    found = sorted(np.concatenate([np.zeros(0, np.int64), *map(later_copies, blocks)]).tolist())
    assert found == sorted(set(addresses.tolist()) - set(lowest.values()))


def hashes(n, rng):
    return rng.integers(0, 2**64, (n, 2), dtype=np.uint64)


def counters(n, rng):
    """Zero-padded decimal numbers, read as hex digits: the first word is always 0."""
    return np.array([[0, int(str(i), 16)] for i in range(n)], np.uint64)


@pytest.mark.parametrize("uids", [hashes, counters])
def test_buckets_are_even_whatever_the_uids_look_like(tmp_path, uids):
    rng = np.random.default_rng(0)
    words = uids(50_000, rng)
    bounds = splitters(words[rng.integers(0, len(words), 5_000)], num_rows=len(words), rows_per_bucket=5_000)
    assert len(bounds) == 9
    by_uid = UidSort(tmp_path, splitters_P2=bounds, rows_per_bucket=5_000)
    by_uid.add(words, np.arange(len(words)))
    sizes = [len(block) for block in by_uid.sorted_blocks()]
    assert sum(sizes) == len(words)
    assert max(sizes) < 6_500  # 500 of the sample in each, standard deviation 21


@pytest.mark.parametrize("uids", [hashes, counters])
def test_without_a_good_sample_no_block_is_larger_than_two_buckets(uids):
    words = uids(20_000, np.random.default_rng(1))
    poor = words[:2]
    blocks = sort(
        words,
        np.arange(len(words)),
        bounds=splitters(poor, num_rows=20_000, rows_per_bucket=1_000),
        rows_per_bucket=1_000,
    )
    assert max(map(len, blocks)) <= 2_000
    assert whole(blocks).tolist() == in_memory(words, np.arange(len(words)))


def test_a_uid_that_alone_fills_many_buckets_is_one_block_and_its_neighbours_are_not():
    words = np.zeros((9_000, 2), np.uint64)
    words[::3, 1] = np.arange(3_000)
    blocks = sort(
        words, np.arange(9_000), bounds=splitters(words, num_rows=9_000, rows_per_bucket=500), rows_per_bucket=500
    )
    assert whole(blocks).tolist() == in_memory(words, np.arange(9_000))
    heavy = [block for block in blocks if (block["low"] == 0).any()]
    assert len(heavy) == 1
    assert max(len(block) for block in blocks if block is not heavy[0]) <= 1_000


def test_all_equal_uids_come_back_in_order_of_address():
    words, addresses = np.full((500, 2), 2**64 - 1, np.uint64), np.arange(500)[::-1].copy()
    (block,) = sort(words, addresses, bounds=splitters(words, num_rows=500, rows_per_bucket=4))
    assert block["address"].tolist() == list(range(500))
    assert later_copies(block).tolist() == list(range(1, 500))


def test_nothing_added_gives_no_blocks_and_empty_adds_add_nothing(tmp_path):
    by_uid = UidSort(tmp_path, splitters_P2=np.array([[1, 0]], np.uint64))
    by_uid.add(np.zeros((0, 2), np.uint64), np.zeros(0, np.int64))
    assert list(by_uid.sorted_blocks()) == []
    assert later_copies(np.zeros(0, ROW_DTYPE)).tolist() == []


def test_the_blocks_can_be_read_twice(tmp_path):
    words = hashes(100, np.random.default_rng(2))
    by_uid = UidSort(tmp_path, splitters_P2=words[:1], rows_per_bucket=4)
    by_uid.add(words, np.arange(100))
    assert whole(by_uid.sorted_blocks()).tolist() == whole(by_uid.sorted_blocks()).tolist()


@pytest.mark.parametrize(("sampled", "num_rows"), [(0, 100), (50, 0), (50, 4)])
def test_without_a_sample_or_with_one_bucket_there_are_no_splitters(sampled, num_rows):
    sample = hashes(sampled, np.random.default_rng(3))
    assert splitters(sample, num_rows=num_rows, rows_per_bucket=4).shape == (0, 2)


def test_a_folder_with_rows_of_another_sort_is_refused(tmp_path):
    (tmp_path / "000000.rows").write_bytes(b"")
    with pytest.raises(ValueError, match="folder must be empty, got .*"):
        UidSort(tmp_path, splitters_P2=np.empty((0, 2), np.uint64))
