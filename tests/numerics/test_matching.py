import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.numerics.matching import moves

# Few words, so that uids repeat within a side and agree in one of their halves.
sides = st.lists(st.tuples(st.sampled_from([0, 1, 2**64 - 1]), st.integers(0, 2)), max_size=10)


def as_uids(pairs):
    return np.array(pairs, dtype=np.uint64).reshape(-1, 2)


@settings(deadline=None)
@given(old=sides, new=sides, seed=st.integers(0, 99))
def test_each_uid_goes_from_its_lowest_address_to_its_lowest_address(old, new, seed):
    rng = np.random.default_rng(seed)
    old_addresses, new_addresses = rng.permutation(100)[: len(old)], rng.permutation(100)[: len(new)]
    came, gone, lost = moves(as_uids(old), old_addresses, as_uids(new), new_addresses)
    lowest = [{}, {}]
    for side, uids, addresses in ((0, old, old_addresses), (1, new, new_addresses)):
        for uid, address in zip(uids, addresses.tolist(), strict=True):
            lowest[side][uid] = min(address, lowest[side].get(uid, address))
    by_hand = {(lowest[0][uid], lowest[1][uid]) for uid in lowest[0].keys() & lowest[1].keys()}
    assert set(zip(came.tolist(), gone.tolist(), strict=True)) == by_hand
    assert len(came) == len(by_hand)
    assert len(came) + lost == len(old)


def test_an_old_repeat_and_an_old_sample_without_a_new_place_are_lost():
    old = as_uids([(1, 1), (2, 2), (1, 1)])
    came, gone, lost = moves(old, np.array([9, 8, 7]), as_uids([(1, 1)]), np.array([20]))
    assert (came.tolist(), gone.tolist(), lost) == ([7], [20], 2)


@pytest.mark.parametrize("side", ["old", "new"])
@pytest.mark.parametrize(
    ("uids", "addresses"),
    [
        (np.zeros((2, 2), np.uint64), np.zeros(3, np.int64)),
        (np.zeros(2, np.uint64), np.zeros(2, np.int64)),
        (np.zeros((2, 2), np.int64), np.zeros(2, np.int64)),
        (np.zeros((2, 2), np.uint64), np.zeros(2)),
    ],
)
def test_uids_and_addresses_that_do_not_fit_are_refused(side, uids, addresses):
    good = (np.zeros((2, 2), np.uint64), np.zeros(2, np.int64))
    first, second = ((uids, addresses), good) if side == "old" else (good, (uids, addresses))
    with pytest.raises(ValueError, match=rf"{side}_uids must be uint64 \(n, 2\) beside {side}_addresses \(n,\)"):
        moves(*first, *second)
