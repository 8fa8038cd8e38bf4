"""A rater from arrays: the proxy is made, both are taught, and what the article shows of training is kept.

One rank of a run, with or without others. What is drawn comes from seeded permutations, and weights from the seed, so a
run that goes on from a state equals one that never stopped.

n rows, F features, G numbers that the proxy models, C numbers of its condition, R ranges of the rating, E epochs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from curation.models.proxies import Autoregressive, Masked, Standard
from curation.models.rater import Rater, RaterMode
from curation.numerics.neighbors import fit_centroids
from curation.training.collectives import ranks
from curation.training.rater import BatchPlan, RaterSpec, RaterTrainer, Rows, StepFacts, losses, own_groups

EVALUATION_ROWS = 2_048
"""Rows of each split whose loss is told after each epoch, and rows per forward pass there."""
CODEBOOK_ROWS = 8_192
"""Rows whose tokens the codebook is fitted on, at most."""


@dataclass(frozen=True)
class ProxySpec:
    """Which generative model stands in for the paper's."""

    kind: Literal["autoregressive", "masked", "function"] = "autoregressive"
    width: int = 128
    num_tokens: int = 64
    """Autoregressive: equal pieces of a row."""
    num_codes: int = 256
    per_number: bool = False
    """Autoregressive: standardise each number by itself. For features; pixels share one scale."""
    components: int = 64
    """Masked: principal components of each half."""
    function: str = ""
    """package.module:name of a function (rows (n, G), condition width, seed) -> an nn.Module with `prepare` and a loss
    per row, as `models.proxies.Proxy`."""

    def __post_init__(self) -> None:
        if (self.kind == "function") != bool(self.function):
            raise ValueError(f"proxy kind {self.kind!r} and function {self.function!r} do not fit")


@dataclass(frozen=True)
class RaterShape:
    """The rater's network."""

    group: bool = True
    temperature: float = 1.0
    width: int = 128
    hidden: int = 64
    rating_batches: int = 8
    """Batches that a rating is averaged over; alchemist.md asks for 4 or more."""


class Split(NamedTuple):
    """n rows of one split: what the rater sees (n, F), what the proxy models (n, G), its condition (n, C) or None."""

    seen: np.ndarray
    modelled: np.ndarray
    condition: np.ndarray | None = None


def make_proxy(spec: ProxySpec, split: Split, *, seed: int) -> nn.Module:
    """The proxy, its codebook or components fitted on a split's rows, its weights random by the seed."""
    rows_nG = torch.from_numpy(np.asarray(split.modelled, np.float32))
    condition_width = 0 if split.condition is None else split.condition.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if spec.kind == "function":
            return _by_name(spec.function)(rows_nG, condition_width, seed)
        if spec.kind == "masked":
            return Masked(rows_nG, components=spec.components, width=spec.width, condition_width=condition_width)
        standard = Standard(rows_nG, per_number=spec.per_number)
        if rows_nG.shape[1] % spec.num_tokens:
            raise ValueError(f"rows of {rows_nG.shape[1]} numbers are not {spec.num_tokens} equal tokens")
        pieces = standard(rows_nG[:CODEBOOK_ROWS]).reshape(-1, rows_nG.shape[1] // spec.num_tokens)
        codes_KP = fit_centroids(pieces, num_clusters=spec.num_codes, seed=seed, spherical=False)
        return Autoregressive(
            standard, codes_KP, num_tokens=spec.num_tokens, width=spec.width, condition_width=condition_width
        )


def _by_name(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"proxy.function {name!r} is no package.module:name: {error}") from error


class RaterRun:
    """One rank's part of teaching a rater; usable at once, and after `load_state_dict` from where that was taken."""

    def __init__(
        self,
        spec: RaterSpec,
        shape: RaterShape,
        proxy: ProxySpec,
        *,
        train: Split,
        validation: Split,
        test: Split,
        seed: int,
        device: str = "cpu",
    ):
        """ValueError if a split has too few rows."""
        self.spec, self.shape, self._device = spec, shape, device
        self.plan = BatchPlan(spec, num_train=len(train.seen), num_validation=len(validation.seen), seed=seed)
        self.num_steps = spec.epochs * self.plan.steps_per_epoch
        network = make_proxy(proxy, train, seed=seed).to(device)
        self._splits = {
            name: prepared(network, split, device=device)
            for name, split in (("train", train), ("validation", validation), ("test", test))
        }
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            rater = new_rater(torch.from_numpy(np.asarray(train.seen, np.float32)), shape, mode=rater_mode(spec))
        self.trainer = RaterTrainer(
            spec,
            rater=rater.to(device),
            proxy=network,
            num_steps=self.num_steps,
            steps_per_epoch=self.plan.steps_per_epoch,
        )
        self._groups = list(own_groups(spec, rank=ranks().rank, world_size=ranks().world_size))

    @property
    def is_over(self) -> bool:
        """True if the last step is done."""
        return self.trainer.step == self.num_steps

    @property
    def ends_epoch(self) -> bool:
        """True if the last step that was taken ended an epoch."""
        return self.trainer.step > 0 and self.trainer.step % self.plan.steps_per_epoch == 0

    def step(self) -> StepFacts | None:
        """The coming step; None if it was one of the reference's warm-up."""
        if self.trainer.warmed_up < self.trainer.warmup_steps:
            number = self.trainer.warmed_up
            self.trainer.warm_up([self.rows("train", self.plan.train(number, group)) for group in self._groups])
            return None
        number = self.trainer.warmup_steps + self.trainer.step
        pairs = [
            (
                self.rows("train", self.plan.train(number, group)),
                self.rows("validation", self.plan.validation(self.trainer.step, group)),
            )
            for group in self._groups
        ]
        return self.trainer.train_step(pairs)

    def evaluated(self) -> dict[str, float]:
        """The proxy's mean loss over the first rows of each split."""
        return {
            name: float(row_losses(self.trainer.proxy, rows.at(np.arange(min(len(rows), EVALUATION_ROWS)))).mean())
            for name, rows in self._splits.items()
        }

    def finished_rater(self) -> Rater:
        """The rater, with the batches that its ratings are averaged over."""
        places = self.plan.companions(self.shape.rating_batches, self.spec.batch_size)
        seen = self._splits["train"].seen
        self.trainer.rater.remember_batches(torch.stack([seen[torch.from_numpy(of)] for of in places]))
        return self.trainer.rater

    def rows(self, split: str, places: np.ndarray) -> Rows:
        """Rows of a split, as steps take them."""
        return self._splits[split].at(places)


def rater_mode(spec: RaterSpec) -> RaterMode:
    """How the rater makes weights: `align` differs from `clean` only in what they are taught by."""
    return "clean" if spec.mode == "align" else spec.mode


def new_rater(sample_NF: Tensor, shape: RaterShape, *, mode: RaterMode) -> Rater:
    """A rater with random weights."""
    return Rater(
        sample_NF,
        mode=mode,
        group=shape.group,
        temperature=shape.temperature,
        width=shape.width,
        hidden=shape.hidden,
    )


@torch.no_grad()
def prepared(proxy: nn.Module, split: Split, *, device: str) -> Rows:
    """A split as steps take it, on a device."""
    modelled = torch.from_numpy(np.asarray(split.modelled))
    parts = [proxy.prepare(part.to(device)) for part in modelled.split(EVALUATION_ROWS)]  # pyright: ignore[reportCallIssue]
    condition = None if split.condition is None else torch.from_numpy(np.asarray(split.condition, np.float32))
    seen = torch.from_numpy(np.asarray(split.seen))
    return Rows(seen.to(device), torch.cat(parts), None if condition is None else condition.to(device))


@torch.no_grad()
def row_losses(proxy: nn.Module, rows: Rows) -> np.ndarray:
    """A proxy's loss of each row, (n,) float32."""
    places = torch.arange(len(rows)).split(EVALUATION_ROWS)
    return np.concatenate([losses(proxy, rows.at(some)).float().cpu().numpy() for some in places])


@torch.no_grad()
def ratings_of(rater: Rater, seen: np.ndarray) -> np.ndarray:
    """Ratings (n,) float32."""
    device = rater.mean_F.device
    parts = torch.from_numpy(np.asarray(seen)).split(EVALUATION_ROWS)
    return np.concatenate([rater.rate(part.to(device)).float().cpu().numpy() for part in parts] or [np.zeros(0)])
