"""Grad-Mimic in training: scores of pairs, what is weighed, one pass for score and step, how a reference fits."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from torch.func import functional_call

from curation.methods import load_selector
from curation.models.classifier import build_classifier
from curation.models.clip import ClipNetwork, build_network
from curation.numerics.contrastive import load_objective
from curation.numerics.gradients import towards
from curation.training.classifier_learner import ClassifierLearner
from curation.training.contrastive import make_optimizer
from curation.training.contrastive_learner import ContrastiveLearner
from curation.training.mimic import Alignment, cosine_of, layer_of, replaced
from curation.training.mimic_pairs import pair_mimic_scores
from curation.training.online_step import OnlineSettings, OnlineTrainer

N = 6


@pytest.mark.parametrize(("layer", "least", "most"), [
    ("", 2.95, 3.0),
    ("visual.transformer.resblocks.0.mlp", 1.6, 2.4),
    ("visual.transformer.resblocks.3.mlp", 1.1, 1.2),
    ("logit_scale", 1.0, 1.0),
])  # fmt: skip
def test_a_mimic_score_costs_the_passes_with_tangents(layer: str, least: float, most: float) -> None:
    network, (pixels, tokens) = build_network("nano", seed=0), pairs()
    rows = {"pixels": pixels, "tokens": tokens}
    learner = ContrastiveLearner(network=network, mimicked=build_network("nano", seed=1), mimic_layer=layer)
    plain = learner.flops(rows, frozenset({"image_embedding"})).scoring
    moved = learner.flops(rows, frozenset({"mimic_score"})).scoring
    assert least <= moved / plain <= most
    assert learner.flops(rows, frozenset({"mimic_score", "image_embedding"})).scoring == plain + moved


def test_a_classifiers_mimic_score_costs_a_pass_of_its_own_unless_its_layer_is_the_heads_weight() -> None:
    network, reference = (build_classifier("mlp-7", num_classes=3, num_features=5, seed=seed) for seed in (0, 1))
    costs = {}
    for layer in ("head.weight", ""):
        learner = ClassifierLearner(network=network, reference=reference, mimic_layer=layer)
        costs[layer] = learner.flops(labelled(), frozenset({"mimic_score"}))
        both = learner.flops(labelled(), frozenset({"mimic_score", "learner_loss"})).scoring
        assert both == costs[layer].scoring + (costs[layer].training if not layer else 0)
    # 2 x (5 x 7 + 7 x 3) of the plain pass; with tangents each product twice more, of weight and of input.
    assert [cost.scoring for cost in costs.values()] == [112, 3 * 112]


def labelled(n: int = 12, *, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, 5, generator=generator)
    return {
        "features": features,
        "label": features[:, :3].argmax(dim=1),
        "address": torch.randperm(n, generator=generator),
        "uid": torch.randint(-(2**62), 2**62, (n, 2), generator=generator),
        "ok": torch.ones(n, dtype=torch.bool),
    }


def classifier(seed: int) -> Any:
    return build_classifier("linear", num_classes=3, num_features=5, seed=seed)


def trainer_of(learner: ClassifierLearner, *, keep: int = 12, method: str = "grad_mimic") -> OnlineTrainer:
    settings = OnlineSettings(keep=keep, num_steps=5, seed=0, learning_rate=0.05)
    fields = {"temperature": 0.3} if method == "grad_mimic" else {}
    return OnlineTrainer(learner, make_optimizer(learner.network), load_selector(method, **fields), settings)


class Forgetful(ClassifierLearner):
    """A learner that scores and trains in two passes."""

    def keep(self, model: Any, block: Any, needs: Any) -> None:
        return None


@pytest.mark.parametrize("scope", ["all", "mimic"])
def test_one_forward_pass_for_score_and_step_is_as_good_as_two(scope: Any) -> None:
    trained = []
    for kind in (ClassifierLearner, Forgetful):
        learner = kind(network=classifier(0), reference=classifier(1), weight_scope=scope)
        trainer = trainer_of(learner)
        outcomes = [trainer.step(number, labelled(seed=number)) for number in range(3)]
        assert outcomes[-1].reused_forward == (kind is ClassifierLearner)
        trained.append((learner.network.state_dict(), outcomes))
    for name, value in trained[0][0].items():
        torch.testing.assert_close(value, trained[1][0][name])
    for mine, other in zip(trained[0][1], trained[1][1], strict=True):
        assert mine.report.loss == pytest.approx(other.report.loss, rel=1e-5)
        torch.testing.assert_close(mine.picked.chosen.row_weights, other.picked.chosen.row_weights)


def test_a_super_batch_that_is_not_all_trained_on_is_scored_by_itself() -> None:
    trainer = trainer_of(ClassifierLearner(network=classifier(0), reference=classifier(1)), keep=8)
    outcome = trainer.step(0, labelled())
    assert not outcome.reused_forward
    weights = outcome.picked.chosen.row_weights
    assert (weights > 0).sum() == 8 and weights.sum().item() == pytest.approx(8.0)
    assert torch.equal(weights > 0, outcome.picked.chosen.is_own_selected)


@pytest.mark.parametrize("method", ["grand", "gradmatch"])
def test_rivals_get_the_factors_of_the_heads_gradient(method: str) -> None:
    learner = ClassifierLearner(network=classifier(0))
    block = labelled()
    rows = learner.rows(block, frozenset({"head_residual", "head_input"}))
    leaf = learner.network.head.weight
    logits = learner.network(block["features"])
    loss = torch.nn.functional.cross_entropy(logits, block["label"], reduction="none")[3]
    [explicit] = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(rows["head_residual"][3][:, None] * rows["head_input"][3], explicit)
    assert trainer_of(learner, keep=4, method=method).step(0, block).picked.trained.shape == (4,)


def test_scope_mimic_weighs_the_layers_gradient_and_no_other() -> None:
    learner = ClassifierLearner(network=classifier(0), reference=classifier(1), weight_scope="mimic")
    block, weights = labelled(), torch.linspace(0, 2, 12)
    losses = torch.nn.functional.cross_entropy(learner.network(block["features"]), block["label"], reduction="none")
    head = learner.network.head
    [weighted] = torch.autograd.grad((weights * losses).mean(), head.weight, retain_graph=True)
    [plain] = torch.autograd.grad(losses.mean(), head.bias)
    before = copy.deepcopy(head.state_dict())
    optimizer = torch.optim.SGD(learner.network.parameters(), lr=0.5)
    learner.step(
        learner.network, [block["features"], block["label"]], weights=weights, optimizer=optimizer, max_grad_norm=1e9
    )
    torch.testing.assert_close(head.weight.detach(), before["weight"] - 0.5 * weighted)
    torch.testing.assert_close(head.bias.detach(), before["bias"] - 0.5 * plain)


# Pairs.


def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(0, 256, (N, 48, 48, 3), dtype=torch.uint8, generator=generator)
    return pixels, torch.randint(1, 400, (N, 28), generator=generator)


@pytest.fixture(scope="module")
def networks() -> tuple[ClipNetwork, ClipNetwork]:
    return build_network("nano", seed=0), build_network("nano", seed=1)


LAYERS = ["visual.transformer.resblocks.3", "text_projection", "logit_scale"]


@pytest.mark.parametrize("objective", ["sigmoid", "softmax"])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_pairs_score_is_its_own_losss_gradient_along_the_way(
    networks: tuple[ClipNetwork, ClipNetwork], layer: str, objective: str
) -> None:
    network, reference = networks
    if layer == "logit_scale":
        reference = copy.deepcopy(reference)
        with torch.no_grad():
            reference.log_scale.add_(0.5)
    pixels, tokens = pairs()
    scores = pair_mimic_scores(
        network, reference, pixels, tokens, layer=layer, objective=objective, batch_size=4, block_rows=5
    )
    weights = layer_of(network.clip, layer)
    direction, _ = towards(weights, layer_of(reference.clip, layer))
    output = network(pixels, tokens)
    losses = load_objective(objective)(
        output.image, output.text, logit_scale=output.logit_scale, logit_bias=output.logit_bias
    )
    for row in range(N):
        gradients = torch.autograd.grad(losses[row], list(weights.values()), retain_graph=True)
        explicit = -sum((g * d).sum() for g, d in zip(gradients, direction.values(), strict=True))
        torch.testing.assert_close(scores[row], explicit, rtol=1e-3, atol=1e-4)


def test_the_whole_models_score_is_a_central_difference(networks: tuple[ClipNetwork, ClipNetwork]) -> None:
    network, reference = (copy.deepcopy(some).double() for some in networks)
    pixels, tokens = pairs()
    features = pixels  # normalise makes float32; the parameters' double decides from the first layer on
    network.normalise = reference.normalise = lambda rows: rows.permute(0, 3, 1, 2).double() / 255  # type: ignore[method-assign]
    weights = {name: value.detach() for name, value in layer_of(network.clip, "").items()}
    direction, _ = towards(weights, layer_of(reference.clip, ""))

    def losses(step: float) -> torch.Tensor:
        at = {f"clip.{name}": value + step * direction[name] for name, value in weights.items()}
        output = functional_call(network, at, (features, tokens))
        return load_objective("sigmoid")(
            output.image, output.text, logit_scale=output.logit_scale, logit_bias=output.logit_bias
        )

    with torch.no_grad():
        difference = -(losses(1e-3) - losses(-1e-3)) / 2e-3
        scores = pair_mimic_scores(network, reference, features, tokens, layer="", objective="sigmoid", batch_size=N)
    torch.testing.assert_close(scores.double(), difference.double(), rtol=2e-2, atol=1e-3)


def test_a_layer_of_another_shape_or_name_is_refused() -> None:
    learner = ClassifierLearner(
        network=classifier(0), reference=build_classifier("linear", num_classes=3, num_features=4, seed=1)
    )
    for ask in (learner.alignment, lambda block: learner.rows(block, frozenset({"mimic_score"}))):
        with pytest.raises(ValueError, match=r"head.weight is \(3, 5\), in the reference \(3, 4\)"):
            ask(labelled())
    with pytest.raises(ValueError, match="no parameter is in mimic_layer 'nowhere'"):
        layer_of(learner.network, "nowhere")


# Does the reference fit?


def trained_mlp(seed: int, *, permuted: bool = False) -> Any:
    """A classifier that has learnt its labels; `permuted`: the same function, its hidden units in another order."""
    network = build_classifier("mlp-16", num_classes=3, num_features=5, seed=seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    for step in range(150):
        block = labelled(64, seed=step)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(block["features"]), block["label"]).backward()
        optimizer.step()
    if permuted:
        order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
        hidden = cast(Any, network.tower)[0]
        with torch.no_grad():
            hidden.weight.copy_(hidden.weight[order])
            hidden.bias.copy_(hidden.bias[order])
            network.head.weight.copy_(network.head.weight[:, order])
    return network


def alignment(reference: Any, *, layer: str = "head.weight", network: Any = None) -> Alignment:
    start = network or build_classifier("mlp-16", num_classes=3, num_features=5, seed=0)
    measured = ClassifierLearner(network=start, reference=reference, mimic_layer=layer).alignment(
        labelled(300, seed=999)
    )
    assert measured is not None
    return measured


def test_a_reference_that_grew_from_the_learners_own_weights_fits() -> None:
    reference = trained_mlp(0)
    before = copy.deepcopy(reference.state_dict())
    measured = alignment(reference)
    assert measured.reference > 0.85 and measured.surviving > 0.45 and measured.complaint is None
    assert all(torch.equal(value, before[name]) for name, value in reference.state_dict().items())
    assert alignment(reference, layer="").complaint is None


def test_the_same_function_in_another_basis_does_not_fit_and_the_complaint_has_the_figures() -> None:
    reference = trained_mlp(0, permuted=True)
    measured = alignment(reference)
    assert measured.reference == pytest.approx(alignment(trained_mlp(0)).reference, abs=0.02)
    assert measured.complaint is not None and measured.surviving < 0.3
    assert f"with the reference's layer {measured.swapped:.3f}" in measured.complaint
    whole = alignment(trained_mlp(5), layer="")
    assert whole.complaint is not None and "have another origin" in whole.complaint


def test_a_reference_that_knows_nothing_is_told() -> None:
    random = build_classifier("mlp-16", num_classes=3, num_features=5, seed=11)
    with torch.no_grad():
        random.head.weight.zero_()
    measured = alignment(random)
    assert measured.complaint is not None and "knows nothing of these rows" in measured.complaint


def test_a_swapped_layer_is_put_back_and_cosines_are_of_all_weights_in_a_row() -> None:
    network, other = classifier(0), classifier(1)
    before = copy.deepcopy(network.state_dict())
    layer = layer_of(network, "")
    with replaced(layer, layer_of(other, "")):
        assert torch.equal(network.head.weight, other.head.weight)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    a, b = {"x": torch.tensor([3.0]), "y": torch.tensor([4.0])}, {"x": torch.tensor([4.0]), "y": torch.tensor([3.0])}
    assert cosine_of(a, b) == pytest.approx(24 / 25)
    assert cosine_of(a, {name: torch.zeros(1) for name in a}) == 0.0


def test_pairs_are_aligned_with_their_own_model_only(networks: tuple[ClipNetwork, ClipNetwork]) -> None:
    network, reference = networks
    pixels, tokens = pairs()
    block = {"pixels": pixels, "tokens": tokens}
    measured = ContrastiveLearner(network=network, mimicked=reference, mimic_layer=LAYERS[0]).alignment(block)
    assert measured is not None and measured.chance == 1 / N and not measured.is_whole
    assert ContrastiveLearner(network=network).alignment(block) is None
