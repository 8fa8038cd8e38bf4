from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Generator

from curation.methods.uniform import Uniform
from curation.numerics.sampling import CutSearch, kept, order_bits, tie_hash, uid_words

UIDS = [f"{i:032x}" for i in range(1000)]


def rows_of(uids):
    return {"uid": torch.from_numpy(uid_words(uids).view(np.int64))}


def test_every_pair_of_four_rows_is_equally_likely():
    rows, counts = rows_of(UIDS[:4]), dict.fromkeys(combinations(range(4), 2), 0)
    rng, draws = Generator().manual_seed(0), 6000
    for _ in range(draws):
        i, j = sorted(Uniform().select(rows, 2, 0.0, rng).indices.tolist())
        counts[i, j] += 1
    # The standard deviation of each share is 0.0048.
    assert all(count / draws == pytest.approx(1 / 6, abs=0.02) for count in counts.values()), counts


def test_another_seed_keeps_other_rows():
    rows = rows_of(UIDS)
    first, second = (Uniform().select(rows, 500, 0.0, Generator().manual_seed(seed)).indices for seed in (0, 1))
    common = len(set(first.tolist()) & set(second.tolist()))
    assert 200 < common < 300  # 250 expected, standard deviation 8


def test_scores_are_all_zero():
    assert torch.equal(Uniform().score(rows_of(UIDS[:3]), 0.0), torch.zeros(3))


def test_over_a_pool_the_cut_keeps_the_rows_that_select_keeps_in_memory():
    rows, rng = rows_of(UIDS), Generator().manual_seed(5)
    in_memory = Uniform().select(rows, 300, 0.0, rng).indices
    seed = int(torch.randint(2**63 - 1, (), generator=Generator().manual_seed(5)))
    bits = order_bits(Uniform().sort_key(rows, 0.0, seed).numpy())
    ties = tie_hash(uid_words(UIDS))
    search = CutSearch(300)
    while not search.done:
        for shard in np.split(np.arange(1000), 7 * [0] + [123, 800]):
            search.add(bits[shard], ties[shard])
        search.end_pass()
    assert np.flatnonzero(kept(search.cut, bits, ties)).tolist() == sorted(in_memory.tolist())
