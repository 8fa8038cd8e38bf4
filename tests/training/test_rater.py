"""A rater is taught the same however often it is stopped, by the gradients that its modes say, and never in silence."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from curation.evaluation.correlation import spearman
from curation.models.rater import Rater, Weights
from curation.training.rater import (
    BatchPlan,
    Collapsed,
    RaterSpec,
    RaterTrainer,
    Rows,
    alignment,
    learning_rate_factor,
    losses,
    own_groups,
)
from curation.training.rater_dynamics import dynamics
from curation.training.rater_run import ProxySpec, RaterRun, RaterShape, Split, make_proxy, ratings_of
from curation.training.step import NotFinite


class Square(nn.Module):
    """Loss: squared distance of a row to a learnt centre."""

    def __init__(self, width: int):
        super().__init__()
        self.centre = nn.Parameter(torch.zeros(width))

    def prepare(self, rows_NG: Tensor) -> Tensor:
        return rows_NG.float()

    def forward(self, rows_BG: Tensor, condition_BC: Tensor | None = None) -> Tensor:
        return (rows_BG - self.centre).square().sum(dim=1)


def square(rows_nG: Tensor, condition_width: int, seed: int) -> Square:
    return Square(rows_nG.shape[1])


SQUARE = ProxySpec(kind="function", function="tests.training.test_rater:square")


def split(n: int, *, seed: int) -> Split:
    """Rows of which a third lie far from the others."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(n, 4)).astype(np.float32) + 4.0 * (np.arange(n) % 3 == 0)[:, None]
    return Split(rows, rows)


def a_run(*, proxy: ProxySpec = SQUARE, shape: RaterShape | None = None, **fields: Any) -> RaterRun:
    spec = RaterSpec(**{"batch_size": 8, "epochs": 6, "learning_rate": 1e-2, **fields})
    shape = shape or RaterShape(width=16, hidden=8)
    return RaterRun(
        spec, shape, proxy, train=split(240, seed=0), validation=split(96, seed=1), test=split(32, seed=2), seed=3
    )


def finished(run: RaterRun) -> np.ndarray:
    while not run.is_over:
        run.step()
    return ratings_of(run.finished_rater(), split(240, seed=0).seen)


class Table(nn.Module):
    """A rater of three rows whose logits are its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.3, -0.5, 0.1]))

    def forward(self, seen: Tensor) -> Weights:
        return Weights(self.logits.softmax(0), self.logits, None)


X, V = torch.tensor([[1.0], [-2.0], [0.7]]), torch.tensor([[0.4], [1.3], [-0.6]])
CENTRE, OF_REFERENCE, SHARE = 0.5, -0.25, 0.6
GRADIENTS = {"clean": {}, "code": {"mode": "code"}, "paper": {"mode": "paper"}, "clean, Eq. 6": {"use_reference": True}}


def gradients_of_a_step(**fields: Any) -> dict[str, Tensor]:
    """What each optimiser is given in one step of one group of three rows of each kind."""
    proxy = Square(1)
    proxy.centre.data.fill_(CENTRE)
    spec = RaterSpec(batch_size=3, groups=1, validation_share=SHARE, **{"clip": 1e9, **fields})
    trainer = RaterTrainer(spec, rater=cast(Any, Table()), proxy=proxy, num_steps=10, steps_per_epoch=5)
    networks = {"proxy": proxy, "rater": trainer.rater, "reference": trainer.reference}
    found: dict[str, Tensor] = {}
    for name, network in networks.items():
        if network is None:
            continue
        if name == "reference":
            cast(Any, network).centre.data.fill_(OF_REFERENCE)

        def note(*_: Any, name: str = name, network: nn.Module = network) -> None:
            [parameter] = network.parameters()
            assert parameter.grad is not None
            found[name] = parameter.grad.clone()

        getattr(trainer, f"_{name}_step").register_step_pre_hook(note)
    trainer.train_step([(Rows(X, X), Rows(V, V))])
    return found


@pytest.mark.parametrize("of", GRADIENTS)
def test_each_modes_gradients_are_those_of_its_equations(of: str) -> None:
    """Eqs. 5, 6, 7 and 9 written out for one weight: losses (x - c)^2, their derivatives -2 (x - c)."""
    fields = GRADIENTS[of]
    x, v = X[:, 0].double(), V[:, 0].double()
    w = Table().logits.detach().double().softmax(0)
    loss, slope = (x - CENTRE) ** 2, -2 * (x - CENTRE)
    of_validation = (-2 * (v - CENTRE)).mean()
    mode, parts = fields.get("mode", "clean"), 3 if of == "code" else 1
    weighted = (w * slope).sum() / parts
    wanted = {"proxy": of_validation + weighted if mode == "paper" else SHARE * of_validation + (1 - SHARE) * weighted}
    cost = loss
    if of in ("paper", "clean, Eq. 6"):
        cost = loss - (x - OF_REFERENCE) ** 2
        wanted["reference"] = (w * -2 * (x - OF_REFERENCE)).sum()
    wanted["rater"] = w * (cost - (w * cost).sum()) / parts
    found = gradients_of_a_step(**fields)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].double(), value.reshape(found[name].shape), rtol=1e-5, atol=1e-6)


def test_entropy_and_the_longest_gradient_are_as_they_are_called() -> None:
    w = Table().logits.detach().double().softmax(0)
    plain, spread = (gradients_of_a_step(entropy=entropy)["rater"].double() for entropy in (0.0, 0.7))
    of_entropy = w * (w.log() - (w * w.log()).sum())
    torch.testing.assert_close(spread - plain, 0.7 * of_entropy, rtol=1e-4, atol=1e-6)
    clipped = gradients_of_a_step(mode="paper", clip=0.01)
    assert {name: value.norm().item() for name, value in clipped.items()} == pytest.approx(
        dict.fromkeys(("proxy", "rater", "reference"), 0.01), rel=1e-3
    )


@pytest.mark.parametrize("mode", ["clean", "code"])
def test_rows_that_cost_less_are_rated_higher(mode):
    run = a_run(mode=mode, epochs=12)
    rating = finished(run)
    cost = losses(run.trainer.proxy, run.rows("train", np.arange(240))).detach().numpy()
    assert spearman(rating, -cost) > 0.4


def test_align_rates_by_the_gradients_product_and_not_by_the_loss():
    # Far rows cost most, and the centre, between the two groups, is pulled towards them hardest.
    run = a_run(mode="align", epochs=12, validation_share=0.0)
    rating = finished(run)
    told = alignment(run.trainer.proxy, run.rows("train", np.arange(240)), run.rows("validation", np.arange(96)))
    assert spearman(rating, told.numpy()) > 0.4


@pytest.mark.parametrize("fields", [{}, {"use_reference": True}], ids=["Eq. 9", "Eq. 6"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(fields):
    whole, stopped = a_run(**fields), a_run(**fields)
    for _ in range(17):
        stopped.step()
    resumed = a_run(**fields)
    resumed.trainer.load_state_dict(stopped.trainer.state_dict())
    np.testing.assert_array_equal(finished(resumed), finished(whole))


def test_the_proxy_becomes_the_reference_when_its_warm_up_ends():
    run = a_run(use_reference=True, warmup_steps=5)
    assert all(run.step() is None for _ in range(5)) and run.trainer.step == 0
    reference = run.trainer.reference
    assert reference is not None
    assert torch.equal(run.trainer.proxy.centre, reference.centre) and run.trainer.proxy.centre.abs().sum() > 0  # pyright: ignore
    assert run.step() is not None and not torch.equal(run.trainer.proxy.centre, reference.centre)  # pyright: ignore


def gradients_added_up(run: RaterRun, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What one rank hands to the sum over ranks in its first step."""
    handed: list[Tensor] = []

    def hear(value: Tensor) -> Tensor:
        handed.append(value.clone())
        return value

    with monkeypatch.context() as patched:
        patched.setattr("curation.training.rater.sum_over_ranks", hear)
        run.step()
    return handed


def test_two_groups_on_two_ranks_are_two_groups_on_one(monkeypatch):
    runs = [a_run(), a_run()]
    for rank, run in enumerate(runs):
        run._groups = list(own_groups(run.spec, rank=rank, world_size=2))
    first, second = (gradients_added_up(run, monkeypatch) for run in runs)
    for whole, a, b in zip(gradients_added_up(a_run(), monkeypatch), first, second, strict=True):
        torch.testing.assert_close(a + b, whole, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="3 workers must divide the 2 groups"):
        list(own_groups(runs[0].spec, rank=0, world_size=3))


def test_alignment_is_the_product_with_the_validation_gradient():
    proxy = Square(4)
    with torch.no_grad():
        proxy.centre.copy_(torch.tensor([0.3, -0.2, 0.1, 0.0]))
    train, validation = (Rows(torch.zeros(n, 1), torch.randn(n, 4)) for n in (5, 7))
    (of_validation,) = torch.autograd.grad(losses(proxy, validation).mean(), [proxy.centre])
    each = [torch.autograd.grad(losses(proxy, train.at(np.array([i])))[0], [proxy.centre])[0] for i in range(5)]
    expected = torch.stack([gradient @ of_validation for gradient in each])
    torch.testing.assert_close(alignment(proxy, train, validation), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["autoregressive", "masked"])
def test_every_proxy_has_a_forward_derivative(kind):
    spec = ProxySpec(kind=kind, width=8, num_tokens=4, num_codes=5, components=2)
    rows = Split(np.zeros((60, 1), np.float32), np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32))
    proxy = make_proxy(spec, rows, seed=0)
    prepared = proxy.prepare(torch.from_numpy(rows.modelled))  # pyright: ignore[reportCallIssue]
    some = Rows(torch.zeros(60, 1), prepared)
    told = alignment(proxy, some.at(np.arange(6)), some.at(np.arange(6, 60)))
    gradients = torch.autograd.grad(losses(proxy, some.at(np.arange(6, 60))).mean(), list(proxy.parameters()))
    one = torch.autograd.grad(losses(proxy, some.at(np.array([2])))[0], list(proxy.parameters()))
    expected = sum((a * b).sum() for a, b in zip(gradients, one, strict=True))
    torch.testing.assert_close(told[2], expected, rtol=1e-4, atol=1e-5)


def test_a_batch_weight_that_collapses_stops_the_run_and_says_why():
    run = a_run(mode="paper", warmup_steps=1)
    head = run.trainer.rater.of_group
    assert head is not None
    with torch.no_grad():
        head[-1].bias.fill_(-20.0)  # pyright: ignore[reportCallIssue]
    run.step()
    before = run.trainer.proxy.state_dict()["centre"].clone()
    with pytest.raises(Collapsed, match=r"the batch's weight fell to .* at step 1\. .* Use mode clean"):
        run.step()
    assert run.trainer.step == 0 and torch.equal(run.trainer.proxy.state_dict()["centre"], before)


def test_losses_that_are_not_finite_stop_the_run():
    run = a_run()
    with torch.no_grad():
        run.trainer.proxy.centre.fill_(float("inf"))  # pyright: ignore[reportCallIssue]
    with pytest.raises(NotFinite, match="the losses of step 1 are not finite"):
        run.step()


def test_entropy_spreads_a_batchs_weight_over_more_rows():
    def shared(entropy: float) -> float:
        run = a_run(entropy=entropy, epochs=6, share_decay=0.0)
        facts = [run.step() for _ in range(run.num_steps)]
        return float(np.mean([f.effective_rows for f in facts[-12:] if f]))

    assert shared(30.0) > 1.1 * shared(0.0)


def test_each_round_takes_each_row_at_most_once_and_a_plan_needs_rows_enough():
    plan = BatchPlan(RaterSpec(batch_size=8, groups=2), num_train=50, num_validation=40, seed=0)
    assert plan.steps_per_epoch == 2
    taken = np.concatenate([plan.train(step, group) for step in range(3) for group in range(2)])
    assert len(set(taken.tolist())) == 48 and taken.max() < 50
    again = BatchPlan(RaterSpec(batch_size=8, groups=2), num_train=50, num_validation=40, seed=0)
    assert np.array_equal(again.validation(7, 1), plan.validation(7, 1))
    with pytest.raises(ValueError, match="a step takes 16 rows of each, there are 50 train and 9 validation rows"):
        BatchPlan(RaterSpec(batch_size=8, groups=2), num_train=50, num_validation=9, seed=0)


def test_the_learning_rate_warms_up_stays_and_falls():
    assert learning_rate_factor(0.0) == pytest.approx(0.005)
    assert learning_rate_factor(0.02) == learning_rate_factor(0.06) == 1.0
    assert learning_rate_factor(1.0) == pytest.approx(0.01)


def test_g_falls_by_its_decay_an_epoch():
    run = a_run(epochs=3)
    facts = [run.step() for _ in range(run.num_steps)]
    assert [f.share for f in facts if f][:: run.plan.steps_per_epoch] == pytest.approx([1.0, 0.97, 0.94])


def test_what_is_far_from_the_centre_has_the_larger_gradient_and_change_is_between_snapshots():
    proxy, n = Square(2), 40
    rows = Rows(torch.zeros(n, 1), torch.linspace(0, 4, n)[:, None].expand(n, 2).contiguous())
    snapshots = [{"centre": torch.full((2,), value)} for value in (0.0, 0.5)]
    found = dynamics(proxy, snapshots, rows, (np.arange(n) + 0.5) / n, ranges=4)
    assert found.loss.shape == (2, 4) and (np.diff(found.loss[0]) > 0).all()
    assert np.isnan(found.gradient_change[0]).all()
    # d/dc of a mean of (x - c)^2 moves by 2 per unit of c, in both numbers.
    np.testing.assert_allclose(found.gradient_change[1], np.sqrt(2), rtol=1e-5)
    with pytest.raises(ValueError, match="range 3 of 4 holds no row"):
        dynamics(proxy, snapshots, rows, np.linspace(0, 0.7, n), ranges=4)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="batch_size must be at least 2"):
        RaterSpec(batch_size=1)
    with pytest.raises(ValueError, match="proxy kind 'masked' and function 'a:b' do not fit"):
        ProxySpec(kind="masked", function="a:b")
    with pytest.raises(ValueError, match=r"proxy\.function 'nowhere:f' is no package\.module:name"):
        a_run(proxy=ProxySpec(kind="function", function="nowhere:f"))
    with pytest.raises(ValueError, match="rows of 4 numbers are not 3 equal tokens"):
        a_run(proxy=ProxySpec(num_tokens=3))
    rater = Rater(torch.zeros(2, 4), width=4, hidden=4)
    assert RaterTrainer(RaterSpec(), rater=rater, proxy=Square(4), num_steps=1, steps_per_epoch=1).warmup_steps == 0
