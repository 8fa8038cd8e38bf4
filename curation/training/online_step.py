"""One step of online selection on one rank: score the super-batch, choose, exchange rows, take the weighted step.

The rows come in as columns on the CPU, whoever read them; what must be remembered goes out as columns. Nothing here
knows of files, clocks beyond a stopwatch, or Ray. All ranks call `OnlineTrainer.step` together.

n = B/W rows of this rank.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from curation.columns import LEDGER_COLUMNS
from curation.models.clip import ClipNetwork, Precision, Towers
from curation.numerics.contrastive import blocked_pair_losses, load_objective
from curation.selector import Rows, Selector
from curation.training.collectives import hand_over, ranks, sum_over_ranks
from curation.training.contrastive import MAX_LOGIT_SCALE
from curation.training.online import Chosen, Scope, choose
from curation.training.schedules import warmup_cosine
from curation.training.scoring import embed_rows, losses_in_super_batch
from curation.training.step import NotFinite, PairBatch, StepReport, contrastive_step

LEARNER_COLUMNS = frozenset({"image_embedding", "text_embedding", "learner_loss"})
REFERENCE_COLUMNS = frozenset({"reference_image_embedding", "reference_text_embedding"})


@dataclass(frozen=True, kw_only=True)
class OnlineSettings:
    """What does not change from step to step."""

    keep: int
    """Rows that a step trains on, of all ranks."""
    num_steps: int
    seed: int
    objective: str = "sigmoid"
    scope: Scope = "global"
    quota: bool = False
    score_batch: int = 1024
    micro_batches: int = 1
    learning_rate: float = 1e-3
    warmup: float = 0.05
    cooldown: float = 0.0
    floor: float = 0.0
    max_grad_norm: float = 1.0
    precision: Precision = "float32"
    compiled: bool = False


class Reference(NamedTuple):
    """The fixed model: its scale and bias, and the towers that embed online, or None where columns have it done."""

    logit_scale: float
    logit_bias: float
    towers: Towers | None


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
        network: ClipNetwork,
        optimizer: Optimizer,
        selector: Selector,
        settings: OnlineSettings,
        *,
        reference: Reference | None = None,
        recall: Callable[[Tensor], Rows] | None = None,
    ):
        """`network` is on its device. `recall` gives the ledger's columns (n,) of addresses, on the CPU.

        ValueError if the selector needs a reference or the ledger and there is none.
        """
        self.network, self.optimizer, self.settings, self.reference = network, optimizer, settings, reference
        self.device = network.log_scale.device
        self._selector, self._recall = selector, recall
        self._objective = load_objective(settings.objective)
        needs = selector.needs
        if needs & (REFERENCE_COLUMNS | {"reference_logit_scale", "reference_loss"}) and reference is None:
            raise ValueError(f"{type(selector).__name__} compares with a reference, and none is given")
        if needs & LEDGER_COLUMNS and recall is None:
            raise ValueError(f"{type(selector).__name__} needs {sorted(needs & LEDGER_COLUMNS)} of a ledger")
        self.scores_learner = bool(needs & LEARNER_COLUMNS)
        """True if every row of the super-batch costs a forward pass of the learner."""
        model: nn.Module = network
        if ranks().world_size > 1:
            model = DistributedDataParallel(network, gradient_as_bucket_view=True)
        self._model: Any = torch.compile(model) if settings.compiled else model

    def step(self, number: int, block: Rows) -> Outcome:
        """Take step `number`, from 0, with this rank's rows: `pixels`, `tokens`, `address`, `ok` and stored columns.

        NotFinite if loss or gradient is not finite, before anything has changed.
        """
        settings, watch = self.settings, Stopwatch()
        progress = number / settings.num_steps
        with watch("score"):
            rows = self._rows(block)
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
            batch = self._batch(block, chosen)
        with watch("step"):
            report = self._train(number, batch, chosen.weights)
        with watch("score"):
            reference_loss = self._reference_loss(chosen)
        recorded = self._recorded(rows, chosen, report)
        trained = rows["address"][chosen.is_own_selected].cpu()
        return Outcome(report, chosen, reference_loss, recorded, trained, watch.seconds)

    def _rows(self, block: Rows) -> Rows:
        """The columns that are gathered: what the method needs, and what the log says of the chosen rows."""
        needs = self._selector.needs
        stored = {name: block[name] for name in block if name not in ("pixels", "tokens")}
        rows = {name: value.to(self.device) for name, value in stored.items()}
        if self.scores_learner:
            rows["image_embedding"], rows["text_embedding"] = embed_rows(
                self.network,
                block["pixels"],
                block["tokens"],
                batch_size=self.settings.score_batch,
                autocast=self._autocast(),
            )
            _check_finite(torch.cat([rows["image_embedding"], rows["text_embedding"]], dim=1))
            scale, bias = self.network.scale_and_bias()
            rows["logit_scale"], rows["logit_bias"] = scale.detach(), bias.detach()
        if self.reference is not None:
            rows |= self._reference_rows(block)
        for prefix in ("learner", "reference"):
            if f"{prefix}_loss" in needs:
                rows[f"{prefix}_loss"] = self._losses(rows, "" if prefix == "learner" else "reference_")
        if needs & LEDGER_COLUMNS and self._recall is not None:
            rows |= {name: value.to(self.device) for name, value in self._recall(block["address"]).items()}
        unneeded = LEARNER_COLUMNS - needs
        return {name: value for name, value in rows.items() if name not in unneeded}

    def _reference_rows(self, block: Rows) -> Rows:
        assert self.reference is not None
        scale, bias, towers = self.reference
        rows: Rows = {
            "reference_logit_scale": torch.tensor(scale, device=self.device),
            "reference_logit_bias": torch.tensor(bias, device=self.device),
        }
        if towers is not None:
            at_a_time = self.settings.score_batch
            for name, embed, inputs in (
                ("reference_image_embedding", towers.embed_images, block["pixels"]),
                ("reference_text_embedding", towers.embed_texts, block["tokens"]),
            ):
                rows[name] = torch.cat([embed(part) for part in inputs.split(at_a_time)]).to(self.device)
        return rows

    def _losses(self, rows: Rows, prefix: str) -> Tensor:
        return losses_in_super_batch(
            rows[f"{prefix}image_embedding"],
            rows[f"{prefix}text_embedding"],
            logit_scale=rows[f"{prefix}logit_scale"],
            logit_bias=rows[f"{prefix}logit_bias"],
            objective=self.settings.objective,
        )

    def _batch(self, block: Rows, chosen: Chosen) -> PairBatch:
        own = chosen.own.cpu()
        columns = [block["pixels"], block["tokens"]]
        parts = [column[own].to(self.device) for column in columns]
        if chosen.handovers:
            # Only what travels goes to the device beside the own rows: the super-batch's pixels stay where they are.
            leaving = sorted({h.row for h in chosen.handovers if h.source == ranks().rank})
            places = {row: place for place, row in enumerate(leaving)}
            moved = [h._replace(row=places[h.row]) if h.source == ranks().rank else h for h in chosen.handovers]
            received = hand_over([column[leaving].to(self.device) for column in columns], moved)
            parts = [torch.cat(pair) for pair in zip(parts, received, strict=True)]
        return PairBatch(*parts)

    def _train(self, number: int, batch: PairBatch, weights: Tensor) -> StepReport:
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
        report = contrastive_step(
            self._model,
            batch,
            weights=weights,
            optimizer=self.optimizer,
            objective=self._objective,
            max_grad_norm=settings.max_grad_norm,
            micro_batches=settings.micro_batches,
            autocast=self._autocast(),
        )
        with torch.no_grad():
            self.network.log_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))
        return report

    def _reference_loss(self, chosen: Chosen) -> float | None:
        rows = chosen.selected
        if not rows.keys() >= REFERENCE_COLUMNS or self.reference is None:
            return None
        losses = blocked_pair_losses(
            rows["reference_image_embedding"],
            rows["reference_text_embedding"],
            logit_scale=rows["reference_logit_scale"],
            logit_bias=rows["reference_logit_bias"],
            objective=self.settings.objective,
        )
        return losses.mean().item()

    def _recorded(self, rows: Rows, chosen: Chosen, report: StepReport) -> tuple[Tensor, Tensor]:
        keeps_loss = self._selector.records == "loss" and "learner_loss" in rows
        values = rows["learner_loss"] if keeps_loss else chosen.scores
        usable = torch.isfinite(values) & rows["ok"]
        return rows["address"][usable].cpu(), values[usable].float().cpu()

    def _autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.settings.precision == "bfloat16")


def _check_finite(embeddings_nD: Tensor) -> None:
    """NotFinite on every rank if the learner's embedding of any row is not finite: the run has diverged. Collective."""
    bad = ~torch.isfinite(embeddings_nD).all(dim=1)
    if num_bad := int(sum_over_ranks(bad.sum())):
        rows = bad.nonzero().flatten().tolist()
        raise NotFinite(
            f"the learner's embeddings are not finite in rows {rows[:10]} of rank {ranks().rank}, "
            f"and in {num_bad} of all ranks",
            rows=rows,
        )


class Stopwatch:
    """Seconds by name, added up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun
