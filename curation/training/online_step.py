"""One step of online selection on one rank: score the super-batch, choose, exchange rows, take the weighted step.

The rows come in as columns on the CPU, whoever read them; what must be remembered goes out as columns. Nothing here
knows of files, clocks beyond a stopwatch, or Ray. All ranks call `OnlineTrainer.step` together; where another process
has chosen already, they call `train_on` with what it serves.

n = B/W rows of this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from curation.selector import Rows, Selector
from curation.training.collectives import ranks
from curation.training.learner import Learner
from curation.training.picking import InFull, Picked, Picker, PickSettings, Stopwatch, SubBatch
from curation.training.schedules import RateSchedule, rate_factor
from curation.training.step import StepReport


@dataclass(frozen=True, kw_only=True)
class OnlineSettings(PickSettings):
    """What does not change from step to step."""

    num_steps: int
    learning_rate: float = 1e-3
    schedule: RateSchedule = "cosine"
    warmup: float = 0.05
    cooldown: float = 0.0
    floor: float = 0.0
    max_grad_norm: float = 1.0
    compiled: bool = False


class Outcome(NamedTuple):
    """What a step did."""

    report: StepReport
    picked: Picked
    seconds: dict[str, float]

    @property
    def reused_forward(self) -> bool:
        """True if the step trained on the forward pass that it scored with."""
        return self.picked.kept is not None


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
        compare: Callable[[int], Rows] | None = None,
    ):
        """`recall`, `compare` and ValueError as in `Picker`."""
        self.picker = Picker(learner, selector, settings, recall=recall, compare=compare)
        self.learner, self.optimizer, self.settings = learner, optimizer, settings
        self.device = self.picker.device
        model: nn.Module = learner.network
        if ranks().world_size > 1:
            model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        self.model: Any = torch.compile(model) if settings.compiled else model
        """The learner's network, spread over the ranks and compiled as it may be."""

    def step(self, number: int, block: Rows, in_full: InFull | None = None) -> Outcome:
        """Take step `number`, from 0, with this rank's rows: `address`, `ok`, the learner's inputs and stored columns.

        NotFinite if loss or gradient is not finite, before anything has changed.
        """
        watch, progress = Stopwatch(), number / self.settings.num_steps
        picked, sub_batch = self.picker.choose(
            number, block, progress=progress, model=self.model, in_full=in_full, watch=watch
        )
        return self.train_on(number, sub_batch, picked, watch=watch)

    def train_on(
        self, number: int, sub_batch: SubBatch | None, picked: Picked, *, watch: Stopwatch | None = None
    ) -> Outcome:
        """Train on what was chosen; without a sub-batch on the forward pass that was kept. Collective."""
        settings, watch = self.settings, watch or Stopwatch()
        # The middle of the step: neither the first nor the last one has a learning rate of 0.
        factor = rate_factor(
            settings.schedule,
            (number + 0.5) / settings.num_steps,
            warmup=settings.warmup,
            cooldown=settings.cooldown,
            floor=settings.floor,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * factor
        with watch("step"):
            report = self._train(sub_batch, picked)
        return Outcome(report, picked, watch.seconds)

    def _train(self, sub_batch: SubBatch | None, picked: Picked) -> StepReport:
        if sub_batch is None:
            assert picked.kept is not None
            return picked.kept.step(picked.chosen.row_weights, self.optimizer, self.settings.max_grad_norm)
        return self.learner.step(
            self.model,
            sub_batch.inputs,
            weights=sub_batch.weights,
            optimizer=self.optimizer,
            max_grad_norm=self.settings.max_grad_norm,
        )
