import dataclasses

import pytest
import torch

from curation.columns import RUN_VALUES
from curation.methods.uniform import Uniform
from curation.selector import PoolSelector, Selector, check_keep, check_needs, num_rows, take, uniform_weights


@dataclasses.dataclass(frozen=True)
class WithoutSortKey:
    needs = frozenset({"uid"})
    records = "score"
    fixed_size = True
    unbiased = False

    def score(self, rows, progress): ...

    def select(self, rows, keep, progress, rng): ...


def test_take_gathers_columns_in_order_and_passes_run_values_through():
    scale = torch.tensor([1.0, 2.0, 3.0])
    rows = {"clip_score": torch.tensor([0.1, 0.2, 0.3]), "logit_scale": scale}
    taken = take(rows, torch.tensor([2, 0]))
    assert torch.equal(taken["clip_score"], torch.tensor([0.3, 0.1]))
    assert taken["logit_scale"] is scale
    assert torch.equal(rows["clip_score"], torch.tensor([0.1, 0.2, 0.3]))


def test_num_rows_does_not_count_run_values():
    rows = {name: torch.zeros(()) for name in RUN_VALUES}
    assert num_rows({**rows, "uid": torch.zeros(5, 2, dtype=torch.int64), "clip_score": torch.zeros(5)}) == 5


def test_rows_without_a_column_have_no_length():
    with pytest.raises(ValueError, match=r"rows hold no column, only \['round'\]"):
        num_rows({"round": torch.tensor(0)})


def test_columns_of_different_length_are_named():
    with pytest.raises(ValueError, match="columns differ in length: {'a': 2, 'b': 3}"):
        num_rows({"a": torch.zeros(2), "b": torch.zeros(3)})


def test_a_missing_column_is_named_with_what_is_there():
    with pytest.raises(ValueError, match=r"Uniform needs \['uid'\], the rows have \['clip_score'\]"):
        check_needs(Uniform(), {"clip_score": torch.zeros(1)})
    check_needs(Uniform(), {"uid": torch.zeros(1, 2, dtype=torch.int64)})


@pytest.mark.parametrize("keep", [None, -1, 4])
def test_keep_outside_the_rows_is_refused(keep):
    with pytest.raises(ValueError, match=rf"keep must be in \[0, 3\], got {keep}"):
        check_keep(keep, 3)


@pytest.mark.parametrize("keep", [0, 3])
def test_keep_may_be_none_or_all_of_the_rows(keep):
    assert check_keep(keep, 3) == keep


def test_uniform_weights_have_mean_one():
    assert torch.equal(uniform_weights(3), torch.ones(3))
    assert uniform_weights(0).dtype == torch.float32


def test_only_a_selector_with_a_sort_key_serves_a_pool():
    assert isinstance(WithoutSortKey(), Selector)
    assert not isinstance(WithoutSortKey(), PoolSelector)
    assert isinstance(Uniform(), PoolSelector)
    assert not isinstance(object(), Selector)
