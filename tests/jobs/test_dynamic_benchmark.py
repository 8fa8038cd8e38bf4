"""The study of dynamic selection at its smallest size, and its networks against torch's own gradients."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from jobs import benchmark
from jobs.benchmarks.dynamic import MORE, RIVALS
from jobs.benchmarks.dynamic_runs import BATCH, LEARNING_RATE, WEIGHT_DECAY, Arm, Pool, Stack, train_stack
from jobs.benchmarks.dynamic_tables import OURS, paired


@pytest.fixture(scope="module")
def pool() -> Pool:
    """640 rows of four classes, a quarter of the labels wrong, and ranks that know nothing."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.arange(640) % 4
    labels = torch.where(torch.arange(640) % 16 < 4, (clean + 1) % 4, clean)
    centres = 2 * torch.randn(4, 8, generator=generator)
    rows = centres[clean] + torch.randn(640, 8, generator=generator)
    ranks = torch.rand(2, 640, generator=generator)
    return Pool(rows, labels, (labels != clean).numpy(), {"factors": (ranks[0], ranks[1])}, rows, clean)


def test_a_stack_steps_as_torch_does() -> None:
    generator = torch.Generator().manual_seed(0)
    stack = Stack(2, 6, 3, seed=1)
    rivals = [[value[0].clone().requires_grad_() for value in stack.parameters] for _ in range(2)]
    optimizers = [torch.optim.AdamW(rival, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY) for rival in rivals]
    for _ in range(5):
        inputs, weights = torch.randn(2, 16, 6, generator=generator), torch.rand(2, 16, generator=generator)
        labels = torch.randint(3, (2, 16), generator=generator)
        losses = stack.step(inputs, labels, weights, rate=LEARNING_RATE)
        for at, (rival, optimizer) in enumerate(zip(rivals, optimizers, strict=True)):
            into, into_bias, out, out_bias = rival
            logits = (inputs[at] @ into + into_bias).relu() @ out + out_bias
            expected = F.cross_entropy(logits, labels[at], reduction="none")
            torch.testing.assert_close(losses[at], expected.detach(), rtol=1e-4, atol=1e-5)
            optimizer.zero_grad()
            (expected * weights[at]).mean().backward()
            optimizer.step()
    for at, rival in enumerate(rivals):
        for ours, theirs in zip(stack.parameters, rival, strict=True):
            torch.testing.assert_close(ours[at], theirs.detach(), rtol=1e-3, atol=1e-4)


def test_all_arms_spend_the_same_sample_gradients_and_train_as_if_alone(pool: Pool) -> None:
    arms = [
        Arm("full"),
        Arm("rs2", "rs2", keep=0.2),
        Arm("dynamic", "dynamic", keep=0.2),
        Arm("infobatch", "infobatch"),
    ]
    together = train_stack(pool, arms, num_steps=20, seed=3)
    for arm, outcome in zip(arms, together, strict=True):
        assert outcome.usage_N.sum() == 20 * BATCH
        [alone] = train_stack(pool, [arm], num_steps=20, seed=3)
        assert np.array_equal(alone.usage_N, outcome.usage_N)
        assert alone.accuracy == pytest.approx(outcome.accuracy, abs=0.01)
    full, rs2, ours, infobatch = together
    assert [len(outcome.log) for outcome in (full, rs2, ours)] == [4, 20, 20]
    assert set(rs2.usage_N.tolist()) == {4} and full.log[0].rows == 640 > infobatch.log[1].rows
    assert all(entry.usage_gap is not None for entry in ours.log)
    assert full.log[0].wrong_share == 0.25


def test_a_method_by_loss_trains_on_wrong_labels_and_one_by_factors_does_not(pool: Pool) -> None:
    arms = [Arm("loss", "epsilon_greedy", {"epsilon": 0.0}, 0.2), Arm("dynamic", "dynamic", keep=0.2)]
    by_loss, by_factors = train_stack(pool, arms, num_steps=40, seed=0)
    assert by_loss.log[-1].wrong_share > 0.38
    assert abs(np.mean([entry.wrong_share for entry in by_factors.log]) - 0.25) < 0.03


def test_differences_are_paired_and_told_in_standard_errors() -> None:
    found = paired([0.5, 0.7, 0.6], [0.4, 0.6, 0.4])
    assert found["mean"] == pytest.approx(0.4 / 3) and found["standard_errors"] == pytest.approx(4.0)
    assert paired([0.5], [0.4])["standard_errors"] is None


@pytest.mark.slow
def test_the_study_measures_every_arm_and_makes_nothing_twice(real_data: Path, tmp_path: Path) -> None:
    arguments = ["dynamic", "--tiny", "--json", str(tmp_path / "figures.json"), "--folder", str(tmp_path)]
    assert benchmark.main(arguments) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["label"] == "our completion of 2603.04981"
    table = figures["tables"]["mobilenet/symmetric/cosine/0.2"]["arms"]
    assert set(table) == {OURS, "infobatch, capped", *(arm.name for arm in (*RIVALS, *MORE))}
    assert all(arm["bound_holds"] for arm in table.values()) and table[OURS]["gap_bound"] is not None
    assert set(figures["noise_robustness"]) >= {"mobilenet/symmetric", "mobilenet/human", "text/symmetric"}
    assert figures["gradient_bias"]["mobilenet/clean"]["falls_with_the_penalty"][0] in (True, False)
    assert (tmp_path / "dynamic" / "usage.png").stat().st_size > 10_000
    begun = {path: path.stat().st_mtime_ns for path in (tmp_path / "dynamic").glob("*.json")}
    assert benchmark.main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "dynamic").glob("*.json")} == begun
