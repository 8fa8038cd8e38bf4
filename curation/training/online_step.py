"""One step of online selection on one rank: score the super-batch, choose, exchange rows, take the weighted step.

The rows come in as columns on the CPU, whoever read them; what must be remembered goes out as columns. Nothing here
knows of files, clocks beyond a stopwatch, or Ray. All ranks call `OnlineTrainer.step` together.

n = B/W rows of this rank.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from curation.columns import LEDGER_COLUMNS
from curation.selector import Rows, Selector
from curation.training.collectives import hand_over, ranks
from curation.training.learner import LEARNER_COLUMNS, Kept, Learner
from curation.training.online import Chosen, Scope, choose
from curation.training.schedules import warmup_cosine
from curation.training.step import StepReport


@dataclass(frozen=True, kw_only=True)
class OnlineSettings:
    """What does not change from step to step."""

    keep: int
    """Rows that a step trains on, of all ranks."""
    num_steps: int
    seed: int
    scope: Scope = "global"
    quota: bool = False
    learning_rate: float = 1e-3
    warmup: float = 0.05
    cooldown: float = 0.0
    floor: float = 0.0
    max_grad_norm: float = 1.0
    compiled: bool = False


class Outcome(NamedTuple):
    """What a step did."""

    report: StepReport
    chosen: Chosen
    reference_loss: float | None
    """Mean loss of the trained rows under the reference, as a batch of their own; None without a reference."""
    recorded: tuple[Tensor, Tensor]
    """Addresses and the statistic that the ledger keeps of them, of rows of this rank; not finite ones left out."""
    trained: Tensor
    """Addresses of this rank's rows that were trained on, here or elsewhere."""
    seconds: dict[str, float]


class OnlineTrainer:
    """A learner, its optimiser, and the method that chooses what it sees."""

    def __init__(
        self,
        learner: Learner,
        optimizer: Optimizer,
        selector: Selector,
        settings: OnlineSettings,
        *,
        recall: Callable[[Tensor], Rows] | None = None,
    ):
        """`recall` gives the ledger's columns (n,) of addresses, on the CPU.

        ValueError if the selector needs what this learner, without a reference, cannot make, or the ledger and there is
        none.
        """
        self.learner, self.optimizer, self.settings = learner, optimizer, settings
        self.device = next(learner.network.parameters()).device
        self._selector, self._recall = selector, recall
        needs = selector.needs
        if lacking := sorted(needs & learner.lacks):
            raise ValueError(
                f"{type(selector).__name__} compares with a reference or needs embeddings, and {lacking} are not there"
            )
        if needs & LEDGER_COLUMNS and recall is None:
            raise ValueError(f"{type(selector).__name__} needs {sorted(needs & LEDGER_COLUMNS)} of a ledger")
        self.scores_learner = bool(needs & LEARNER_COLUMNS)
        """True if every row of the super-batch costs a forward pass of the learner."""
        self.reuses_forward = False
        """True if the last step trained on the forward pass that it scored with."""
        model: nn.Module = learner.network
        if ranks().world_size > 1:
            model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        self._model: Any = torch.compile(model) if settings.compiled else model

    def step(self, number: int, block: Rows) -> Outcome:
        """Take step `number`, from 0, with this rank's rows: `address`, `ok`, the learner's inputs and stored columns.

        NotFinite if loss or gradient is not finite, before anything has changed.
        """
        settings, watch = self.settings, Stopwatch()
        progress = number / settings.num_steps
        with watch("score"):
            kept = self._keep(block)
            self.reuses_forward = kept is not None
            rows = self._rows(block, kept)
        with watch("select"):
            chosen = choose(
                self._selector,
                rows,
                keep=settings.keep,
                progress=progress,
                seed=settings.seed,
                step=number,
                scope=settings.scope,
                quota=settings.quota,
            )
        with watch("exchange"):
            inputs = [] if kept else self._inputs(block, chosen)
        with watch("step"):
            report = self._train(number, inputs, chosen, kept)
        with watch("score"):
            reference_loss = self.learner.reference_loss(chosen.selected)
        recorded = self._recorded(rows, chosen)
        trained = rows["address"][chosen.is_own_selected].cpu()
        return Outcome(report, chosen, reference_loss, recorded, trained, watch.seconds)

    def _keep(self, block: Rows) -> Kept | None:
        """The forward pass of the whole super-batch, if all of it will be trained on."""
        if len(block["address"]) * ranks().world_size != self.settings.keep or not self.scores_learner:
            return None
        return self.learner.keep(self._model, block, self._selector.needs)

    def _rows(self, block: Rows, kept: Kept | None) -> Rows:
        """The columns that are gathered: what the method needs, and what the log says of the chosen rows."""
        needs = self._selector.needs
        bulky = set(self.learner.inputs) - needs - {"label"}
        rows = {name: value.to(self.device) for name, value in block.items() if name not in bulky}
        rows |= self.learner.rows(block, needs) if kept is None else kept.rows
        if needs & LEDGER_COLUMNS and self._recall is not None:
            rows |= {name: value.to(self.device) for name, value in self._recall(block["address"]).items()}
        return rows

    def _inputs(self, block: Rows, chosen: Chosen) -> list[Tensor]:
        own = chosen.own.cpu()
        columns = [block[name] for name in self.learner.inputs]
        parts = [column[own].to(self.device) for column in columns]
        if chosen.handovers:
            # Only what travels goes to the device beside the own rows: the super-batch's pixels stay where they are.
            leaving = sorted({h.row for h in chosen.handovers if h.source == ranks().rank})
            places = {row: place for place, row in enumerate(leaving)}
            moved = [h._replace(row=places[h.row]) if h.source == ranks().rank else h for h in chosen.handovers]
            received = hand_over([column[leaving].to(self.device) for column in columns], moved)
            parts = [torch.cat(pair) for pair in zip(parts, received, strict=True)]
        return parts

    def _train(self, number: int, inputs: list[Tensor], chosen: Chosen, kept: Kept | None) -> StepReport:
        settings = self.settings
        # The middle of the step: neither the first nor the last one has a learning rate of 0.
        factor = warmup_cosine(
            (number + 0.5) / settings.num_steps,
            warmup=settings.warmup,
            cooldown=settings.cooldown,
            floor=settings.floor,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * factor
        if kept is not None:
            return kept.step(chosen.row_weights, self.optimizer, settings.max_grad_norm)
        return self.learner.step(
            self._model,
            inputs,
            weights=chosen.weights,
            optimizer=self.optimizer,
            max_grad_norm=settings.max_grad_norm,
        )

    def _recorded(self, rows: Rows, chosen: Chosen) -> tuple[Tensor, Tensor]:
        keeps_loss = self._selector.records == "loss" and "learner_loss" in rows
        values = rows["learner_loss"] if keeps_loss else chosen.scores
        usable = torch.isfinite(values) & rows["ok"]
        return rows["address"][usable].cpu(), values[usable].float().cpu()


class Stopwatch:
    """Seconds by name, added up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun
