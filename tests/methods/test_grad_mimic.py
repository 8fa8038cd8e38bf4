"""Grad-Mimic's scores and weights, by the exact numbers of its specification."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from curation.methods._softmax import softmax_weights
from curation.methods.grad_mimic import GradMimic
from curation.models.classifier import build_classifier
from curation.numerics.gradients import head_projection, projection, towards
from curation.training.classifier_learner import ClassifierLearner

WEIGHT = torch.tensor([[0.2, -0.1], [0.0, 0.3], [-0.4, 0.1]], dtype=torch.float64)
REFERENCE = torch.tensor([[0.5, 0.2], [-0.1, 0.1], [0.3, -0.6]], dtype=torch.float64)
HIDDEN = torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.3, -0.7]], dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2])


def closed_form() -> torch.Tensor:
    direction, length = towards({"w": WEIGHT}, {"w": REFERENCE})
    assert length == pytest.approx(1.1)
    return head_projection(HIDDEN, HIDDEN @ WEIGHT.T, LABELS, direction["w"])


def test_the_closed_form_has_the_specifications_numbers() -> None:
    pair = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    direction, _ = towards({"w": torch.zeros(2, 2)}, {"w": torch.tensor([[1.0, 0.0], [0.0, 0.0]])})
    scores = head_projection(pair, torch.zeros(2, 2), torch.tensor([0, 1]), direction["w"])
    assert scores.tolist() == [0.5, -0.5]
    expected = torch.tensor([0.96404461, 0.45689641, 0.46237061], dtype=torch.float64)
    torch.testing.assert_close(closed_form(), expected, atol=1e-8, rtol=0)


def test_weights_are_the_batchs_softmax_times_its_size() -> None:
    pair = torch.tensor([0.5, -0.5])
    torch.testing.assert_close(softmax_weights(pair, 1.0) / 2, torch.tensor([0.731059, 0.268941]), atol=1e-6, rtol=0)
    torch.testing.assert_close(softmax_weights(pair, 0.1) / 2, torch.tensor([0.9999546, 0.0000454]), atol=1e-7, rtol=0)
    three = softmax_weights(closed_form(), 1.0) / 3
    torch.testing.assert_close(three, torch.tensor([0.45295462, 0.27277403, 0.27427135]), atol=1e-7, rtol=0)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_closed_form_jvp_and_explicit_gradients_agree(dtype: torch.dtype, bound: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, reference, hidden = (
        torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((5, 7), (5, 7), (40, 7))
    )
    labels = torch.randint(5, (40,), generator=generator)
    direction, length = towards({"w": weight}, {"w": reference})
    closed = head_projection(hidden, hidden @ weight.T, labels, direction["w"])

    def losses_of(at: dict[str, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(hidden @ at["w"].T, labels, reduction="none")

    losses, by_jvp = projection(losses_of, {"w": weight}, direction)
    assert (closed - by_jvp).abs().max() < bound
    torch.testing.assert_close(losses, losses_of({"w": weight}))
    for row in range(40):
        leaf = weight.clone().requires_grad_()
        F.cross_entropy(hidden[row : row + 1] @ leaf.T, labels[row : row + 1]).backward()
        assert leaf.grad is not None
        explicit = -(leaf.grad * (reference - weight)).sum() / length
        assert abs(explicit - closed[row]) < bound


def test_it_is_a_central_difference_of_the_loss() -> None:
    direction, _ = towards({"w": WEIGHT}, {"w": REFERENCE})
    ends = [
        F.cross_entropy(HIDDEN @ (WEIGHT + step * direction["w"]).T, LABELS, reduction="none") for step in (1e-6, -1e-6)
    ]
    torch.testing.assert_close((ends[1] - ends[0]) / 2e-6, closed_form(), atol=1e-7, rtol=0)


def test_at_the_reference_all_rows_weigh_the_same() -> None:
    direction, length = towards({"w": WEIGHT}, {"w": WEIGHT})
    assert length == 0
    scores = head_projection(HIDDEN, HIDDEN @ WEIGHT.T, LABELS, direction["w"])
    assert softmax_weights(scores, 0.1).tolist() == [1.0, 1.0, 1.0]


def test_references_of_another_shape_or_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"w is \(3, 2\), in the reference \(2, 2\)"):
        towards({"w": WEIGHT}, {"w": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="differ in names"):
        towards({"w": WEIGHT}, {"v": WEIGHT})


def block() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {"features": torch.randn(9, 4, generator=generator), "label": torch.arange(9) % 3}


def test_a_learner_makes_the_same_scores_for_the_head_in_closed_form_and_by_jvp() -> None:
    network, reference = (build_classifier("mlp-6", num_classes=3, num_features=4, seed=seed) for seed in (0, 1))
    settings = {"network": network, "reference": reference, "score_batch": 4}
    closed = ClassifierLearner(**settings).rows(block(), frozenset({"mimic_score"}))["mimic_score"]
    by_jvp = ClassifierLearner(**settings).mimic_scores(block())
    torch.testing.assert_close(closed, by_jvp, atol=1e-6, rtol=0)
    whole = ClassifierLearner(**settings, mimic_layer="").mimic_scores(block())
    assert whole.shape == (9,) and not torch.allclose(whole, closed)
    with pytest.raises(ValueError, match="no parameter is in mimic_layer 'nowhere'"):
        ClassifierLearner(**settings, mimic_layer="nowhere").mimic_scores(block())


def test_an_attention_tower_has_a_forward_derivative() -> None:
    network, reference = (build_classifier("nano", num_classes=2, seed=seed) for seed in (0, 1))
    learner = ClassifierLearner(
        network=network, reference=reference, images="pixels", mimic_layer="tower.visual.transformer.resblocks.3"
    )
    pixels = torch.randint(0, 256, (4, 48, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rows = {"pixels": pixels, "label": torch.tensor([0, 1, 0, 1])}
    scores = learner.mimic_scores(rows)
    assert torch.isfinite(scores).all() and scores.abs().max() > 0


def test_fewer_rows_are_those_of_the_highest_score_and_weights_have_mean_one() -> None:
    rows = {"mimic_score": torch.tensor([0.1, 3.0, -1.0, 2.0]), "uid": torch.arange(8).reshape(4, 2)}
    chosen = GradMimic(temperature=0.5).select(rows, 2, 0.0, torch.Generator().manual_seed(0))
    assert chosen.indices.tolist() == [1, 3] and chosen.weights.mean().item() == pytest.approx(1.0)
    rows["mimic_score"][2] = torch.nan
    with pytest.raises(ValueError, match="not finite in 1 rows"):
        GradMimic().select(rows, 4, 0.0, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_a_temperature_is_positive_and_finite(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be positive and finite"):
        GradMimic(temperature=temperature)
