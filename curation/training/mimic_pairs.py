"""Mimic scores of image–text pairs: how far each pair's own loss falls when a layer moves towards the reference's.

A pair's loss is its share of the contrastive loss, and the negatives are part of it: when the layer moves, they move
too. (The other reading, a pair's gradient through its own activations, sums to the same batch gradient; grad_mimic.md,
section 4.) The towers are passed once with tangents, the ranks gather embeddings and their tangents, and the loss is
differentiated along them; so scores do not depend on how many ranks share the super-batch. A tower that does not hold
the layer is passed without tangents.

n rows of this rank, M of all ranks, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from curation.models.clip import ClipNetwork
from curation.numerics.contrastive import Batch, load_objective
from curation.numerics.gradients import towards
from curation.training.collectives import gather, ranks
from curation.training.flops import forward_flops, tangent_flops
from curation.training.mimic import layer_of

IMAGE_TOWER = "visual."
SCALARS = ("logit_scale", "logit_bias")


class Moved(NamedTuple):
    """A value and its derivative along the direction."""

    value: Tensor
    tangent: Tensor


def pair_mimic_scores(
    network: ClipNetwork,
    reference: ClipNetwork,
    images: Tensor,
    tokens: Tensor,
    *,
    layer: str,
    objective: str,
    batch_size: int,
    block_rows: int = 1024,
) -> Tensor:
    """-d loss_i / d eps along the unit direction to the reference's `layer`, (n,) float32. Collective.

    `layer` is a parameter or module of open_clip's model, empty for all of it. ValueError if there is none, or it has
    another shape in the reference.
    """
    weights = {name: value.detach() for name, value in layer_of(network.clip, layer).items()}
    direction, _ = towards(weights, layer_of(reference.clip, layer))
    sides: list[Moved] = []
    towers = (images, _is_of_images, ClipNetwork.embed_images), (tokens, _is_of_texts, ClipNetwork.embed_texts)
    for rows, is_own, embed in towers:
        own = {name: value for name, value in weights.items() if is_own(name)}
        parts = [_moved(network, embed, part, own, direction) for part in rows.split(batch_size)]
        sides.append(Moved(*(torch.cat(values) for values in zip(*parts, strict=True))))
    scale, bias = network.scale_and_bias()
    # A bias that the model lacks is no parameter, so it does not move.
    turn = direction.get("logit_scale", torch.zeros_like(scale)).reshape(())
    shift = direction.get("logit_bias", torch.zeros_like(bias)).reshape(())
    scalars = Moved(scale.detach(), scale.detach() * turn), Moved(bias.detach(), shift)
    image, text = sides
    return -_loss_derivative(image, text, *scalars, objective=objective, block_rows=block_rows)


def pair_mimic_flops(network: ClipNetwork, images: Tensor, tokens: Tensor, *, layer: str) -> int:
    """FLOPs per pair of the towers' passes in `pair_mimic_scores`, counted as `tower_flops` does."""
    names = list(layer_of(network.clip, layer))
    towers = (images, _is_of_images, ClipNetwork.embed_images), (tokens, _is_of_texts, ClipNetwork.embed_texts)
    total = 0
    for rows, is_own, embed in towers:
        own, side = [f"network.clip.{name}" for name in names if is_own(name)], _Embeds(network, embed)
        total += tangent_flops(side, own, rows) if own else forward_flops(side, rows)
    return total


def _moved(
    network: ClipNetwork,
    embed: Callable[[ClipNetwork, Tensor], Tensor],
    rows: Tensor,
    own: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
) -> Moved:
    """Embeddings (n, D) and their derivatives when the parameters `own` move."""
    rows = rows.to(network.log_scale.device, non_blocking=True)
    if not own:
        with torch.no_grad():
            value = embed(network, rows)
        return Moved(value, torch.zeros_like(value))

    def embeddings(at: dict[str, Tensor]) -> Tensor:
        return functional_call(
            _Embeds(network, embed), {f"network.clip.{name}": value for name, value in at.items()}, rows
        )

    # The fused attention kernels have no forward derivative.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        return Moved(*jvp(embeddings, (dict(own),), ({name: direction[name] for name in own},)))


class _Embeds(torch.nn.Module):
    """One side of a network as a module of its own, for `functional_call` takes modules."""

    def __init__(self, network: ClipNetwork, embed: Callable[[ClipNetwork, Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self._embed = network, embed

    def forward(self, rows: Tensor) -> Tensor:
        return self._embed(self.network, rows)


def _loss_derivative(
    image: Moved, text: Moved, scale: Moved, bias: Moved, *, objective: str, block_rows: int
) -> Tensor:
    """d loss_i / d eps of this rank's n pairs among the M of all ranks, `block_rows` x M logits at a time."""
    loss, first = load_objective(objective), ranks().rank * len(image.value)
    whole = [gather(part.contiguous()) for side in (image, text) for part in side]
    derivatives = []
    for at in range(0, len(image.value), block_rows):
        rows = slice(at, at + block_rows)

        def losses_of(
            own_image: Tensor,
            own_text: Tensor,
            all_images: Tensor,
            all_texts: Tensor,
            scale: Tensor,
            bias: Tensor,
            at: int = at,
        ) -> Tensor:
            within = Batch(all_images, all_texts, first + at)
            return loss(own_image, own_text, logit_scale=scale, logit_bias=bias, within=within)

        values = (image.value[rows], text.value[rows], whole[0], whole[2], scale.value, bias.value)
        tangents = (image.tangent[rows], text.tangent[rows], whole[1], whole[3], scale.tangent, bias.tangent)
        derivatives.append(jvp(losses_of, values, tangents)[1])
    return torch.cat(derivatives).float()


def _is_of_images(name: str) -> bool:
    return name.startswith(IMAGE_TOWER)


def _is_of_texts(name: str) -> bool:
    return not name.startswith(IMAGE_TOWER) and name not in SCALARS
