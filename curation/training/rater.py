"""Teaching a rater by validation loss: proxy and rater in turn, two optimisers, no second derivative.

Alchemist, 2025 (arXiv:2512.16905), Eqs. 4 to 9, which is the penalty form of a bilevel problem (Shen and Chen 2023). A
step takes G groups of B train rows and as many validation rows; the softmax of the weights runs over a group, as it
runs over a device's batch in the authors' code, and gradients are means over groups. Ranks share the groups, so a step
is the same on any number of them that divides G.

    clean   g * validation + (1 - g) * sum w_i loss_i for the proxy; g begins at 1 and falls by `share_decay` an epoch.
            The rater takes sum w_i loss_i with the losses held fixed (Eq. 9), or loss_i - reference_i (Eq. 6)
    paper   validation + sum w_i loss_i for the proxy (Eq. 5), Eq. 6 for the rater, the reference warmed up before
    code    as clean, but means in place of sums, as the authors' code has it
    align   clean, but a row's loss gives way to -<gradient of the validation loss, gradient of the row's>, in units of
            the batch's deviation: Ren et al. 2018 (arXiv:1803.09050), by one forward-mode pass. The literal reading of
            "rate by how much validation improves"; the paper's rater sees losses only

With positive losses (Eq. 9) and weights that carry a factor of the whole batch (paper, with its group head), that
factor falls to 0 and the rater with it: `Collapsed` stops the run and says so. Under Eq. 6 costs have either sign, and
it need not.

B rows of a group, G groups of a step.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from curation.models.proxies import checked_losses
from curation.models.rater import Rater, Weights
from curation.numerics.gradients import projection
from curation.training.collectives import sum_over_ranks
from curation.training.step import NotFinite

Bilevel = Literal["clean", "paper", "code", "align"]
COLLAPSED_BELOW = 1e-3
WARMUP, WARMUP_FROM, FLAT, LAST = 0.02, 0.005, 0.05, 0.01
"""Learning rate: linear from 0.005 to 1 of its peak over 2% of the steps, flat for 5% of the rest, linear to 0.01."""
TINY = 1e-12


class Collapsed(RuntimeError):
    """The batch's weight has fallen to 0: no row's weight can be told from another's any more."""


@dataclass(frozen=True)
class RaterSpec:
    """How a rater is taught; defaults are the authors' code's, but for the learning rate and `mode`."""

    mode: Bilevel = "clean"
    use_reference: bool | None = None
    """Eq. 6 in place of Eq. 9; None: in mode paper."""
    batch_size: int = 32
    """B."""
    groups: int = 2
    """G; the paper's 64 rows are 2 groups of 32."""
    epochs: int = 10
    steps_per_epoch: int | None = None
    """None: one pass over the validation rows."""
    warmup_steps: int | None = None
    """Of the reference, on train rows alone; None: an epoch's."""
    validation_share: float = 1.0
    """g at the start."""
    share_decay: float = 0.03
    """What g loses an epoch."""
    learning_rate: float = 1e-3
    """The authors' 1e-4 is of models a thousand times as large."""
    rater_learning_rate: float | None = None
    """None: the proxy's."""
    entropy: float = 0.0
    """What the weights' entropy takes off the rater's cost; the authors' code has it, at 0.01, and leaves it out. Above
    0 the best logits are -loss / entropy; at 0 they grow until one row of a batch has all the weight."""
    weight_decay: float = 0.05
    clip: float = 2.0

    def __post_init__(self) -> None:
        for name in ("batch_size", "groups", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch_size < 2:
            raise ValueError("batch_size must be at least 2: a softmax over one row is 1")

    @property
    def has_reference(self) -> bool:
        """True if a second proxy is trained on train rows alone."""
        return self.mode == "paper" if self.use_reference is None else self.use_reference


class Rows(NamedTuple):
    """n rows: what the rater sees (n, F), what the proxy takes (n, ...), and its condition (n, C) if it has one."""

    seen: Tensor
    prepared: Tensor
    condition: Tensor | None = None

    def at(self, places: np.ndarray | Tensor) -> Rows:
        """The rows at `places` (k,)."""
        index = torch.as_tensor(places)
        return Rows(*(None if part is None else part[index] for part in self))  # pyright: ignore[reportArgumentType]

    def __len__(self) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        return len(self.seen)

    def to(self, device: str) -> Rows:
        """The rows on a device."""
        return Rows(*(None if part is None else part.to(device) for part in self))  # pyright: ignore[reportArgumentType]


class StepFacts(NamedTuple):
    """Of one step, over all groups: mean losses, g, how many rows share the weight (1 to B), the batch's weight."""

    validation_loss: float
    train_loss: float
    share: float
    effective_rows: float
    batch_weight: float


class RaterTrainer:
    """Proxy, rater, reference, their optimisers, and the steps done."""

    def __init__(self, spec: RaterSpec, *, rater: Rater, proxy: nn.Module, num_steps: int, steps_per_epoch: int):
        self.spec, self.rater, self.proxy, self.step = spec, rater, proxy, 0
        self._num_steps, self._steps_per_epoch = num_steps, steps_per_epoch
        self._proxy_step = _optimiser(proxy, spec, peak=spec.learning_rate)
        self._rater_step = _optimiser(rater, spec, peak=spec.rater_learning_rate or spec.learning_rate)
        self.reference = copy.deepcopy(proxy) if spec.has_reference else None
        self._reference_step = None
        if self.reference is not None:
            self._reference_step = _optimiser(self.reference, spec, peak=spec.learning_rate)
        self.warmed_up = 0

    @property
    def warmup_steps(self) -> int:
        """Steps that the reference takes before all others."""
        if self.reference is None:
            return 0
        return self._steps_per_epoch if self.spec.warmup_steps is None else self.spec.warmup_steps

    def share(self) -> float:
        """g of the coming step: the validation loss's share of the proxy's."""
        if self.spec.mode == "paper":
            return 0.5
        return max(0.0, self.spec.validation_share - self.spec.share_decay * (self.step // self._steps_per_epoch))

    def warm_up(self, groups: Sequence[Rows]) -> float:
        """One step of the reference on train rows (Eq. 4); with the last, the proxy becomes its copy. The mean loss."""
        assert self.reference is not None and self._reference_step is not None
        total = 0.0
        for train in groups:
            loss = losses(self.reference, train).mean() / self.spec.groups
            loss.backward()
            total += loss.item()
        self._take(self._reference_step, self.reference, progress=0.5)
        self.warmed_up += 1
        if self.warmed_up == self.warmup_steps:
            self.proxy.load_state_dict(self.reference.state_dict())
        return total

    def train_step(self, groups: Sequence[tuple[Rows, Rows]]) -> StepFacts:
        """One step on this rank's groups of (train, validation) rows. Collapsed, NotFinite: nothing has changed."""
        share, facts = self.share(), []
        for train, validation in groups:
            facts.append(self._differentiated(train, validation, share=share))
        told = torch.tensor(facts, dtype=torch.float64).sum(dim=0) / self.spec.groups
        found = StepFacts(*sum_over_ranks(told).tolist())
        self._check(found)
        progress = self.step / self._num_steps
        self._take(self._proxy_step, self.proxy, progress=progress)
        self._take(self._rater_step, self.rater, progress=progress)
        if self.reference is not None and self._reference_step is not None:
            self._take(self._reference_step, self.reference, progress=progress)
        self.step += 1
        return found

    def _differentiated(self, train: Rows, validation: Rows, *, share: float) -> StepFacts:
        """Adds one group's gradients to all that is trained."""
        mode, groups = self.spec.mode, self.spec.groups
        weighed: Weights = self.rater(train.seen)
        fixed = weighed.weights.detach()
        validation_loss = losses(self.proxy, validation).mean()
        train_losses = losses(self.proxy, train)
        combine = torch.mean if mode == "code" else torch.sum
        weighted = combine(fixed * train_losses)
        whole = validation_loss + weighted if mode == "paper" else share * validation_loss + (1 - share) * weighted
        (whole / groups).backward()
        cost = train_losses.detach()
        if mode == "align":
            cost = -alignment(self.proxy, train, validation)
            cost = cost / cost.std(unbiased=False).clamp_min(TINY)
        if self.reference is not None:
            of_reference = losses(self.reference, train)
            (combine(fixed * of_reference) / groups).backward()
            cost = cost - of_reference.detach()
        of_rater = combine(weighed.weights * cost)
        if self.spec.entropy:
            of_rater = of_rater + self.spec.entropy * torch.special.xlogy(weighed.weights, weighed.weights).sum()
        (of_rater / groups).backward()
        part = fixed / fixed.sum()
        batch_weight = 1.0 if weighed.batch_weight is None else weighed.batch_weight.item()
        return StepFacts(
            validation_loss.item(), train_losses.mean().item(), share, 1 / part.square().sum().item(), batch_weight
        )

    def _check(self, facts: StepFacts) -> None:
        if not all(map(math.isfinite, facts)):
            raise NotFinite(f"the losses of step {self.step + 1} are not finite: {facts}", rows=[])
        if self.spec.mode == "paper" and facts.batch_weight < COLLAPSED_BELOW:
            raise Collapsed(
                f"the batch's weight fell to {facts.batch_weight:.2g} at step {self.step + 1}. In mode paper it is a "
                "factor of all weights of a batch, and with losses that are positive in sum its gradient always points "
                "down (alchemist.md, Sec. 3): no row can be told from another. Use mode clean, where the group term is "
                "inside the logit, mode code, whose second softmax undoes the factor, or no group head"
            )

    def _take(self, optimiser: torch.optim.Optimizer, network: nn.Module, *, progress: float) -> None:
        for parameter in network.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad = sum_over_ranks(parameter.grad)
        nn.utils.clip_grad_norm_(network.parameters(), self.spec.clip)
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * learning_rate_factor(progress)
        optimiser.step()
        optimiser.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on; `torch.load(weights_only=True)` reads it."""
        state: dict[str, Any] = {
            "step": self.step,
            "warmed_up": self.warmed_up,
            "proxy": self.proxy.state_dict(),
            "rater": self.rater.state_dict(),
            "proxy_step": self._proxy_step.state_dict(),
            "rater_step": self._rater_step.state_dict(),
        }
        if self.reference is not None and self._reference_step is not None:
            state |= {"reference": self.reference.state_dict(), "reference_step": self._reference_step.state_dict()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        self.step, self.warmed_up = state["step"], state["warmed_up"]
        self.proxy.load_state_dict(state["proxy"])
        self.rater.load_state_dict(state["rater"])
        self._proxy_step.load_state_dict(state["proxy_step"])
        self._rater_step.load_state_dict(state["rater_step"])
        if self.reference is not None and self._reference_step is not None:
            self.reference.load_state_dict(state["reference"])
            self._reference_step.load_state_dict(state["reference_step"])


def losses(proxy: nn.Module, rows: Rows) -> Tensor:
    """A proxy's loss of each row, (n,), with gradients."""
    told = proxy(rows.prepared) if rows.condition is None else proxy(rows.prepared, rows.condition)
    return checked_losses(told, len(rows), of="the proxy")


def alignment(proxy: nn.Module, train: Rows, validation: Rows) -> Tensor:
    """<gradient of the mean validation loss, gradient of the row's loss> of each train row, (n,), by one JVP.

    For plain gradient descent, minus the derivative of the validation loss by the row's weight: Ren et al. 2018, Eq.
    12.
    """
    weights = dict(proxy.named_parameters())
    gradients = torch.autograd.grad(losses(proxy, validation).mean(), list(weights.values()), allow_unused=True)
    direction = {
        name: torch.zeros_like(value) if gradient is None else gradient
        for (name, value), gradient in zip(weights.items(), gradients, strict=True)
    }
    arguments = (train.prepared,) if train.condition is None else (train.prepared, train.condition)
    fixed = {name: value.detach() for name, value in weights.items()}
    _, down = projection(lambda moved: functional_call(proxy, moved, arguments), fixed, direction)
    return -down.detach()


def learning_rate_factor(progress: float) -> float:
    """Share of the peak learning rate at `progress` in [0, 1]: the authors' code's schedule."""
    if progress < WARMUP:
        return WARMUP_FROM + (1 - WARMUP_FROM) * progress / WARMUP
    rest = (progress - WARMUP) / (1 - WARMUP)
    return 1.0 if rest < FLAT else LAST + (1 - LAST) * (1 - rest) / (1 - FLAT)


class BatchPlan:
    """Which rows each group of each step takes: seeded permutations, so that a resumed run needs no state of them."""

    def __init__(self, spec: RaterSpec, *, num_train: int, num_validation: int, seed: int):
        """ValueError if there are fewer rows of either kind than a step takes."""
        self._spec, self._seed = spec, seed
        self._train, self._validation = num_train, num_validation
        rows = spec.batch_size * spec.groups
        if min(num_train, num_validation) < rows:
            raise ValueError(
                f"a step takes {rows} rows of each, there are {num_train} train and {num_validation} validation rows"
            )

    @property
    def steps_per_epoch(self) -> int:
        """An epoch is paced by the validation rows unless the recipe says otherwise."""
        rows = self._spec.batch_size * self._spec.groups
        return self._spec.steps_per_epoch or self._validation // rows

    def train(self, step: int, group: int) -> np.ndarray:
        """Places (B,) among the train rows."""
        return self._places(step, group, self._train, kind=0)

    def validation(self, step: int, group: int) -> np.ndarray:
        """Places (B,) among the validation rows."""
        return self._places(step, group, self._validation, kind=1)

    def companions(self, num_batches: int, batch_size: int) -> np.ndarray:
        """Places (M, B) among the train rows of the batches that ratings are averaged over."""
        rng = np.random.default_rng([self._seed, 2])
        return np.stack([rng.choice(self._train, batch_size, replace=False) for _ in range(num_batches)])

    def _places(self, step: int, group: int, num_rows: int, *, kind: int) -> np.ndarray:
        size = self._spec.batch_size
        per_round = num_rows // size
        number = step * self._spec.groups + group
        order = _permutation(num_rows, self._seed, kind, number // per_round)
        first = number % per_round * size
        return order[first : first + size]


@functools.lru_cache(maxsize=4)
def _permutation(num_rows: int, *seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(num_rows)


def own_groups(spec: RaterSpec, *, rank: int, world_size: int) -> Iterator[int]:
    """The groups of a rank. ValueError if the ranks do not divide them."""
    if spec.groups % world_size:
        raise ValueError(f"{world_size} workers must divide the {spec.groups} groups of a step")
    yield from range(rank, spec.groups, world_size)


def _optimiser(network: nn.Module, spec: RaterSpec, *, peak: float) -> torch.optim.AdamW:
    """AdamW that decays matrices only: no bias, embedding or place."""
    embeddings = {id(m.weight) for m in network.modules() if isinstance(m, nn.Embedding)}
    decayed = [p for p in network.parameters() if p.ndim > 1 and id(p) not in embeddings]
    others = [p for p in network.parameters() if p.ndim <= 1 or id(p) in embeddings]
    groups = [{"params": decayed, "weight_decay": spec.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([{**g, "peak": peak} for g in groups if g["params"]], lr=peak, betas=(0.9, 0.95))
