"""The plain loop: it learns, it is seeded, and a fit that was stopped ends where one that was not does."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from itertools import islice

import pytest
import torch

from curation.models.clip import ClipNetwork, build_network, load_tokenizer
from curation.numerics.contrastive import PairLoss, sigmoid_loss, softmax_loss
from curation.training.contrastive import MAX_LOGIT_SCALE, fit_contrastive, make_optimizer, shuffled_batches
from curation.training.step import PairBatch, StepReport


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two busy pools of two threads on two cores wait for each other for most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (240, 240, 240)}


def toy_pairs(n: int) -> PairBatch:
    """Images of one colour, captions that name it."""
    names = list(COLOURS) * (n // 4)
    noise = torch.randint(0, 15, (n, 48, 48, 3), generator=torch.Generator().manual_seed(0))
    pixels = (torch.tensor([COLOURS[name] for name in names])[:, None, None] + noise).to(torch.uint8)
    return PairBatch(pixels, load_tokenizer("nano")(names))


def fit(network: ClipNetwork, *, num_steps: int, objective: PairLoss = sigmoid_loss, seed: int = 0) -> list[StepReport]:
    pairs, seen = toy_pairs(16), []
    fit_contrastive(
        network,
        shuffled_batches(pairs, batch_size=4, seed=seed),
        optimizer=make_optimizer(network),
        num_steps=num_steps,
        objective=objective,
        report=lambda step, report: seen.append(report),
    )
    return seen


@pytest.mark.parametrize("objective", [sigmoid_loss, softmax_loss])
def test_the_loss_goes_down_on_a_toy(objective: PairLoss) -> None:
    seen = fit(build_network("nano", seed=0), num_steps=24, objective=objective)
    assert len(seen) == 24
    start, end = (sum(report.loss for report in part) / 4 for part in (seen[:4], seen[-4:]))
    assert end < 0.7 * start


def test_the_same_seed_gives_the_same_weights_and_another_seed_does_not() -> None:
    networks = [build_network("nano", seed=0) for _ in range(3)]
    for network, seed in zip(networks, (0, 0, 1), strict=True):
        fit(network, num_steps=3, seed=seed)
    one, same, other = (network.state_dict()["clip.visual.proj"] for network in networks)
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_a_resumed_fit_equals_one_that_never_stopped() -> None:
    pairs, steps = toy_pairs(16), 6
    whole, stopped, resumed = (build_network("nano", seed=0) for _ in range(3))

    def run(network: ClipNetwork, optimizer: torch.optim.Optimizer, *, first_step: int, stop: int | None) -> None:
        def halt(step: int, report: StepReport) -> None:
            if step == stop:
                raise KeyboardInterrupt

        batches = shuffled_batches(pairs, batch_size=4, seed=0, first_step=first_step)
        fit_contrastive(
            network, batches, optimizer=optimizer, num_steps=steps, first_step=first_step, warmup=0.3, report=halt
        )

    run(whole, make_optimizer(whole), first_step=0, stop=None)
    optimizer = make_optimizer(stopped)
    with pytest.raises(KeyboardInterrupt):
        run(stopped, optimizer, first_step=0, stop=3)
    resumed.load_state_dict(stopped.state_dict())
    second = make_optimizer(resumed)
    second.load_state_dict(deepcopy(optimizer.state_dict()))
    run(resumed, second, first_step=3, stop=None)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def test_each_round_shows_each_row_once_in_another_order() -> None:
    pixels, tokens = torch.arange(10, dtype=torch.uint8)[:, None], torch.arange(10)[:, None]
    batches = list(islice(shuffled_batches(PairBatch(pixels, tokens), batch_size=5, seed=3), 4))
    assert all(torch.equal(batch.pixels.long(), batch.tokens) for batch in batches)
    rounds = [torch.cat([batch.tokens for batch in batches[i : i + 2]]).flatten().tolist() for i in (0, 2)]
    assert sorted(rounds[0]) == sorted(rounds[1]) == list(range(10)) and rounds[0] != rounds[1]
    later = next(shuffled_batches(PairBatch(pixels, tokens), batch_size=5, seed=3, first_step=3))
    assert torch.equal(later.tokens, batches[3].tokens)


def test_the_last_rows_of_a_round_that_fill_no_batch_are_left_out() -> None:
    tokens = torch.arange(7)[:, None]
    batches = list(islice(shuffled_batches(PairBatch(tokens, tokens), batch_size=3, seed=0), 3))
    assert all(len(batch.tokens) == 3 for batch in batches)
    assert len(set(torch.cat([batch.tokens for batch in batches[:2]]).flatten().tolist())) == 6


def test_the_logit_scale_stays_at_its_limit() -> None:
    network = build_network("nano", seed=0)
    with torch.no_grad():
        network.log_scale.fill_(9.0)
    fit(network, num_steps=1)
    assert network.log_scale.exp().item() <= MAX_LOGIT_SCALE * 1.0001


def test_gains_biases_and_scale_do_not_decay() -> None:
    network = build_network("nano", seed=0)
    decayed, kept = make_optimizer(network, weight_decay=0.5).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.5, 0.0)
    assert any(parameter is network.log_scale for parameter in kept["params"])
    assert len(decayed["params"]) + len(kept["params"]) == len(list(network.parameters()))


def test_impossible_sizes_are_refused() -> None:
    network, pairs = build_network("nano", seed=0), toy_pairs(4)
    with pytest.raises(ValueError, match=r"batch_size must be in \[1, 4\], got 5"):
        next(shuffled_batches(pairs, batch_size=5, seed=0))
    with pytest.raises(ValueError, match=r"first_step must be in \[0, 2\], got 3"):
        fit_contrastive(network, iter([pairs]), optimizer=make_optimizer(network), num_steps=2, first_step=3)
    with pytest.raises(ValueError, match="batches ended after 1 of 2 steps"):
        fit_contrastive(network, iter([pairs]), optimizer=make_optimizer(network), num_steps=2)
