"""The dynamic ranking: its law of usage, the simulation of its specification, its schedules, its random tie-break."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from curation.methods.dynamic import TIE_BREAK, Dynamic, rarity_weight, usage_gap
from curation.numerics.quantiles import gini
from curation.selector import Rows

ROUNDS, KEEP = 200, 0.3


def rows_of(representative: Tensor, rare: Tensor, usage: Tensor, *, number: int = 0) -> Rows:
    n = len(usage)
    return {
        "factors.representativeness": representative,
        "factors.rarity": rare,
        "usage_count": usage.float(),
        "uid": torch.stack([torch.arange(n), torch.arange(n)], dim=1),
        "planned_uses": torch.tensor(KEEP * ROUNDS),
        "mean_usage": torch.tensor(usage.double().mean().item()),
        "round": torch.tensor(number),
    }


def simulate(selector: Dynamic, *, n: int, rounds: int = ROUNDS, base: Tensor | None = None) -> Tensor:
    """Usage (n,) after the run; the law is checked after every round."""
    generator = torch.Generator().manual_seed(0)
    representative, rare = torch.rand(2, n, generator=generator) if base is None else base
    usage, keep = torch.zeros(n, dtype=torch.int64), round(KEEP * n)
    for number in range(rounds):
        rows = rows_of(representative, rare, usage, number=number)
        usage[selector.select(rows, keep, number / rounds, generator).indices] += 1
        bound = selector.usage_gap(rows)
        assert bound is None or int(usage.max() - usage.min()) <= bound
    return usage


@pytest.mark.parametrize("penalty", [0.05, 0.1, 0.25, 0.5])
@pytest.mark.parametrize("kind", ["random", "extreme", "equal"])
def test_usage_never_differs_by_more_than_the_bound(penalty: float, kind: str) -> None:
    n = 400
    base = {
        "random": None,
        "extreme": torch.stack([(torch.arange(n) < n // 3).float()] * 2),
        "equal": torch.full((2, n), 0.5),
    }[kind]
    assert usage_gap(penalty) == int(1 / penalty) + 1
    usage = simulate(Dynamic(penalty=penalty), n=n, base=base)
    assert usage.sum() == ROUNDS * round(KEEP * n)


@pytest.mark.parametrize(("penalty", "low", "high"), [(0.05, 50, 70), (0.1, 55, 65), (0.25, 58, 62)])
def test_usage_is_as_flat_as_in_the_specifications_simulation(penalty: float, low: int, high: int) -> None:
    usage = simulate(Dynamic(penalty=penalty), n=2000)
    assert abs(int(usage.min()) - low) <= 2 and abs(int(usage.max()) - high) <= 2
    assert gini(np.bincount(usage.numpy())) < 0.07


def test_without_a_penalty_almost_half_of_the_rows_are_never_used() -> None:
    usage = simulate(Dynamic(penalty=0.0), n=2000)
    assert 0.4 < (usage == 0).double().mean().item() < 0.55 and int(usage.max()) == ROUNDS
    assert Dynamic(penalty=0.0).usage_gap({}) is None
    assert Dynamic(penalty=0.5, temperature=0.05).usage_gap({}) is None
    assert Dynamic(penalty=0.5, usage="frequency").usage_gap({}) is None


def test_the_frequency_form_is_less_even_than_the_count_form() -> None:
    by_frequency = simulate(Dynamic(penalty=1.0, usage="frequency"), n=1000)
    by_count = simulate(Dynamic(penalty=0.25), n=1000)
    assert gini(np.bincount(by_frequency.numpy())) > 5 * gini(np.bincount(by_count.numpy()))


def test_the_penalty_follows_from_the_lead_and_the_planned_uses() -> None:
    rows = rows_of(torch.zeros(2), torch.zeros(2), torch.zeros(2))
    assert Dynamic(lead=0.2).beta(rows) == pytest.approx(1 / (0.2 * KEEP * ROUNDS))
    assert Dynamic(lead=0.2).usage_gap(rows) == 13


def test_schedules_go_from_representative_to_rare() -> None:
    assert [rarity_weight(p, "cosine") for p in (0, 0.45, 0.9, 1)] == pytest.approx([0, 0.5, 1, 1])
    assert [rarity_weight(p, "reversed") for p in (0, 0.45, 0.9)] == pytest.approx([1, 0.5, 0])
    assert rarity_weight(0.3, "linear") == 0.3 and rarity_weight(0.3, "constant") == 0.5
    assert rarity_weight(0.5, "sigmoid") == 0.5 and rarity_weight(0.6, "sigmoid") == pytest.approx(0.731, abs=1e-3)
    first = Dynamic(penalty=0.5).select(
        rows_of(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.zeros(2)), 1, 0.0, torch.Generator()
    )
    last = Dynamic(penalty=0.5).select(
        rows_of(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.zeros(2)), 1, 1.0, torch.Generator()
    )
    assert (first.indices.tolist(), last.indices.tolist()) == ([0], [1])


def test_ties_are_parted_anew_by_each_seed_and_never_beat_a_rank() -> None:
    rows = rows_of(torch.full((64,), 0.5), torch.full((64,), 0.5), torch.zeros(64))
    selector = Dynamic(penalty=0.1)
    chosen = [
        set(selector.select(rows, 32, 0.5, torch.Generator().manual_seed(seed)).indices.tolist()) for seed in range(3)
    ]
    assert chosen[0] != chosen[1] != chosen[2]
    rows["factors.rarity"] = torch.arange(64) * 4 * TIE_BREAK
    selection = selector.select(rows, 32, 1.0, torch.Generator())
    assert set(selection.indices.tolist()) == set(range(32, 64))


def test_gumbel_noise_draws_with_the_chance_of_the_softmax() -> None:
    rows = rows_of(torch.tensor([0.0, 0.1]), torch.zeros(2), torch.zeros(2))
    selector, hits, draws = Dynamic(penalty=0.1, temperature=0.05), 0, 4000
    rows["uid"] = torch.arange(2 * draws).reshape(draws, 2)
    for column in ("factors.representativeness", "factors.rarity", "usage_count"):
        rows[column] = rows[column].repeat(draws // 2)
    keys = selector.sort_key(rows, 0.0, 7)
    hits = int((keys[1::2] > keys[0::2]).sum())
    expected = 1 / (1 + np.exp(-0.1 / 0.05))
    assert abs(hits / (draws / 2) - expected) < 4 * np.sqrt(expected * (1 - expected) / (draws / 2))


def test_fields_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="penalty must be at least 0, got -0.1"):
        Dynamic(penalty=-0.1)
    with pytest.raises(ValueError, match="lead must be above 0, got 0.0"):
        Dynamic(lead=0.0)
    with pytest.raises(ValueError, match="temperature must be at least 0, got -1.0"):
        Dynamic(temperature=-1.0)
