"""A weighted step on a separable loss, where rows cannot see each other, and on the pair losses."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curation.models.clip import TowerOutput
from curation.numerics.contrastive import cosine, sigmoid_loss, softmax_loss
from curation.training.step import PairBatch, StepReport, contrastive_step


class Toy(nn.Module):
    """Two linear towers on 2 x 2 pixels and 3 tokens; quick, and shaped as a ClipNetwork is."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.image = nn.Parameter(torch.randn(12, 4, generator=generator))
        self.text = nn.Parameter(torch.randn(3, 4, generator=generator))
        self.log_scale, self.bias = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(-1.0))

    def forward(self, pixels: Tensor, tokens: Tensor) -> TowerOutput:
        image = nn.functional.normalize(pixels.flatten(1).float() / 255 @ self.image, dim=1)
        text = nn.functional.normalize(tokens.float() @ self.text, dim=1)
        return TowerOutput(image, text, self.log_scale.exp(), self.bias)


def separable_loss(image_ND: Tensor, text_ND: Tensor, *, logit_scale: Tensor, logit_bias: Tensor, **_: Any) -> Tensor:
    return (1 - cosine(image_ND, text_ND)) * logit_scale


def batch_of(n: int, *, seed: int = 0) -> PairBatch:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (n, 2, 2, 3), dtype=torch.uint8, generator=generator)
    return PairBatch(pixels, torch.randint(1, 50, (n, 3), generator=generator))


def rows(batch: PairBatch, indices: list[int]) -> PairBatch:
    return PairBatch(batch.pixels[indices], batch.tokens[indices])


def step(
    toy: Toy,
    batch: PairBatch,
    weights: list[float],
    *,
    objective=separable_loss,
    max_grad_norm: float = 1e9,
    micro_batches: int = 1,
) -> tuple[dict[str, Tensor], StepReport]:
    """The gradient that a step of plain SGD with learning rate 1 took, by parameter, and its report."""
    before = deepcopy(toy.state_dict())
    optimizer = torch.optim.SGD(toy.parameters(), lr=1.0)
    report = contrastive_step(
        toy,
        batch,
        weights=torch.tensor(weights),
        optimizer=optimizer,
        objective=objective,
        max_grad_norm=max_grad_norm,
        micro_batches=micro_batches,
    )
    return {name: before[name] - value for name, value in toy.state_dict().items()}, report


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor], *, factor: float = 1.0) -> None:
    for name in left:
        torch.testing.assert_close(left[name], right[name] * factor, rtol=1e-4, atol=1e-6)


def test_rows_of_weight_0_give_no_gradient() -> None:
    batch = batch_of(4)
    some, _ = step(Toy(), batch, [1.0, 0.0, 1.0, 0.0])
    # The mean is over the batch's rows, so two rows of four count half.
    alone, _ = step(Toy(), rows(batch, [0, 2]), [1.0, 1.0])
    assert_same(some, alone, factor=0.5)
    none, report = step(Toy(), batch, [0.0] * 4, objective=sigmoid_loss)
    assert report.loss == report.grad_norm == 0.0 and all(not value.any() for value in none.values())


def test_weight_2_is_the_row_twice() -> None:
    batch = batch_of(3)
    weighted, report = step(Toy(), batch, [2.0, 1.0, 0.0])
    twice, twice_report = step(Toy(), rows(batch, [0, 0, 1]), [1.0, 1.0, 1.0])
    assert_same(weighted, twice)
    assert report.loss == pytest.approx(twice_report.loss)


def test_weights_of_1_are_the_plain_mean() -> None:
    toy, batch = Toy(), batch_of(5)
    losses = softmax_loss(*_embeddings(toy, batch), logit_scale=toy.log_scale.exp(), logit_bias=toy.bias)
    _, report = step(toy, batch, [1.0] * 5, objective=softmax_loss)
    assert report.loss == pytest.approx(losses.mean().item())
    torch.testing.assert_close(report.losses, losses.detach())
    assert not report.losses.requires_grad


def _embeddings(toy: Toy, batch: PairBatch) -> tuple[Tensor, Tensor]:
    output = toy(*batch[:2])
    return output.image, output.text


def test_the_report_is_of_the_model_before_the_step() -> None:
    toy, batch = Toy(), batch_of(6)
    image, text = _embeddings(toy, batch)
    accuracy = ((image @ text.T).argmax(dim=1) == torch.arange(6)).float().mean().item()
    _, report = step(toy, batch, [1.0] * 6, objective=sigmoid_loss)
    assert report.accuracy == pytest.approx(accuracy)
    assert report.logit_scale == pytest.approx(torch.tensor(1.0).exp().item())


def test_the_gradient_is_clipped_and_its_norm_before_that_reported() -> None:
    free, report = step(Toy(), batch_of(4), [1.0] * 4, objective=sigmoid_loss)
    norm = torch.cat([value.flatten() for value in free.values()]).norm().item()
    assert report.grad_norm == pytest.approx(norm, rel=1e-4)
    clipped, again = step(Toy(), batch_of(4), [1.0] * 4, objective=sigmoid_loss, max_grad_norm=norm / 4)
    assert again.grad_norm == pytest.approx(norm, rel=1e-4)
    assert_same(clipped, free, factor=0.25)


def test_a_loss_that_is_not_finite_stops_before_any_weight_changes() -> None:
    def broken(image_ND: Tensor, text_ND: Tensor, *, logit_scale: Tensor, logit_bias: Tensor, **_: Any) -> Tensor:
        return separable_loss(image_ND, text_ND, logit_scale=logit_scale, logit_bias=logit_bias) / torch.tensor([1, 0])

    assert_untouched(broken, match=r"batch is bad: loss (inf|nan) on rank 0, not finite in rows \[1\] of its 2")


def test_a_gradient_that_is_not_finite_stops_before_any_weight_changes() -> None:
    def broken(image_ND: Tensor, text_ND: Tensor, *, logit_scale: Tensor, logit_bias: Tensor, **_: Any) -> Tensor:
        return ((image_ND - image_ND.detach()).abs().sum(dim=1)).sqrt() + text_ND.sum(dim=1)

    assert_untouched(broken, match="is finite, its gradient's norm is nan")


def assert_untouched(objective, *, match: str) -> None:
    toy = Toy()
    before, optimizer = deepcopy(toy.state_dict()), torch.optim.AdamW(toy.parameters())
    with pytest.raises(ValueError, match=match):
        contrastive_step(toy, batch_of(2), weights=torch.ones(2), optimizer=optimizer, objective=objective)
    assert all(torch.equal(before[name], value) for name, value in toy.state_dict().items())
    assert not optimizer.state and all(parameter.grad is None for parameter in toy.parameters())


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [1.0, float("nan")], []])
def test_weights_that_do_not_fit_the_batch_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights must be"):
        step(Toy(), batch_of(2), weights)


@pytest.mark.parametrize("objective", [sigmoid_loss, softmax_loss])
@pytest.mark.parametrize("micro_batches", [2, 3, 7])
def test_micro_batches_change_nothing_but_the_memory(objective, micro_batches: int) -> None:
    weights = [0.0, 0.5, 1.0, 1.5, 2.0, 1.0, 1.0]
    whole, seen = step(Toy(), batch_of(7), weights, objective=objective)
    parts, seen_in_parts = step(Toy(), batch_of(7), weights, objective=objective, micro_batches=micro_batches)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6)
    assert seen_in_parts.loss == pytest.approx(seen.loss) and seen_in_parts.accuracy == seen.accuracy
