"""What a step costs in floating-point operations, counted where it can be and modelled where it cannot.

A forward pass is counted on the real network, an addition and a multiplication being one each. A step is then modelled
as in JEST (arXiv:2406.17711): a training pass costs three forward passes, scoring costs one per row of the super-batch.
Step costs are in units of F b: the learner's forward pass of both towers at full resolution, times the rows that are
trained on. So `uniform_step()` is 3, and a ratio of two costs is the ratio of their FLOPs at equal b.

Costs that no step shows (training the reference, filling its cache, loading the rows that are not kept) are the
caller's to add.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.utils.flop_counter import FlopCounterMode

from curation.models.clip import ClipNetwork

TRAINING_PASS = 3.0
"""Forward passes that a forward and a backward pass cost together."""


class TowerFlops(NamedTuple):
    """FLOPs of one forward pass."""

    image: int  # per image
    text: int  # per caption


def tower_flops(network: ClipNetwork, pixels: Tensor, tokens: Tensor, *, patch_size: int | None = None) -> TowerFlops:
    """FLOPs per image and per caption of a forward pass, for inputs shaped like `pixels` and `tokens`.

    `pixels` uint8 (n, S_h, S_w, 3), `tokens` int64 (m, L), n and m >= 1; `patch_size` as in `embed_images`, its
    resampling left out, which is done once for any number of images. Matrix products, convolutions and attention
    are counted, all else is left out. Nothing is computed: a copy of the network runs without weights. ValueError if n
    or m is 0.
    """
    if not len(pixels) or not len(tokens):
        raise ValueError(f"tower_flops needs a pixel row and a token row, got {len(pixels)} and {len(tokens)}")
    # On the meta device attention is plain matrix products. The counter does not see fused kernels: on a CPU, in eval
    # mode, it misses a third of a ViT-B/32.
    hollow = copy.deepcopy(network).to("meta").eval().requires_grad_(False)
    embed, one = partial(hollow.embed_images, patch_size=patch_size), pixels[:1].to("meta")
    return TowerFlops(
        image=_count(embed, torch.cat([one, one])) - _count(embed, one),
        text=_count(hollow.embed_texts, tokens.to("meta")) // len(tokens),
    )


def forward_flops(network: nn.Module, inputs: Tensor) -> int:
    """FLOPs per row of a network's forward pass, counted as `tower_flops` does. ValueError if there is no row."""
    if not len(inputs):
        raise ValueError("forward_flops needs a row, got none")
    hollow = copy.deepcopy(network).to("meta").eval().requires_grad_(False)
    return _count(hollow, inputs.to("meta")) // len(inputs)


def tangent_flops(network: nn.Module, layer: Iterable[str], inputs: Tensor) -> int:
    """FLOPs per row of a forward pass that carries the tangents of the parameters named in `layer`, counted alike.

    ValueError if there is no row.
    """
    if not len(inputs):
        raise ValueError("tangent_flops needs a row, got none")
    hollow = copy.deepcopy(network).to("meta").eval().requires_grad_(False)
    parameters = dict(hollow.named_parameters())
    own = {name: parameters[name] for name in layer}

    def moved(rows: Tensor) -> Tensor:
        return jvp(lambda at: functional_call(hollow, at, (rows,)), (own,), (own,))[1]

    one = inputs[:1].to("meta")
    return _count(moved, torch.cat([one, one])) - _count(moved, one)


def _count(forward: Callable[[Tensor], Tensor], inputs: Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward(inputs)
    return counter.get_total_flops()


def uniform_step() -> float:
    """Cost of a training step on rows taken as they come, in F b."""
    return TRAINING_PASS


def jest_step(filter_ratio: float, *, reference_cost: float = 0.0, reuse_forward: bool = False) -> float:
    """Cost of a step that scores B = b / (1 - filter_ratio) rows and trains on b, in F b.

    `reference_cost`: the reference's forward pass in units of F; 0 where its embeddings are cached. `reuse_forward`:
    the scoring pass of the chosen rows is their training pass's forward, which means to keep the activations of the
    whole super-batch. ValueError if `filter_ratio` is not in [0, 1) or `reference_cost` is negative.
    """
    super_batch = _super_batch(filter_ratio, reference_cost)
    return super_batch * (1 + reference_cost) + TRAINING_PASS - (1.0 if reuse_forward else 0.0)


def flexi_step(
    filter_ratio: float, *, low_cost: float = 0.28, full_share: float = 0.5, reference_cost: float = 0.0
) -> float:
    """Cost of a Flexi-JEST step, in F b: scoring at low resolution, training at both.

    `low_cost`: forward pass at low resolution in units of F. `full_share`: share of the trained rows at full
    resolution. `reference_cost`: the reference's forward pass at its own low resolution in units of F; 0 where cached.
    ValueError if one of them is out of bounds.
    """
    if not 0 < low_cost <= 1:
        raise ValueError(f"low_cost must be in (0, 1], got {low_cost}")
    if not 0 <= full_share <= 1:
        raise ValueError(f"full_share must be in [0, 1], got {full_share}")
    super_batch = _super_batch(filter_ratio, reference_cost)
    return super_batch * (low_cost + reference_cost) + TRAINING_PASS * (full_share + (1 - full_share) * low_cost)


def _super_batch(filter_ratio: float, reference_cost: float) -> float:
    """Rows of the super-batch per row that is trained on."""
    if not 0 <= filter_ratio < 1:
        raise ValueError(f"filter_ratio must be in [0, 1), got {filter_ratio}")
    if not reference_cost >= 0:
        raise ValueError(f"reference_cost must be at least 0, got {reference_cost}")
    return 1 / (1 - filter_ratio)
