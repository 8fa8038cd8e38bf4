"""InfoBatch, RCAP, RS2, epsilon-greedy and UCB by hand, with the traps of their published code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Generator

from curation.methods.epsilon_greedy import EpsilonGreedy
from curation.methods.infobatch import Infobatch
from curation.methods.rcap import Rcap, class_budgets, published_budgets
from curation.methods.rs2 import Rs2
from curation.methods.ucb import Ucb
from curation.selector import Rows


def losses(*values: float) -> Rows:
    n = len(values)
    return {"ledger_value": torch.tensor(values), "uid": torch.stack([torch.arange(n), torch.arange(n)], dim=1)}


def test_infobatch_prunes_nothing_where_all_scores_are_equal_or_none_is_known() -> None:
    for value in (0.1, 1 / 3, math.nan):
        indices, weights = Infobatch().select(losses(*[value] * 7), None, 0.1, Generator())
        assert sorted(indices.tolist()) == list(range(7)) and weights.tolist() == [1.0] * 7


def test_infobatch_keeps_one_of_two_low_rows_with_weight_two() -> None:
    seen = set()
    for seed in range(20):
        indices, weights = Infobatch().select(losses(1, 2, 3, 4), None, 0.5, Generator().manual_seed(seed))
        told = dict(zip(indices.tolist(), weights.tolist(), strict=True))
        assert told.pop(2) == told.pop(3) == 1.0
        [(low, weight)] = told.items()
        assert low in (0, 1) and weight == 2.0
        seen.add(low)
    assert seen == {0, 1}


@pytest.mark.parametrize("share", [None, 0.5, 0.2])
def test_infobatchs_weighted_sum_is_unbiased(share: float | None) -> None:
    values = torch.rand(60, generator=Generator().manual_seed(0)) ** 3
    selector = Infobatch(kept_share=share)
    sums = []
    for seed in range(600):
        indices, weights = selector.select(losses(*values.tolist()), None, 0.3, Generator().manual_seed(seed))
        sums.append(float((values[indices] * weights).sum()))
        if share is not None:
            assert len(indices) == round(share * 60)
    standard_error = np.std(sums) / math.sqrt(len(sums))
    assert abs(np.mean(sums) - float(values.sum())) < 3 * standard_error + 1e-9


def test_infobatchs_tail_has_weight_one_at_thirty_rounds_too() -> None:
    # 0.875 * 30 is 26.25: the package's test for equality never fires.
    rows = losses(1, 2, 3, 4)
    for number in range(30):
        _, weights = Infobatch().select(rows, None, number / 30, Generator().manual_seed(number))
        assert (weights.tolist() == [1.0] * 4) == (number >= 27)


def test_infobatch_takes_no_number_of_rows_and_checks_its_fields() -> None:
    with pytest.raises(ValueError, match="keep must be None"):
        Infobatch().select(losses(1, 2), 1, 0.0, Generator())
    with pytest.raises(ValueError, match="prune_ratio and delta"):
        Infobatch(prune_ratio=1.5)
    with pytest.raises(ValueError, match="kept_share"):
        Infobatch(kept_share=0.0)


def rcap_rows(n: int, *, number: int = 3) -> Rows:
    generator = Generator().manual_seed(1)
    return {
        **losses(*(torch.rand(n, generator=generator) * 5).tolist()),
        "last_step": torch.randint(40, (n,), generator=generator).float(),
        "label": torch.tensor([0] * (n - n // 10) + [1] * (n // 10)),
        "round": torch.tensor(number),
        "last_round_step": torch.tensor(20),
    }


@pytest.mark.parametrize("keep", [0, 1, 37, 95, 199, 200])
def test_rcap_keeps_exactly_its_budget_and_no_row_twice(keep: int) -> None:
    indices, _ = Rcap().select(rcap_rows(200), keep, 0.5, Generator())
    assert len(indices) == keep == len(indices.unique())


def test_rcaps_budgets_follow_the_square_root_until_a_class_is_full() -> None:
    wanted = torch.tensor([4.0, 1.0]).sqrt()
    assert class_budgets(wanted, torch.tensor([100, 100]), 30).tolist() == [20, 10]
    assert class_budgets(wanted, torch.tensor([12, 100]), 30).tolist() == [12, 18]
    assert class_budgets(torch.tensor([0.0, 0.0]), torch.tensor([5, 5]), 4).sum() == 4
    # As published, the second class gets the whole budget once more: 42 rows where 30 were asked for.
    assert published_budgets(wanted, torch.tensor([12, 100]), 30).tolist() == [12, 30]


def test_rcap_draws_by_the_softmax_of_the_loss_within_a_class() -> None:
    rows = {**rcap_rows(4), "ledger_value": torch.tensor([0.0, 0.6, 0.0, 0.0]), "label": torch.tensor([0, 0, 1, 1])}
    rows["last_step"], hits = torch.full((4,), 30.0), 0
    for seed in range(1500):
        hits += int(1 in Rcap(temperature=0.5).select(rows, 2, 0.5, Generator().manual_seed(seed)).indices.tolist())
    # Both classes count alike, so one row of each: of class 0 the second with exp(0.6/0.5) to 1.
    expected = 1 / (1 + math.exp(-0.6 / 0.5))
    assert abs(hits / 1500 - expected) < 4 * math.sqrt(expected * (1 - expected) / 1500)


def test_rcaps_classes_are_weighed_by_what_the_last_round_chose() -> None:
    rows = {**rcap_rows(100), "ledger_value": torch.ones(100), "label": (torch.arange(100) >= 50).long()}
    first = float(rows["last_round_step"])  # a row that was taken at the round's first step was taken in it
    rows["last_step"] = torch.where(torch.arange(100) % 50 < 25, first, first - 1)
    rows["last_step"][50:] = first
    indices, _ = Rcap().select(rows, 34, 0.5, Generator())
    of_first = int((indices < 50).sum())
    assert of_first == round(34 * math.sqrt(0.5) / (1 + math.sqrt(0.5)))
    rows["round"] = torch.tensor(0)
    assert int((Rcap().select(rows, 34, 0.5, Generator()).indices < 50).sum()) == 17


def rs2_rounds(selector: Rs2, *, n: int, keep: int, rounds: int) -> list[list[int]]:
    rows = {"uid": torch.stack([torch.arange(n), torch.arange(n) + 7], dim=1), "run_seed": torch.tensor(3)}
    return [
        selector.select({**rows, "round": torch.tensor(number)}, keep, 0.0, Generator()).indices.tolist()
        for number in range(rounds)
    ]


def test_rs2_without_replacement_uses_all_rows_alike_after_every_permutation() -> None:
    usage = np.zeros(60, int)
    for number, chosen in enumerate(rs2_rounds(Rs2(), n=60, keep=12, rounds=20), start=1):
        usage[chosen] += 1
        if number % 5 == 0:
            assert (usage == number // 5).all()


def test_rs2_drops_what_is_left_of_a_permutation_and_reshuffles() -> None:
    first, second, third, _ = rs2_rounds(Rs2(), n=10, keep=4, rounds=4)
    assert not set(first) & set(second) and len({*first, *second}) == 8
    assert third not in (first, second)
    with_replacement = rs2_rounds(Rs2(replacement=True), n=60, keep=12, rounds=5)
    assert len(set().union(*map(set, with_replacement))) < 60


def test_epsilon_greedy_takes_the_highest_losses_and_draws_the_rest() -> None:
    rows = losses(*np.arange(100).tolist())
    assert sorted(EpsilonGreedy(epsilon=0.0).select(rows, 10, 0.0, Generator()).indices.tolist()) == list(
        range(90, 100)
    )
    chosen = set(EpsilonGreedy(epsilon=0.5).select(rows, 10, 0.0, Generator()).indices.tolist())
    assert set(range(95, 100)) <= chosen and len(chosen & set(range(90, 95))) < 5
    unseen = losses(5.0, math.nan, 1.0)
    assert EpsilonGreedy(epsilon=0.0).select(unseen, 1, 0.0, Generator()).indices.tolist() == [1]
    with pytest.raises(ValueError, match="epsilon"):
        EpsilonGreedy(epsilon=2.0)


def test_ucb_adds_the_deviation_more_so_for_seldom_used_rows() -> None:
    rows = {
        **losses(1.0, 1.0, 1.0, math.nan),
        "ledger_variance": torch.tensor([0.0, 0.25, 0.25, math.nan]),
        "usage_count": torch.tensor([3.0, 3.0, 0.0, 0.0]),
    }
    assert Ucb().score(rows, 0.0).tolist() == pytest.approx([1.0, 1.75, 2.0, 1e30])
    assert Ucb().select(rows, 2, 0.0, Generator()).indices.tolist() == [3, 2]
    with pytest.raises(ValueError, match="confidence"):
        Ucb(confidence=-1.0)
    with pytest.raises(ValueError, match="temperature"):
        Rcap(temperature=0.0)
