"""A rater's weights lie where the article's arithmetic says, and its ratings are of their own row alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from curation.evaluation.correlation import spearman
from curation.models.rater import Rater

F = 6


def rows(n: int, *, seed: int = 0) -> Tensor:
    return torch.randn(n, F, generator=torch.Generator().manual_seed(seed))


def rater(**fields: Any) -> Rater:
    torch.manual_seed(0)
    return Rater(rows(50), **{"width": 16, "hidden": 8, **fields})


class OneAbove(torch.nn.Module):
    """A head whose sigmoid is 1 on the first row and 0 on all others."""

    def forward(self, f_BW: Tensor) -> Tensor:
        return torch.where(torch.arange(len(f_BW)) == 0, 100.0, -100.0)[:, None]


def with_extreme_logits() -> Rater:
    made = rater(mode="code", group=False)
    made.instance = OneAbove()  # pyright: ignore[reportAttributeAccessIssue]
    return made


@pytest.mark.parametrize(
    ("size", "low", "high", "ratio"),
    [(32, 0.01173, 0.08062, 1.0713), (64, 0.0058, 0.0414, 1.0362), (256, 0.0014, 0.0105, 1.0091)],
)
def test_sigmoid_then_softmax_leaves_little_between_rows_and_a_second_softmax_next_to_nothing(size, low, high, ratio):
    batch = rows(size)
    first = with_extreme_logits().rate_as_released(batch)
    bounds = math.e / (math.e + size - 1), 1 / (1 + (size - 1) * math.e)  # one row at 1, or one at 0
    assert first.max().item() == pytest.approx(bounds[0], rel=1e-4) and bounds[0] == pytest.approx(high, abs=1e-4)
    assert bounds[1] == pytest.approx(low, abs=1e-4)
    second = with_extreme_logits()(batch).weights
    assert (second.max() / second.min()).item() <= ratio + 1e-4


def test_the_gradient_of_a_weighted_cost_is_the_weight_times_what_the_cost_lies_above_the_mean():
    logits = torch.randn(9, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    cost = torch.randn(9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weights = logits.softmax(dim=0)
    (gradient,) = torch.autograd.grad((weights * cost).sum(), logits)
    expected = weights * (cost - (weights * cost).sum())
    assert (gradient - expected).abs().max() < 1e-12
    step = 1e-5 * torch.eye(9, dtype=torch.float64)
    ahead, behind = (((logits + s * step).softmax(dim=1) * cost).sum(dim=1) for s in (1, -1))
    assert ((ahead - behind) / 2e-5 - expected).abs().max() < 1e-6


@pytest.mark.parametrize("group", [True, False])
def test_a_rating_depends_neither_on_the_rows_beside_it_nor_on_their_order(group):
    made, many = rater(group=group), rows(200, seed=3)
    made.remember_batches(rows(8 * 32, seed=4).unflatten(0, (8, 32)))
    whole, order = made.rate(many), torch.randperm(200, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(made.rate(many[order]), whole[order], rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.cat([made.rate(row[None]) for row in many[:20]]), whole[:20], rtol=0, atol=1e-5)


def test_the_released_ratings_do_depend_on_the_rows_beside():
    made, many = rater(mode="code"), rows(200, seed=3)
    released = made.rate_as_released(many)
    assert not torch.allclose(made.rate_as_released(many[:100]), released[:100], rtol=1e-3)
    torch.testing.assert_close(made.rate_as_released(many.flip(0)), released.flip(0))
    with pytest.raises(ValueError, match="only a rater of mode code rates as released"):
        rater().rate_as_released(many)


def test_a_rating_is_the_mean_logit_over_the_remembered_batches_with_the_row_in_its_place():
    made, batches, row = rater(), rows(4 * 16, seed=6).unflatten(0, (4, 16)), rows(1, seed=7)
    made.remember_batches(batches)
    in_place = [made(torch.cat([row, batch[1:]])).logits[0] for batch in batches]
    torch.testing.assert_close(made.rate(row)[0], torch.stack(in_place).mean().detach(), rtol=0, atol=1e-5)


def test_a_group_term_needs_batches_before_it_rates():
    with pytest.raises(ValueError, match="a rater with a group term rates in remembered batches"):
        rater().rate(rows(3))
    with pytest.raises(ValueError, match=r"temperature must be above 0, got 0\.0"):
        rater(temperature=0.0)


@pytest.mark.parametrize(("mode", "sums_to_one"), [("clean", True), ("code", True), ("paper", False)])
def test_weights_sum_to_one_unless_the_batch_has_a_weight_of_its_own(mode, sums_to_one):
    told = rater(mode=mode)(rows(32, seed=8))
    total = told.weights.sum().item()
    if sums_to_one:
        assert total == pytest.approx(1.0, abs=1e-5)
    else:
        assert total == pytest.approx(told.batch_weight.item(), abs=1e-5) and 0 < total < 1


def teach_on_a_toy(mode: str, *, group: bool, steps: int) -> tuple[Rater, float, float]:
    """alchemist.md, Sec. 7, loss = 1 + softplus(a.x / 4): rater, last batch weight, Spearman of logit and -loss."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(16, generator=generator)
    torch.manual_seed(0)
    made = Rater(torch.tensor([[-1.0] * 16, [1.0] * 16]), mode=mode, group=group, width=16)  # pyright: ignore[reportArgumentType]
    made.trunk = torch.nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    optimiser = torch.optim.AdamW(made.parameters(), lr=1e-3)
    batch_weight = torch.ones(())
    for _ in range(steps):
        x = torch.randn(32, 16, generator=generator)
        told = made(x)
        batch_weight = told.batch_weight if told.batch_weight is not None else batch_weight
        optimiser.zero_grad()
        (told.weights * (1 + torch.nn.functional.softplus(x @ a / 4))).mean().backward()
        optimiser.step()
    fresh = torch.randn(4096, 16, generator=generator)
    logits = made.instance(made.features(fresh))[:, 0].detach().numpy()
    return made, batch_weight.item(), spearman(logits, -(1 + torch.nn.functional.softplus(fresh @ a / 4)).numpy())


def test_a_factor_of_the_whole_batch_collapses_and_the_codes_second_softmax_rescues_it():
    _, of_paper, _ = teach_on_a_toy("paper", group=True, steps=1000)
    assert of_paper < 1e-3
    _, of_code, correlation = teach_on_a_toy("code", group=True, steps=1000)
    assert of_code > 0.95 and correlation > 0.9
