"""Grad-Mimic's rivals: their scores against explicit gradients, their weights by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from curation.methods import load_selector
from curation.methods.agra import agreement_weights
from curation.numerics.gradients import head_gradient, head_gram, head_residual

GENERATOR = torch.Generator().manual_seed(0)
WEIGHT, INPUT, LABELS = (
    torch.randn(3, 5, generator=GENERATOR),
    torch.randn(8, 5, generator=GENERATOR),
    torch.arange(8) % 3,
)
COMPARISON = torch.randn(3, 5, generator=GENERATOR)
ROWS = {
    "head_residual": head_residual(INPUT @ WEIGHT.T, LABELS),
    "head_input": INPUT,
    "comparison_gradient": COMPARISON,
    "uid": torch.arange(16).reshape(8, 2),
}


def gradients() -> torch.Tensor:
    leaf = WEIGHT.clone().requires_grad_()
    losses = F.cross_entropy(INPUT @ leaf.T, LABELS, reduction="none")
    return torch.stack([torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in losses])


def test_the_two_factors_give_the_explicit_gradients_products() -> None:
    explicit = gradients()
    torch.testing.assert_close(head_gradient(ROWS["head_residual"], INPUT), explicit.mean(dim=0))
    weights = torch.linspace(0, 2, 8)
    torch.testing.assert_close(
        head_gradient(ROWS["head_residual"], INPUT, weights), (weights[:, None, None] * explicit).mean(dim=0)
    )
    torch.testing.assert_close(head_gram(ROWS["head_residual"], INPUT), explicit.flatten(1) @ explicit.flatten(1).T)


def test_scores_are_norm_cosine_and_projection_of_the_explicit_gradients() -> None:
    explicit = gradients().flatten(1)
    scores = {name: load_selector(name).score(ROWS, 0.5) for name in ("grand", "agra", "influence", "gradmatch")}
    torch.testing.assert_close(scores["grand"], explicit.norm(dim=1))
    torch.testing.assert_close(scores["agra"], F.cosine_similarity(explicit, COMPARISON.flatten()[None], dim=1))
    torch.testing.assert_close(scores["influence"], explicit @ COMPARISON.flatten() / COMPARISON.norm())
    torch.testing.assert_close(scores["gradmatch"], explicit @ explicit.mean(dim=0))


def test_agreeing_rows_share_the_weight_and_all_do_if_none_agrees() -> None:
    assert agreement_weights(torch.tensor([0.5, -0.1, 1e-3, 0.0])).tolist() == [2.0, 0.0, 2.0, 0.0]
    assert agreement_weights(torch.tensor([-0.5, 0.0])).tolist() == [1.0, 1.0]
    still = {**ROWS, "comparison_gradient": torch.zeros(3, 5)}
    assert load_selector("agra").select(still, 8, 0.5, GENERATOR).weights.tolist() == [1.0] * 8


def test_gradmatch_comes_closer_to_the_mean_gradient_than_equal_weights_of_its_rows() -> None:
    explicit = gradients().flatten(1)
    chosen = load_selector("gradmatch", ridge=0.0).select(ROWS, 4, 0.5, GENERATOR)
    target = explicit.mean(dim=0)

    def error(weights: torch.Tensor) -> float:
        rows = explicit[chosen.indices]
        scale = ((weights @ rows) @ target) / (weights @ rows).square().sum()
        return (target - scale * (weights @ rows)).norm().item()

    assert error(chosen.weights) < error(torch.ones(4))
    assert chosen.weights.mean().item() == pytest.approx(1.0)


def test_gradmatchs_ridge_is_half_of_the_mean_squared_gradient_unless_told() -> None:
    explicit = gradients().flatten(1).double()
    chosen = load_selector("gradmatch").select(ROWS, 3, 0.5, GENERATOR)
    rows, ridge = explicit[chosen.indices], 0.5 * explicit.square().sum(dim=1).mean()
    fitted = torch.linalg.solve(rows @ rows.T + ridge * torch.eye(3), rows @ explicit.mean(dim=0))
    assert (fitted > 0).all()
    torch.testing.assert_close(chosen.weights.double(), fitted * 3 / fitted.sum(), rtol=1e-5, atol=1e-6)


def test_rho_with_a_temperature_weighs_by_the_softmax_of_the_reducible_loss() -> None:
    rows = {
        "learner_loss": torch.tensor([2.0, 1.0]),
        "reference_loss": torch.tensor([0.5, 0.5]),
        "uid": torch.arange(4).reshape(2, 2),
    }
    chosen = load_selector("rho", temperature=1.0).select(rows, 2, 0.5, GENERATOR)
    assert chosen.indices.tolist() == [0, 1]
    torch.testing.assert_close(chosen.weights / 2, torch.tensor([0.731059, 0.268941]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["rho", "influence"])
def test_a_temperature_is_positive_and_finite(name: str) -> None:
    with pytest.raises(ValueError, match="temperature must be positive and finite"):
        load_selector(name, temperature=0.0)


def test_a_ridge_is_not_negative() -> None:
    with pytest.raises(ValueError, match="ridge must be finite and at least 0"):
        load_selector("gradmatch", ridge=-1.0)
