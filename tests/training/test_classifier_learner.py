"""A classifier learns labels by the same step: weights, finite checks and columns as for pairs."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from curation.methods import load_selector
from curation.models.classifier import Classifier, build_classifier
from curation.selector import Selector
from curation.training.classifier_learner import ClassifierLearner
from curation.training.contrastive import make_optimizer
from curation.training.of_round import OfRound
from curation.training.online_step import OnlineSettings, OnlineTrainer
from curation.training.schedules import RateSchedule
from curation.training.step import NotFinite


def block_of(n: int, *, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, 6, generator=generator)
    return {
        "features": features.half(),
        "label": (features[:, 0] > 0).long(),
        "address": torch.arange(n),
        "uid": torch.randint(-(2**62), 2**62, (n, 2), generator=generator),
        "ok": torch.ones(n, dtype=torch.bool),
    }


def learner_of(*, reference: bool = False) -> ClassifierLearner:
    network = build_classifier("linear", num_classes=2, num_features=6, seed=1)
    other = build_classifier("linear", num_classes=2, num_features=6, seed=2) if reference else None
    return ClassifierLearner(network=network, reference=other)


def test_a_step_takes_the_gradient_of_the_weighted_mean_cross_entropy() -> None:
    block, learner = block_of(8), learner_of()
    weights = torch.linspace(0, 2, 8)
    inputs = [block["features"], block["label"]]
    expected = F.cross_entropy(learner.network(inputs[0]), inputs[1], reduction="none")
    (weights * expected).mean().backward()
    gradient = learner.network.head.weight.grad
    assert gradient is not None
    before, gradient = learner.network.head.weight.detach().clone(), gradient.clone()
    optimizer = torch.optim.SGD(learner.network.parameters(), lr=0.5)
    report = learner.step(learner.network, inputs, weights=weights, optimizer=optimizer, max_grad_norm=1e9)
    torch.testing.assert_close(learner.network.head.weight.detach(), before - 0.5 * gradient)
    assert math.isclose(report.loss, (weights * expected).mean().item(), rel_tol=1e-5)
    assert report.logit_scale is None and 0 <= report.accuracy <= 1


def test_it_learns_what_the_labels_say() -> None:
    learner = learner_of()
    settings = OnlineSettings(keep=32, num_steps=60, seed=0, learning_rate=0.05)
    trainer = OnlineTrainer(learner, make_optimizer(learner.network), load_selector("uniform"), settings)
    outcomes = [trainer.step(number, block_of(32, seed=number)) for number in range(60)]
    assert outcomes[-1].report.accuracy > 0.9 > outcomes[0].report.accuracy
    assert outcomes[-1].picked.reference_loss is None


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("cosine", [1, 0.75, 0.25, 0]), ("step", [1, 1, 0.1, 0.01]), ("one-cycle", [0.04, 0.994, 0.463, 0])],
)
def test_the_rate_follows_the_schedule_by_the_share_of_the_run(schedule: RateSchedule, expected: list[float]) -> None:
    settings = OnlineSettings(keep=4, num_steps=3000, seed=0, learning_rate=0.5, schedule=schedule, warmup=0.0)
    learner = learner_of()
    trainer = OnlineTrainer(learner, make_optimizer(learner.network), load_selector("uniform"), settings)
    rates = []
    for number in (0, 999, 1999, 2999):
        trainer.step(number, block_of(4, seed=number))
        rates.append(trainer.optimizer.param_groups[0]["lr"] / 0.5)
    assert rates == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("selector", [OfRound("score"), OfRound("loss"), load_selector("uniform")])
def test_where_every_row_is_wanted_a_bad_one_has_no_share_in_the_step(selector: Selector) -> None:
    block = block_of(8) | {"round_weight": torch.arange(1, 9) / 4.5}
    block["ok"][[2, 5]] = False
    good = {name: column[block["ok"]] for name, column in block.items()}
    of_good = good["round_weight"] if isinstance(selector, OfRound) else torch.ones(6)
    networks, chosen = [], []
    for rows, keep in ((block, 8), (good, 6)):
        learner = learner_of()
        settings = OnlineSettings(keep=keep, num_steps=1, seed=0, learning_rate=0.5, warmup=0)
        optimizer = torch.optim.SGD(learner.network.parameters(), lr=0.5)
        trainer = OnlineTrainer(learner, optimizer, selector, settings)
        chosen.append(trainer.step(0, dict(rows)).picked)
        networks.append(learner.network.head.weight.detach())
    torch.testing.assert_close(*networks)
    picked, of_others = chosen
    torch.testing.assert_close(picked.chosen.row_weights[block["ok"]], of_good * 8 / 6)
    assert picked.chosen.row_weights[[2, 5]].tolist() == [0, 0]
    assert picked.chosen.selected["address"].tolist() == good["address"].tolist()
    assert picked.recorded[0].tolist() == of_others.recorded[0].tolist()
    assert picked.trained.tolist() == list(range(8)), "their turn has passed, or they would come again each round"


def test_too_few_good_rows_to_choose_from_are_an_error() -> None:
    block, learner = block_of(8), learner_of()
    block["ok"][:5] = False
    trainer = OnlineTrainer(
        learner, make_optimizer(learner.network), load_selector("uniform"), OnlineSettings(keep=4, num_steps=1, seed=0)
    )
    with pytest.raises(ValueError, match="step 0: 4 rows are to be chosen, 3 can be"):
        trainer.step(0, block)
    block["ok"][:] = False
    trainer = OnlineTrainer(
        learner, make_optimizer(learner.network), load_selector("uniform"), OnlineSettings(keep=8, num_steps=1, seed=0)
    )
    with pytest.raises(ValueError, match="step 0: 8 rows are to be chosen, 0 can be"):
        trainer.step(0, block)


def test_rho_keeps_the_rows_with_the_highest_reducible_loss() -> None:
    learner, block = learner_of(reference=True), block_of(16)
    settings = OnlineSettings(keep=4, num_steps=1, seed=0)
    losses = [
        F.cross_entropy(network(block["features"]), block["label"], reduction="none").detach()
        for network in (learner.network, learner.reference)
        if network is not None
    ]
    trainer = OnlineTrainer(learner, make_optimizer(learner.network), load_selector("rho"), settings)
    outcome = trainer.step(0, block)
    best = set((losses[0] - losses[1]).topk(4).indices.tolist())
    assert set(outcome.picked.chosen.selected["address"].tolist()) == best
    assert outcome.picked.reference_loss is not None


@pytest.mark.parametrize(("method", "lacking"), [("jest", "image_embedding"), ("rho", "reference_loss")])
def test_a_method_that_needs_what_it_has_not_is_refused(method: str, lacking: str) -> None:
    learner = learner_of()
    with pytest.raises(ValueError, match=lacking):
        OnlineTrainer(
            learner,
            make_optimizer(learner.network),
            load_selector(method),
            OnlineSettings(keep=4, num_steps=1, seed=0),
        )


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    learner, block = learner_of(), block_of(4)
    inputs = [block["features"].clone(), block["label"]]
    inputs[0][2] = torch.inf
    before = learner.network.head.weight.detach().clone()
    optimizer = make_optimizer(learner.network)
    with pytest.raises(NotFinite, match=r"rows \[2\]"):
        learner.step(learner.network, inputs, weights=torch.ones(4), optimizer=optimizer, max_grad_norm=1.0)
    assert torch.equal(learner.network.head.weight.detach(), before)


def test_flops_of_a_linear_head_are_two_per_weight() -> None:
    learner = learner_of(reference=True)
    assert learner.flops(block_of(3), frozenset({"learner_loss", "reference_loss"})) == (24, 24, 24)
    assert learner.flops(block_of(3), frozenset({"mimic_score"})) == (24, 24, 0)


def test_a_classifier_is_a_head_on_features_or_on_an_image_tower(tmp_path) -> None:
    mlp = build_classifier("mlp-5", num_classes=3, num_features=4)
    assert mlp(torch.zeros(2, 4)).shape == (2, 3)
    tower = build_classifier("nano", num_classes=3)
    assert tower(torch.zeros(2, 48, 48, 3, dtype=torch.uint8)).shape == (2, 3)
    file = tmp_path / "weights.pt"
    torch.save(mlp.state_dict(), file)
    again = build_classifier("mlp-5", num_classes=3, num_features=4, seed=9, checkpoint=str(file))
    assert torch.equal(again.head.weight, mlp.head.weight)
    with pytest.raises(ValueError, match="does not hold weights of 'mlp-6'"):
        build_classifier("mlp-6", num_classes=3, num_features=4, checkpoint=str(file))
    with pytest.raises(ValueError, match="at least two classes"):
        build_classifier("linear", num_classes=1, num_features=4)
    with pytest.raises(ValueError, match="name their column"):
        build_classifier("linear", num_classes=2)


def test_the_same_seed_gives_the_same_classifier() -> None:
    first, second, other = (build_classifier("linear", num_classes=2, num_features=3, seed=s) for s in (0, 0, 1))
    assert isinstance(first, Classifier) and torch.equal(first.head.weight, second.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)
