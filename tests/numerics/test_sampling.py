import math
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator

from curation.numerics.sampling import (
    KEEP_ALL,
    KEEP_NONE,
    Cut,
    CutSearch,
    Pass,
    count_pass,
    exact_top,
    gumbel_top_k,
    hash_uniform,
    hash_words,
    kept,
    order_bits,
    tie_hash,
    uid_strings,
    uid_words,
)

floats = st.floats(width=32, allow_nan=True, allow_infinity=True)
# Few distinct values, so that ties at the cut are common, beside any value at all.
keys_and_ties = st.lists(
    st.tuples(st.sampled_from([0.0, -0.0, 0.25, 0.2500001, -1.0, math.nan, math.inf]) | floats,
              st.sampled_from([0, 1, 2**16, 2**32, 2**48, 2**64 - 1]) | st.integers(0, 2**64 - 1)),
    max_size=40,
)  # fmt: skip


def as_arrays(rows):
    keys = np.array([key for key, _ in rows], dtype=np.float32)
    return keys, np.array([tie for _, tie in rows], dtype=np.uint64)


def search_blocks(blocks, keep, *, collect_limit=1_000_000):
    search = CutSearch(keep, collect_limit=collect_limit)
    while not search.done:
        for bits, ties in blocks:
            search.add(bits, ties)
        search.end_pass()
    return search


# uids and their hashes


@given(st.lists(st.integers(0, 2**128 - 1), max_size=20))
def test_uids_and_words_are_inverse(numbers):
    uids = [f"{number:032x}" for number in numbers]
    words = uid_words(uids)
    assert words.dtype == np.uint64
    assert words.shape == (len(uids), 2)
    assert [(int(high) << 64) | int(low) for high, low in words] == numbers
    assert uid_strings(words) == uids


def test_upper_case_is_the_same_uid():
    assert uid_strings(uid_words(["ABCDEF" + "0" * 26])) == ["abcdef" + "0" * 26]


@pytest.mark.parametrize(
    "wrong",
    ["", "0" * 31, "0" * 33, "g" + "0" * 31, "0x" + "0" * 30, " " * 2 + "0" * 30, "0" * 32 + "\n", "٣" * 32, None],
)
def test_the_first_malformed_uid_is_named(wrong):
    good = "0" * 32
    with pytest.raises(ValueError, match="uid must be 32 hex digits, got .* in row 1$") as raised:
        uid_words([good, wrong, "also wrong", good])
    assert repr(wrong) in str(raised.value)


def test_two_malformed_uids_whose_lengths_even_out_are_found():
    with pytest.raises(ValueError, match="in row 0$"):
        uid_words(["0" * 30, "0" * 34])


def test_hashes_are_the_same_for_ever():
    """By hand, in Python's integers; a pool's selection must not change with a library's version."""

    def mix(x):
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    assert mix(0) == 0xE220A8397B1DCDAF  # the first number of splitmix64 from seed 0
    words = np.array([[1, 2], [2**64 - 1, 3], [0, 0]], dtype=np.uint64)
    for seed in (0, 1, 2**63, 2**64 - 1):
        by_hand = [mix(mix(mix(seed) ^ int(high)) ^ int(low)) for high, low in words]
        assert hash_words(words, seed).tolist() == by_hand
    assert tie_hash(words).tolist() == hash_words(words, 0).tolist()
    assert hash_words(words[:0], 0).shape == (0,)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_beyond_64_bits_is_refused(seed):
    with pytest.raises(ValueError, match=r"seed must be in \[0, 2\*\*64\), got"):
        hash_words(np.zeros((1, 2), np.uint64), seed)


def test_hashed_numbers_of_consecutive_uids_are_uniform_and_unrelated_between_seeds():
    words = np.stack([np.zeros(100_000), np.arange(100_000)], axis=1).astype(np.uint64)
    first, second = hash_uniform(words, 0), hash_uniform(words, 1)
    assert first.dtype == np.float64
    assert first.min() >= 0
    assert first.max() < 1
    counts = np.histogram(first, bins=100, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 150  # chi-square with 99 degrees of freedom: p = 0.0007
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.015
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.015


def test_one_bit_of_a_uid_changes_half_of_the_hash():
    words = np.zeros((129, 2), dtype=np.uint64)
    for bit in range(128):
        words[bit, bit // 64] = 1 << (bit % 64)
    hashes = hash_words(words, seed=0)
    flipped = [int(h ^ hashes[-1]).bit_count() for h in hashes[:-1]]
    assert min(flipped) > 14
    assert np.mean(flipped) == pytest.approx(32, abs=1.5)


# the order and the exact top


@given(floats, floats)
def test_order_bits_keep_the_order_of_the_keys(a, b):
    bits_a, bits_b = order_bits(np.array([a, b], dtype=np.float32)).tolist()
    if math.isnan(a) or math.isnan(b):
        assert (bits_a < bits_b) == (math.isnan(a) and not math.isnan(b))
    else:
        assert (bits_a < bits_b) == (a < b)
        assert (bits_a == bits_b) == (a == b)


def test_order_bits_of_special_keys():
    keys = np.array([np.nan, -np.nan, -np.inf, -1e-45, -0.0, 0.0, 1e-45, np.inf], dtype=np.float32)
    bits = order_bits(keys)
    assert bits.dtype == np.uint32
    assert bits[:2].tolist() == [0, 0]
    assert bits[4] == bits[5]
    assert (np.diff(bits[[1, 2, 3, 4, 6, 7]].astype(np.int64)) > 0).all()


def test_keys_of_another_width_are_refused():
    with pytest.raises(ValueError, match="keys must be float32, got float64"):
        order_bits(np.zeros(1))


@given(keys_and_ties, st.data())
def test_exact_top_is_the_head_of_the_sorted_rows(rows, data):
    keys, ties = as_arrays(rows)
    keep = data.draw(st.integers(0, len(rows)))
    rank = [
        (-math.inf if math.isnan(key) else key, not math.isnan(key), tie) for key, tie in zip(keys, ties, strict=True)
    ]
    by_hand = sorted(range(len(rows)), key=lambda i: rank[i], reverse=True)  # stable: equal rows stay in order
    assert exact_top(keys, ties, keep).tolist() == by_hand[:keep]


@pytest.mark.parametrize("keep", [-1, 3])
def test_exact_top_refuses_to_keep_what_is_not_there(keep):
    with pytest.raises(ValueError, match=rf"keep must be in \[0, 2\], got {keep}"):
        exact_top(np.zeros(2, np.float32), np.zeros(2, np.uint64), keep)


# the cut of a stream


@settings(max_examples=200)
@given(rows=keys_and_ties, data=st.data(), collect_limit=st.sampled_from([1, 2, 5, 1_000_000]))
def test_the_cut_of_a_stream_keeps_the_exact_top_and_names_its_surplus(rows, data, collect_limit):
    keys, ties = as_arrays(rows)
    bits = order_bits(keys)
    keep = data.draw(st.integers(0, len(rows) + 2))
    splits = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=4)))
    blocks = list(zip(np.split(bits, splits), np.split(ties, splits), strict=True))

    search = search_blocks(blocks, keep, collect_limit=collect_limit)

    chosen = set(np.flatnonzero(kept(search.cut, bits, ties)).tolist())
    top = exact_top(keys, ties, min(keep, len(rows))).tolist()
    assert set(top) <= chosen
    assert len(chosen) == len(top) + search.surplus
    assert all((bits[i], ties[i]) == (bits[top[-1]], ties[top[-1]]) for i in chosen - set(top))


def test_distinct_rows_take_two_passes_and_leave_no_surplus():
    rng = np.random.default_rng(0)
    keys, ties = rng.random(50_000, dtype=np.float32), rng.integers(0, 2**64, 50_000, dtype=np.uint64)
    bits = order_bits(keys)
    search = search_blocks([(bits, ties)], 12_345)
    assert search.current_pass.number == 2
    assert search.surplus == 0
    assert np.flatnonzero(kept(search.cut, bits, ties)).tolist() == sorted(exact_top(keys, ties, 12_345).tolist())


def test_equal_keys_are_cut_by_their_ties():
    ties = np.random.default_rng(0).integers(0, 2**64, 5000, dtype=np.uint64)
    bits = order_bits(np.full(5000, 0.25, dtype=np.float32))
    search = search_blocks([(bits, ties)], 1234, collect_limit=100)
    assert search.current_pass.number == 3  # two for the key; 16 bits of the tie then leave a single row at the cut
    assert kept(search.cut, bits, ties).sum() == 1234
    assert search.surplus == 0


def test_more_equal_rows_than_may_be_collected_end_after_six_passes_with_their_surplus():
    bits, ties = np.full(50, 7, dtype=np.uint32), np.full(50, 9, dtype=np.uint64)
    search = search_blocks([(bits, ties)], 20, collect_limit=10)
    assert search.current_pass.number == 6
    assert search.cut == Cut(key_bits=7, tie=9)
    assert search.surplus == 30


def test_workers_that_share_the_stream_find_the_cut_of_one_alone():
    rng = np.random.default_rng(0)
    bits = order_bits(rng.choice(np.linspace(-1, 1, 7).astype(np.float32), 3000))
    ties = rng.integers(0, 2**64, 3000, dtype=np.uint64)
    alone = search_blocks([(bits, ties)], 1000, collect_limit=20)

    search = CutSearch(1000, collect_limit=20)
    while not search.done:
        blocks = np.split(np.arange(3000), [10, 10, 2000])
        a, b, c, d = (count_pass(Pass(*search.current_pass), bits[rows], ties[rows]) for rows in blocks)
        search.merge(d + b)
        search.merge(c + a)
        search.end_pass()
    assert search.cut == alone.cut


def test_keeping_none_takes_no_pass_and_keeping_all_takes_one():
    bits, ties = order_bits(np.array([np.nan, np.inf], np.float32)), np.array([0, 2**64 - 1], dtype=np.uint64)
    assert CutSearch(0).done
    assert not kept(CutSearch(0).cut, bits, ties).any()
    for keep in (2, 3):
        search = search_blocks([(bits, ties)], keep)
        assert search.current_pass.number == 1
        assert kept(search.cut, bits, ties).all()
    assert not kept(KEEP_NONE, np.array([2**32 - 1], np.uint32), ties[1:]).any()
    assert kept(KEEP_ALL, np.zeros(1, np.uint32), np.zeros(1, np.uint64)).all()


def test_an_empty_stream_has_a_cut():
    assert search_blocks([], 5).cut == KEEP_ALL


def test_memory_does_not_grow_with_the_number_of_blocks():
    search = CutSearch(10, collect_limit=1)
    block = np.zeros(1, np.uint32), np.zeros(1, np.uint64)
    for _ in range(50):
        search.add(*block)
    assert len(search._counts) == 1


def test_a_stream_that_changed_between_passes_is_refused():
    bits, ties = np.full(9, 7, dtype=np.uint32), np.arange(9, dtype=np.uint64)
    search = CutSearch(5)
    search.add(bits, ties)
    search.end_pass()
    search.add(bits[:8], ties[:8])
    with pytest.raises(RuntimeError, match="stream changed between passes: 9 rows at the cut became 8 in pass 2"):
        search.end_pass()


def test_a_count_of_another_pass_is_refused():
    bits, ties = np.full(9, 7, dtype=np.uint32), np.arange(9, dtype=np.uint64)
    search = CutSearch(5)
    late = count_pass(search.current_pass, bits, ties)
    search.merge(late)
    search.end_pass()
    with pytest.raises(ValueError, match="a count of pass 1 came, but this is pass 2"):
        search.merge(late)
    with pytest.raises(AssertionError, match="pass 1 and pass 2 do not add up"):
        _ = late + count_pass(search.current_pass, bits, ties)
    with pytest.raises(ValueError, match="a count of pass 1 came, but the search is done"):
        CutSearch(0).merge(late)


def test_the_cut_is_not_known_before_the_search_is_done():
    with pytest.raises(RuntimeError, match="the cut is not known yet: pass 1 has not ended"):
        _ = CutSearch(1).cut


def test_a_search_refuses_impossible_numbers():
    with pytest.raises(ValueError, match="keep must be at least 0, got -1"):
        CutSearch(-1)
    with pytest.raises(ValueError, match="collect_limit must be at least 1, got 0"):
        CutSearch(1, collect_limit=0)


# Gumbel top-k


def test_gumbel_top_k_draws_pairs_with_their_exact_probability():
    logits, draws = torch.tensor([0.0, 1.0, 2.0, -1.0]), 200_000
    p = torch.softmax(logits.double(), dim=0).tolist()
    drawn = gumbel_top_k(logits.expand(draws, 4), 2, Generator().manual_seed(0))
    shares = torch.bincount(drawn[:, 0] * 4 + drawn[:, 1], minlength=16) / draws
    for i, j in permutations(range(4), 2):
        # First i, then j of those that are left; 0.003 is 2.7 standard deviations at most.
        assert shares[4 * i + j].item() == pytest.approx(p[i] * p[j] / (1 - p[i]), abs=0.003), (i, j)
    by_hand = {(1, 2): 0.628, (0, 2): 0.220, (2, 3): 0.080, (0, 1): 0.050, (1, 3): 0.018, (0, 3): 0.006}
    for (i, j), share in by_hand.items():
        assert (shares[4 * i + j] + shares[4 * j + i]).item() == pytest.approx(share, abs=0.003), (i, j)


def test_gumbel_top_k_draws_each_row_once_and_repeats_for_an_equal_seed():
    logits = torch.randn(1000, generator=Generator().manual_seed(0))
    first, second = (gumbel_top_k(logits, 1000, Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)
    assert sorted(first.tolist()) == list(range(1000))
    assert gumbel_top_k(logits, 0, Generator()).shape == (0,)
    assert gumbel_top_k(logits[:0], 0, Generator()).dtype == torch.int64


def test_a_row_without_a_chance_is_never_drawn():
    logits = torch.tensor([-math.inf, 0.0, -1e30, 1e30])
    assert sorted(gumbel_top_k(logits, 3, Generator().manual_seed(0)).tolist()) == [1, 2, 3]


@pytest.mark.parametrize("k", [-1, 2, 3])
def test_more_draws_than_rows_with_a_chance_are_refused(k):
    with pytest.raises(ValueError, match=rf"k must be in \[0, 1\], the rows with a logit above -inf, got {k}"):
        gumbel_top_k(torch.tensor([0.0, -math.inf]), k, Generator())


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_logit_that_is_no_logit_is_refused(wrong):
    with pytest.raises(ValueError, match=r"logits must be finite or -inf, got NaN or \+inf"):
        gumbel_top_k(torch.tensor([0.0, wrong]), 1, Generator())
