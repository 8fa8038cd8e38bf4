"""The choice of one step: a super-batch is scored with the learner, a sub-batch of it chosen and brought together.

n = B/W rows of this rank, b/W of them, or of other ranks', trained on here.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from curation.columns import LEDGER_COLUMNS
from curation.selector import Rows, Selector
from curation.training.collectives import Handover, hand_over, ranks
from curation.training.learner import LEARNER_COLUMNS, REFERENCE_COLUMNS, Kept, Learner
from curation.training.online import Chosen, Scope, choose

InFull = Callable[[Tensor], Tensor]
"""From places (k,) among this rank's rows to their images (k, S, S, 3), where the block holds smaller ones."""


@dataclass(frozen=True, kw_only=True)
class PickSettings:
    """What does not change from step to step."""

    keep: int
    """Rows that a step trains on, of all ranks."""
    seed: int
    scope: Scope = "global"
    quota: bool = False
    low_share: float = 0.0
    """Share of them that is trained at low resolution."""


class SubBatch(NamedTuple):
    """What a rank trains on. Rows at low resolution come last."""

    inputs: list[Tensor]
    """The learner's input columns of b/W rows; with low resolution the first holds the rows in full alone, and a column
    with the images of the others comes after all."""
    weights: Tensor
    """(b/W,) float32."""
    addresses: Tensor
    """(b/W,) int64, on the CPU."""


class Picked(NamedTuple):
    """A choice, and what the ledger is to know of it."""

    chosen: Chosen
    kept: Kept | None
    """The forward pass of the whole super-batch, if all of it is trained on."""
    reference_loss: float | None
    """Mean loss of the chosen rows under the reference, as a batch of their own; None without a reference."""
    recorded: tuple[Tensor, Tensor]
    """Addresses and the statistic that the ledger keeps of them, of rows of this rank; not finite ones left out."""
    trained: Tensor
    """Addresses of this rank's rows that are trained on, here or elsewhere."""


class Picker:
    """A learner as the judge of what it is to see next."""

    def __init__(
        self,
        learner: Learner,
        selector: Selector,
        settings: PickSettings,
        *,
        recall: Callable[[Tensor], Rows] | None = None,
        compare: Callable[[int], Rows] | None = None,
    ):
        """`recall` gives the ledger's columns (n,) of addresses, on the CPU; `compare` a step's `comparison_gradient`.

        ValueError if the selector needs what this learner, without a reference, cannot make, or what neither gives.
        """
        needs = selector.needs
        if lacking := sorted(needs & learner.lacks):
            raise ValueError(
                f"{type(selector).__name__} compares with a reference or needs embeddings, and {lacking} are not there"
            )
        if needs & LEDGER_COLUMNS and recall is None:
            raise ValueError(f"{type(selector).__name__} needs {sorted(needs & LEDGER_COLUMNS)} of a ledger")
        if "comparison_gradient" in needs and compare is None:
            raise ValueError(f"{type(selector).__name__} needs the comparison_gradient of a second batch")
        self.learner, self.settings = learner, settings
        self.device = next(learner.network.parameters()).device
        self._selector, self._recall, self._compare = selector, recall, compare
        self.scores_learner = bool(needs & LEARNER_COLUMNS)
        """True if every row of the super-batch costs a forward pass of the learner."""

    def choose(
        self,
        number: int,
        block: Rows,
        *,
        progress: float,
        model: nn.Module | None,
        in_full: InFull | None = None,
        watch: Stopwatch,
    ) -> tuple[Picked, SubBatch | None]:
        """`pick`, and what this rank trains on; that is None if the forward pass was kept. Collective."""
        picked = self.pick(number, block, progress=progress, model=model, watch=watch)
        with watch("exchange"):
            sub_batch = None if picked.kept else self.sub_batch(block, picked.chosen, in_full)
        return picked, sub_batch

    def pick(self, number: int, block: Rows, *, progress: float, model: nn.Module | None, watch: Stopwatch) -> Picked:
        """Choose for step `number`, from 0, from this rank's rows: `address`, `ok`, the learner's inputs and columns.

        `model` is the learner's network, or wraps it; None if nothing will be trained here. Collective.
        """
        settings = self.settings
        with watch("score"):
            kept = None if model is None else self._keep(model, block)
            rows = self._rows(block, kept)
            if "comparison_gradient" in self._selector.needs and self._compare is not None:
                rows |= self._compare(number)
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
                low_share=settings.low_share if self.learner.low_images else 0.0,
            )
        with watch("score"):
            reference_loss = self.learner.reference_loss(chosen.selected)
        trained = rows["address"][chosen.is_own_selected].cpu()
        return Picked(chosen, kept, reference_loss, self._recorded(rows, chosen), trained)

    def sub_batch(self, block: Rows, chosen: Chosen, in_full: InFull | None = None) -> SubBatch:
        """The rows that this rank trains on, from its own block and from other ranks. Collective."""
        images, *others = (*self.learner.inputs, "address")
        low_images = self.learner.low_images
        portions = [(in_full or block[images].__getitem__, chosen.portion(low=False))]
        if low_images is not None:
            portions.append((block[low_images].__getitem__, chosen.portion(low=True)))
        brought = [
            self._bring([column, *(block[name].__getitem__ for name in others)], portion.own, portion.handovers)
            for column, portion in portions
        ]
        *shared, addresses = (torch.cat(parts) for parts in zip(*(columns[1:] for columns in brought), strict=True))
        weights = torch.cat([portion.weights for _, portion in portions])
        return SubBatch([brought[0][0], *shared, *(columns[0] for columns in brought[1:])], weights, addresses.cpu())

    def _bring(self, columns: list[InFull], own: Tensor, handovers: list[Handover]) -> list[Tensor]:
        """Own rows and received ones of each column, on the device."""
        rank, own = ranks().rank, own.cpu()
        parts = [column(own).to(self.device) for column in columns]
        if handovers:
            # Only what travels goes to the device beside the own rows: the super-batch's pixels stay where they are.
            leaving = sorted({h.row for h in handovers if h.source == rank})
            places = {row: place for place, row in enumerate(leaving)}
            moved = [h._replace(row=places[h.row]) if h.source == rank else h for h in handovers]
            sent = [column(torch.tensor(leaving, dtype=torch.int64)).to(self.device) for column in columns]
            parts = [torch.cat(pair) for pair in zip(parts, hand_over(sent, moved), strict=True)]
        return parts

    def _keep(self, model: nn.Module, block: Rows) -> Kept | None:
        if len(block["address"]) * ranks().world_size != self.settings.keep or not self.scores_learner:
            return None
        return self.learner.keep(model, block, self._selector.needs)

    def _rows(self, block: Rows, kept: Kept | None) -> Rows:
        """The columns that are gathered: what the method needs, and what the log says of the chosen rows."""
        needs = self._selector.needs
        bulky = {*self.learner.inputs, self.learner.low_images} - needs - {"label"} - REFERENCE_COLUMNS
        rows = {name: value.to(self.device) for name, value in block.items() if name not in bulky}
        rows |= self.learner.rows(block, needs) if kept is None else kept.rows
        if needs & LEDGER_COLUMNS and self._recall is not None:
            rows |= {name: value.to(self.device) for name, value in self._recall(block["address"]).items()}
        return rows

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
