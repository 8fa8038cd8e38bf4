"""Small networks on frozen features, each trained on what a method chooses once a round; a stack of them at a time.

The methods are the package's own, and so is the ledger that remembers losses and usage. All networks of a stack take
steps of 128 rows, as many as the budget in sample-gradients says, and the learning rate follows the steps; what differs
is which rows. A network has one hidden layer of 128; AdamW, no label smoothing, no early stopping: the last step.

A networks of the stack, n rows of a batch, N rows of the pool, F features, H hidden, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from curation.addresses import pack
from curation.ledger import Ledger, LedgerSpec, gini
from curation.methods import load_selector
from curation.selector import EvenSelector, Rows
from curation.training.schedules import RateSchedule, rate_factor

BATCH, HIDDEN, LEARNING_RATE, WEIGHT_DECAY = 128, 128, 2e-3, 1e-4
LEDGER = "loss"


class Pool(NamedTuple):
    """What is trained on, and what is measured on."""

    features_NF: Tensor
    labels_N: Tensor
    """As they are given, so perhaps wrong."""
    is_wrong_N: np.ndarray
    factors: dict[str, tuple[Tensor, Tensor]]
    """Ranks of representativeness and rarity (N,), by the piece that holds them."""
    test_features: Tensor
    test_labels: Tensor

    @property
    def num_classes(self) -> int:
        """C."""
        return int(max(self.labels_N.max(), self.test_labels.max())) + 1


@dataclass(frozen=True)
class Arm:
    """A way to choose rounds. `keep` None: every row."""

    name: str
    method: str = "uniform"
    fields: dict[str, Any] = field(default_factory=dict)
    keep: float | None = None


class RoundLog(NamedTuple):
    """What a round chose, and how rows were used after it."""

    rows: int
    wrong_share: float
    smallest_class: int
    usage_min: int
    usage_max: int
    usage_gini: float
    usage_gap: int | None


class ArmRun:
    """One network's choices: it hands out batches, takes in losses, and chooses anew when a round is over."""

    def __init__(self, arm: Arm, pool: Pool, *, num_steps: int, seed: int):
        self._arm, self._pool, self._num_steps, self._seed = arm, pool, num_steps, seed
        self._selector = load_selector(arm.method, **arm.fields)
        needs_variance = "ledger_variance" in self._selector.needs
        spec = LedgerSpec("ema", decay=0.8, variance=True) if needs_variance else LedgerSpec("last")
        self._num_rows = len(pool.labels_N)
        self._ledger = Ledger(np.array([self._num_rows]), {LEDGER: spec})
        self._rng = torch.Generator().manual_seed(7_000 + seed)
        self._order, self._weights = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
        self._losses: list[Tensor] = []
        self._round, self._at, self._first_step = 0, 0, 0
        self.log: list[RoundLog] = []
        self.choose_seconds = 0.0
        """Spent on the ledger and on choosing."""

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The rows (n,) of a step and their weights."""
        if self._at + BATCH > len(self._order):
            begun = time.perf_counter()
            self._remember()
            self._choose(step)
            self.choose_seconds += time.perf_counter() - begun
        here = slice(self._at, self._at + BATCH)
        self._at += BATCH
        return self._order[here], self._weights[here]

    def take_losses(self, losses_n: Tensor) -> None:
        """The last batch's losses before its step, without weights."""
        self._losses.append(losses_n)

    @property
    def usage_N(self) -> np.ndarray:
        """How often each row was trained on; call it after the last step."""
        return self._ledger.export(_addresses(self._num_rows))["usage"].astype(np.int64)

    def _remember(self) -> None:
        if not self._losses:
            return
        trained = pack(0, self._order[: self._at].numpy())
        if self._selector.records == "loss":
            self._ledger.update(LEDGER, trained, torch.cat(self._losses).numpy(), step=self._first_step)
        self._ledger.add_usage(trained)
        self._losses = []

    def close(self) -> None:
        """Note what the unfinished last round used."""
        self._remember()

    def _choose(self, step: int) -> None:
        whole, keep = self._num_rows // BATCH, None
        if self._selector.fixed_size:
            share = 1.0 if self._arm.keep is None else self._arm.keep
            keep = max(1, min(round(share * self._num_rows / BATCH), whole)) * BATCH
        rows = self._rows(step)
        rng = torch.Generator().manual_seed(1_000_003 * self._seed + self._round)
        chosen = self._selector.select(rows, keep, step / self._num_steps, rng)
        shuffled = torch.randperm(len(chosen.indices), generator=self._rng)
        self._order, self._weights = chosen.indices[shuffled], chosen.weights[shuffled]
        if len(self._order) < BATCH:
            raise ValueError(f"{self._arm.name}: a round of {len(self._order)} rows, fewer than a batch")
        self._log(rows)
        self._round, self._at, self._first_step = self._round + 1, 0, step

    def _rows(self, step: int) -> Rows:
        remembered = self._ledger.read(LEDGER, _addresses(self._num_rows))
        places = torch.arange(self._num_rows)
        rows: Rows = {name: torch.from_numpy(column.astype(np.float32)) for name, column in remembered.items()}
        for piece, (representative, rare) in self._pool.factors.items():
            rows |= {f"{piece}.representativeness": representative, f"{piece}.rarity": rare}
        values = {
            "round": torch.tensor(self._round),
            "run_seed": torch.tensor(self._seed),
            "planned_uses": torch.tensor(self._num_steps * BATCH / self._num_rows),
            "mean_usage": torch.tensor(step * BATCH / self._num_rows),
            "last_round_step": torch.tensor(self._first_step),
        }
        return rows | values | {"uid": torch.stack([places, places], dim=1), "label": self._pool.labels_N}

    def _log(self, rows: Rows) -> None:
        usage = rows["usage_count"].numpy().astype(np.int64)
        trained = self._order[: len(self._order) // BATCH * BATCH].numpy()
        usage[trained] += 1
        gap = self._selector.usage_gap(rows) if isinstance(self._selector, EvenSelector) else None
        if gap is not None and usage.max() - usage.min() > gap:
            raise AssertionError(f"{self._arm.name}: usage {usage.min()} to {usage.max()}, promised {gap}")
        counts = np.bincount(usage)
        of_class = np.bincount(self._pool.labels_N[trained].numpy(), minlength=self._pool.num_classes)
        wrong = float(self._pool.is_wrong_N[trained].mean())
        self.log.append(
            RoundLog(
                len(self._order), wrong, int(of_class.min()), int(usage.min()), int(usage.max()), gini(counts), gap
            )
        )


class Outcome(NamedTuple):
    """What became of one network."""

    accuracy: float
    log: list[RoundLog]
    usage_N: np.ndarray
    choose_seconds: float


def train_stack(
    pool: Pool, arms: Sequence[Arm], *, num_steps: int, seed: int, schedule: RateSchedule = "cosine"
) -> list[Outcome]:
    """Train one network for each arm, all from the same beginning, for `num_steps` steps."""
    runs = [ArmRun(arm, pool, num_steps=num_steps, seed=seed) for arm in arms]
    stack = Stack(len(arms), pool.features_NF.shape[1], pool.num_classes, seed=seed)
    for step in range(num_steps):
        batches = [run.batch(step) for run in runs]
        rows_An = torch.stack([rows for rows, _ in batches])
        weights_An = torch.stack([weights for _, weights in batches])
        rate = LEARNING_RATE * rate_factor(schedule, (step + 0.5) / num_steps)
        losses_An = stack.step(pool.features_NF[rows_An], pool.labels_N[rows_An], weights_An, rate=rate)
        for run, losses_n in zip(runs, losses_An, strict=True):
            run.take_losses(losses_n)
    for run in runs:
        run.close()
    right = stack.logits(pool.test_features.expand(len(arms), -1, -1)).argmax(dim=2) == pool.test_labels
    accuracies = right.double().mean(dim=1).tolist()
    return [
        Outcome(accuracy, run.log, run.usage_N, run.choose_seconds)
        for accuracy, run in zip(accuracies, runs, strict=True)
    ]


class Stack:
    """Networks side by side: one matrix product steps them all. The gradient is written out."""

    def __init__(self, size: int, num_features: int, num_classes: int, *, seed: int):
        rng = torch.Generator().manual_seed(seed)
        shapes = [(num_features, HIDDEN), (1, HIDDEN), (HIDDEN, num_classes), (1, num_classes)]
        widths = [num_features, num_features, HIDDEN, HIDDEN]
        begun = [
            (torch.rand(shape, generator=rng) * 2 - 1) / width**0.5 for shape, width in zip(shapes, widths, strict=True)
        ]
        self.parameters = [value.repeat(size, 1, 1) for value in begun]
        self._optimizer = torch.optim.AdamW(self.parameters, weight_decay=WEIGHT_DECAY, fused=True)

    def logits(self, inputs_AnF: Tensor) -> Tensor:
        """(A, n, C)."""
        into, into_bias, out, out_bias = self.parameters
        return torch.baddbmm(out_bias, torch.baddbmm(into_bias, inputs_AnF, into).relu_(), out)

    def step(self, inputs_AnF: Tensor, labels_An: Tensor, weights_An: Tensor, *, rate: float) -> Tensor:
        """One step of each network on mean(weight * cross-entropy); the losses (A, n) before it."""
        into, into_bias, out, out_bias = self.parameters
        hidden_AnH = torch.baddbmm(into_bias, inputs_AnF, into).relu_()
        log_AnC = F.log_softmax(torch.baddbmm(out_bias, hidden_AnH, out), dim=2)
        losses_An = -log_AnC.gather(2, labels_An[:, :, None])[:, :, 0]
        residual_AnC = log_AnC.exp_()
        residual_AnC.scatter_add_(2, labels_An[:, :, None], torch.full_like(losses_An, -1)[:, :, None])
        residual_AnC *= weights_An[:, :, None] / inputs_AnF.shape[1]
        back_AnH = torch.bmm(residual_AnC, out.mT).mul_(hidden_AnH > 0)
        gradients = (
            torch.bmm(inputs_AnF.mT, back_AnH),
            back_AnH.sum(dim=1, keepdim=True),
            torch.bmm(hidden_AnH.mT, residual_AnC),
            residual_AnC.sum(dim=1, keepdim=True),
        )
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.step()
        return losses_An

    def last_layer_gradients(self, inputs_NF: Tensor, labels_N: Tensor) -> Tensor:
        """The first network's gradient of the last layer for each row, (N, H * C + C)."""
        into, into_bias, out, out_bias = (value[0] for value in self.parameters)
        hidden_NH = (inputs_NF @ into + into_bias).relu_()
        residual_NC = (hidden_NH @ out + out_bias).softmax(dim=1) - F.one_hot(labels_N, out.shape[1])
        return torch.cat([torch.einsum("nh,nc->nhc", hidden_NH, residual_NC).flatten(1), residual_NC], dim=1)


def _addresses(num_rows: int) -> np.ndarray:
    return pack(0, np.arange(num_rows))
