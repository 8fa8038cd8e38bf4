"""From a super-batch that is spread over ranks to the rows each rank trains on.

The selection is global and without quotas: ranks gather columns (never pixels), put the rows in order of their
addresses and run the same seeded selection, so every rank knows the whole result without being told. Rows are then
levelled: each rank trains on b/W of them, keeps as many of its own chosen rows as that, and hands what it has above to
ranks that have fewer. `scope="local"` and `quota=True` are cheaper and worse; they exist to measure by how much.

Where a step has to train on every row and some cannot be decoded, nothing can stand in for those: they keep their
places with weight 0, the weights of the others make up for it, and so the loss is the mean over the others. (Of pairs a
blank image and its caption stay among the negatives.)

B rows of the super-batch, n = B/W of each rank, b rows chosen.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from curation.columns import is_run_value
from curation.selector import Rows, Selector, check_needs, num_rows, take
from curation.training.collectives import Handover, gather, ranks

Scope = Literal["global", "local"]


class Portion(NamedTuple):
    """Some of the rows that a rank trains on, as in `Chosen`."""

    own: Tensor
    handovers: list[Handover]
    weights: Tensor


class Chosen(NamedTuple):
    """What a rank has to do with its rows, and what all ranks know."""

    own: Tensor
    """Which of this rank's n rows it trains on, (k,) int64; the rows it receives come after them."""
    handovers: list[Handover]
    """Rows that change rank, the same list everywhere; `row` is a place among the source's n rows."""
    weights: Tensor
    """(b/W,) float32 of the rows it trains on, the received ones last."""
    scores: Tensor
    """(n,) float32 of this rank's rows, as the method scores them; NaN for a row that could not be used."""
    selected: Rows
    """The gathered columns of the b chosen rows, in order of their addresses; without those that could not be used."""
    is_own_selected: Tensor
    """(n,) bool: which of this rank's rows were chosen, wherever they are trained on. A row that could not be used and
    had to be taken is one of them: its turn has passed."""
    row_weights: Tensor
    """(n,) float32 of this rank's rows, wherever they are trained on; 0 for those not chosen, or not to be used."""
    is_low: Tensor
    """(W n,) bool of all ranks' rows, on the CPU: which of the chosen are trained at low resolution."""

    def portion(self, *, low: bool) -> Portion:
        """What this rank trains on at one of the two resolutions."""
        n, rank = len(self.scores), ranks().rank
        own_is_low = self.is_low[rank * n + self.own.cpu()]
        low_handovers = [bool(self.is_low[h.source * n + h.row]) for h in self.handovers]
        pairs = list(zip(self.handovers, low_handovers, strict=True))
        received = torch.tensor([is_low for h, is_low in pairs if h.target == rank], dtype=torch.bool)
        wanted = (torch.cat([own_is_low, received]) == low).to(self.weights.device)
        handovers = [h for h, is_low in pairs if is_low == low]
        return Portion(self.own[(own_is_low == low).to(self.own.device)], handovers, self.weights[wanted])


def choose(
    selector: Selector,
    rows: Rows,
    *,
    keep: int,
    progress: float,
    seed: int,
    step: int,
    scope: Scope = "global",
    quota: bool = False,
    low_share: float = 0.0,
) -> Chosen:
    """Choose `keep` of all ranks' rows, and at random a share of them for low resolution. Collective.

    `rows` are this rank's n rows: `address`, `ok` (bool: may be chosen) and what the selector needs; all tensors on the
    process group's device. ValueError if `keep` does not divide among the ranks, or fewer rows than that may be chosen,
    unless every row is to be.
    """
    rank, world_size = ranks()
    if keep % world_size:
        raise ValueError(f"{keep} rows cannot be shared among {world_size} ranks alike")
    n, share = num_rows(rows), keep // world_size
    check_needs(selector, rows)
    gathered = {name: value if is_run_value(name) else gather(value) for name, value in rows.items()}
    whole = {**gathered, "place": torch.arange(n * world_size, device=rows["address"].device)}
    parts = [whole] if scope == "global" else [_of_rank(whole, index, n) for index in range(world_size)]
    keeps = [keep] if scope == "global" else [share] * world_size
    scores = torch.full((n * world_size,), torch.nan, device=rows["address"].device)
    chosen, weights = [], []
    for index, (part, part_keep) in enumerate(zip(parts, keeps, strict=True)):
        usable, unusable = part["ok"].nonzero().flatten(), (~part["ok"]).nonzero().flatten()
        takes_all = part_keep == len(part["ok"])
        if len(usable) < (1 if takes_all else part_keep):
            raise ValueError(f"step {step}: {part_keep} rows are to be chosen, {len(usable)} can be")
        num_empty = len(unusable) if takes_all else 0
        in_order = usable[part["address"][usable].argsort(stable=True)]
        candidates = take(part, in_order)
        places = candidates.pop("place")
        generator = torch.Generator().manual_seed(_mixed(seed, step, index))
        scores[places] = selector.score(candidates, progress).float()
        selection = selector.select(candidates, part_keep - num_empty, progress, generator)
        own_weights = selection.weights.to(places.device) * (part_keep / (part_keep - num_empty))
        chosen += [places[selection.indices], part["place"][unusable[:num_empty]]]
        weights += [own_weights, torch.zeros(num_empty, device=places.device)]
    places, weight = torch.cat(chosen), torch.cat(weights)
    if quota:
        places, weight = _with_quota(places, weight, scores, whole["ok"], n=n, share=share)
    # In order of the addresses: what is trained on, and where, follows from what was chosen alone.
    by_address = whole["address"][places].argsort(stable=True)
    places, weight = places[by_address], weight[by_address]
    own, handovers, own_weights = level(places, weight, n=n, world_size=world_size, rank=rank)
    is_selected = torch.zeros(n * world_size, dtype=torch.bool, device=places.device)
    is_selected[places] = True
    row_weights = torch.zeros(n * world_size, device=places.device)
    row_weights[places] = weight
    mine = slice(rank * n, (rank + 1) * n)
    is_low = torch.zeros(n * world_size, dtype=torch.bool)
    generator = torch.Generator().manual_seed(_mixed(seed, step, -1))
    is_low[places.cpu()[torch.randperm(len(places), generator=generator)[: round(low_share * len(places))]]] = True
    selected = take(gathered, places[whole["ok"][places]])
    return Chosen(own, handovers, own_weights, scores[mine], selected, is_selected[mine], row_weights[mine], is_low)


def level(
    places: Tensor, weights: Tensor, *, n: int, world_size: int, rank: int
) -> tuple[Tensor, list[Handover], Tensor]:
    """Share the chosen places (b,), rank * n + row each, out so that every rank has b/W of them.

    A rank keeps the first of its own; the others go, in their order, to the ranks that have too few, lowest rank first.
    Returns this rank's own rows, all handovers, and the weights (b/W,) of what it trains on, received rows last.
    """
    share = len(places) // world_size
    owners = (places // n).tolist()
    kept: list[list[int]] = [[] for _ in range(world_size)]
    surplus: list[int] = []
    for index, owner in enumerate(owners):
        (kept[owner] if len(kept[owner]) < share else surplus).append(index)
    handovers: list[Handover] = []
    received: list[list[int]] = [[] for _ in range(world_size)]
    waiting = iter(surplus)
    for target in range(world_size):
        while len(kept[target]) + len(received[target]) < share:
            index = next(waiting)
            received[target].append(index)
            handovers.append(Handover(owners[index], target, int(places[index]) % n))
    mine = torch.tensor(kept[rank], dtype=torch.int64, device=places.device)
    theirs = torch.tensor(received[rank], dtype=torch.int64, device=places.device)
    return places[mine] % n, handovers, weights[torch.cat([mine, theirs])]


def _with_quota(
    places: Tensor, weights: Tensor, scores: Tensor, ok: Tensor, *, n: int, share: int
) -> tuple[Tensor, Tensor]:
    """As many places of each rank: the first it was given, filled up with its best rows that were not chosen."""
    taken, taken_weights = [], []
    for owner in range(len(scores) // n):
        is_own = places // n == owner
        first, first_weights = places[is_own][:share], weights[is_own][:share]
        candidates = torch.where(ok, scores.nan_to_num(nan=-torch.inf), -torch.inf)[owner * n : (owner + 1) * n].clone()
        candidates[places[is_own] % n] = -torch.inf
        best = candidates.argsort(descending=True, stable=True)[: share - len(first)] + owner * n
        taken += [first, best]
        taken_weights += [first_weights, torch.ones(len(best), device=weights.device)]
    return torch.cat(taken), torch.cat(taken_weights)


def _of_rank(rows: Rows, rank: int, n: int) -> Rows:
    return {name: value if is_run_value(name) else value[rank * n : (rank + 1) * n] for name, value in rows.items()}


def _mixed(seed: int, step: int, part: int) -> int:
    """A generator's seed for one step of one run; odd multipliers keep neighbours apart."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + part * 0x94D049BB133111EB + 1) % 2**63
