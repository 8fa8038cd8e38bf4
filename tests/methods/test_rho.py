from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Generator

from curation.methods.rho import Rho
from curation.numerics.sampling import CutSearch, kept, order_bits, tie_hash, uid_words
from curation.selector import PoolSelector, take

UIDS = [f"{i:032x}" for i in range(1000)]


def rows_of(learner_loss, reference_loss):
    return {
        "uid": torch.from_numpy(uid_words(UIDS[: len(learner_loss)]).view(np.int64)),
        "learner_loss": torch.as_tensor(learner_loss),
        "reference_loss": torch.as_tensor(reference_loss),
    }


def random_rows(n):
    rng = Generator().manual_seed(0)
    return rows_of(torch.rand(n, generator=rng) * 5, torch.rand(n, generator=rng) * 5)


def test_the_top_32_of_320_are_those_of_the_definition():
    rows = random_rows(320)
    reducible = rows["learner_loss"].numpy() - rows["reference_loss"].numpy()
    by_definition = np.argsort(-reducible)[:32]
    assert Rho().select(rows, 32, 0.0, Generator().manual_seed(0)).indices.tolist() == by_definition.tolist()


def test_the_score_is_high_for_what_can_be_learnt_and_is_not_yet():
    # Learnt, not yet learnt, noise.
    rows = rows_of([0.1, 3.0, 3.0], [0.1, 0.2, 3.1])
    assert Rho().score(rows, 0.0).tolist() == pytest.approx([0.0, 2.8, -0.1])
    assert Rho().score(rows_of(torch.ones(2).half(), torch.zeros(2).double()), 0.0).dtype == torch.float32
    assert Rho().select(rows, 1, 0.0, Generator().manual_seed(0)).indices.tolist() == [1]


def test_equal_scores_are_parted_by_the_hash_of_the_uid():
    rows = rows_of([1.0] * 50, [0.5] * 50)
    by_hash = np.argsort(tie_hash(uid_words(UIDS[:50])))[::-1][:7]
    assert Rho().select(rows, 7, 0.0, Generator().manual_seed(0)).indices.tolist() == by_hash.tolist()


def test_sampling_draws_two_of_four_rows_with_their_exact_probability():
    rows, draws, rng = rows_of([0.0, 1.0, 2.0, -1.0], [0.0] * 4), 6000, Generator().manual_seed(0)
    p = rows["learner_loss"].double().softmax(dim=0).tolist()
    counts = Counter(tuple(Rho(sampling=True).select(rows, 2, 0.0, rng).indices.tolist()) for _ in range(draws))
    for i, j in permutations(range(4), 2):
        # The standard deviation of a share is 0.0065 at most.
        assert counts[i, j] / draws == pytest.approx(p[i] * p[j] / (1 - p[i]), abs=0.02), (i, j)


@pytest.mark.parametrize("sampling", [False, True])
def test_over_a_pool_the_cut_keeps_the_rows_that_select_keeps_in_memory(sampling):
    rows, selector = random_rows(1000), Rho(sampling=sampling)
    assert isinstance(selector, PoolSelector)
    in_memory = selector.select(rows, 300, 0.0, Generator().manual_seed(5)).indices
    seed = int(torch.randint(2**63 - 1, (), generator=Generator().manual_seed(5)))
    shards = [torch.arange(0, 123), torch.arange(123, 800), torch.arange(800, 1000)]
    search, ties = CutSearch(300), tie_hash(uid_words(UIDS))
    bits = [order_bits(selector.sort_key(take(rows, shard), 0.0, seed).numpy()) for shard in shards]
    while not search.done:
        for shard, shard_bits in zip(shards, bits, strict=True):
            search.add(shard_bits, ties[shard.numpy()])
        search.end_pass()
    assert np.flatnonzero(kept(search.cut, np.concatenate(bits), ties)).tolist() == sorted(in_memory.tolist())


def test_sampling_noise_is_finite_for_any_uid():
    keys = Rho(sampling=True).sort_key(random_rows(1000), 0.0, 7)
    assert torch.isfinite(keys).all()


def test_a_hash_of_zero_has_a_logarithm(monkeypatch):
    monkeypatch.setattr("curation.methods.rho.hash_uniform", lambda words, seed: np.array([0.0, 1 - 2.0**-53]))
    low, high = Rho(sampling=True).sort_key(rows_of([0.0, 0.0], [0.0, 0.0]), 0.0, 0).tolist()
    assert low == pytest.approx(-np.log(54 * np.log(2)))
    assert high == pytest.approx(53 * np.log(2))


def test_the_ledger_keeps_the_loss():
    assert Rho().records == "loss"
