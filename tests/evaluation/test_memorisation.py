from __future__ import annotations

import pytest
import torch
from torch import Tensor

from curation.evaluation.memorisation import authentic, memorisation, nearest_train_ratio


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def test_the_ratio_of_a_copy_is_0_and_of_a_row_midway_1() -> None:
    # 2 is 2 from 0 and 8 from 10; 4 and 40 are 4 and 6, 30 and 40 away.
    ratio = nearest_train_ratio(column(0, 5, 2, 4, 40), column(0, 10))
    assert ratio.tolist() == pytest.approx([0, 1, 0.25, 2 / 3, 0.75])


def test_a_copy_of_a_training_row_that_has_a_twin_is_a_copy() -> None:
    ratio = nearest_train_ratio(column(0, 1), column(0, 0, 10))
    assert ratio.tolist() == pytest.approx([0, 1 / 9])


def test_a_row_is_authentic_if_its_nearest_training_row_has_a_nearer_neighbour() -> None:
    # Nearest other training rows: 0 and 1 are 1 apart, 10 is 9 from 1.
    assert authentic(column(0.4, -1.5, 10, 18, 20), column(0, 1, 10)).tolist() == [False, True, False, False, True]


def test_of_copies_all_is_memorised_and_of_other_draws_of_the_same_normal_little() -> None:
    draws = torch.randn(300, 10, generator=torch.Generator().manual_seed(0))
    train, others = draws[:150], draws[150:]
    assert memorisation(train, train) == (0.0, 1.0, 0.0)
    fresh = memorisation(others, train)
    assert fresh.memorised_share == 0 and fresh.median_ratio > 0.8 and 0.3 < fresh.authentic_share < 0.7


def test_without_rows_to_compare_there_is_no_measure() -> None:
    with pytest.raises(ValueError, match="a ratio needs two different training rows, got 1"):
        nearest_train_ratio(column(1), column(2, 2))
    with pytest.raises(ValueError, match="generated: there is no row"):
        memorisation(column()[:0], column(1, 2))
