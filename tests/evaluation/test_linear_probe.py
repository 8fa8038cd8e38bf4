from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from curation.evaluation.linear_probe import fit_probe, probe_accuracy


def blobs(seed: int, n: int = 60, classes: int = 3, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = 3 * torch.eye(classes, 5)
    return centres[labels] + spread * torch.randn(n, 5, generator=generator), labels


def test_classes_that_lie_apart_are_told_apart_on_rows_that_were_not_seen() -> None:
    train, test = blobs(0, spread=0.3), blobs(1, spread=0.3)
    probe = fit_probe(*train, num_classes=3)
    assert probe_accuracy(probe, *test) == 1


def test_it_stands_at_the_minimum_of_its_loss() -> None:
    x, labels = blobs(2)
    probe = fit_probe(x, labels, num_classes=3, penalty=0.1)
    weight, bias = probe.weight_FC.clone().requires_grad_(), probe.bias_C.clone().requires_grad_()
    logits = (x.double() - probe.mean_F) / probe.std_F @ weight + bias
    (F.cross_entropy(logits, labels) + 0.05 * weight.square().sum()).backward()
    for gradient in (weight.grad, bias.grad):
        assert gradient is not None and gradient.abs().max() < 1e-6


def test_features_that_say_nothing_leave_the_shares_of_the_classes() -> None:
    labels = torch.tensor([0, 0, 0, 1])
    probe = fit_probe(torch.full((4, 2), 7.3), labels, num_classes=2)
    assert probe.logits(torch.full((1, 2), 9.0)).softmax(dim=1)[0].tolist() == pytest.approx([0.75, 0.25], abs=1e-6)


def test_the_scale_of_a_feature_does_not_matter() -> None:
    x, labels = blobs(3)
    scale = torch.tensor([1e-3, 1, 10, 100, 1e4])
    torch.testing.assert_close(
        fit_probe(x.double(), labels, num_classes=3).logits(x),
        fit_probe(x.double() * scale, labels, num_classes=3).logits(x.double() * scale),
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize(
    ("x", "labels", "fields", "message"),
    [
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), {}, "features must be finite"),
        (torch.full((2, 2), torch.nan), torch.zeros(2, dtype=torch.int64), {}, "features must be finite"),
        (torch.zeros(2, 2), torch.zeros(2), {}, r"labels must be int64 \(2,\)"),
        (torch.zeros(2, 2), torch.tensor([0, 2]), {}, r"labels must be in \[0, 2\), got 0 to 2"),
        (torch.zeros(2, 2), torch.tensor([0, 1]), {"penalty": 0.0}, "penalty must be above 0"),
    ],
)
def test_what_cannot_be_fitted_is_refused(x: torch.Tensor, labels: torch.Tensor, fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_probe(x, labels, num_classes=2, **fields)


def test_an_accuracy_needs_rows() -> None:
    x, labels = blobs(4)
    probe = fit_probe(x, labels, num_classes=3)
    with pytest.raises(ValueError, match="of one length above 0, got 0, 0"):
        probe_accuracy(probe, x[:0], labels[:0])
