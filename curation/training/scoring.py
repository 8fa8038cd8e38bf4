"""What a method may need to know of a super-batch's rows before it selects: embeddings and losses, made here.

n rows of this rank, M of all ranks, D embedding.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from curation.models.clip import ClipNetwork
from curation.numerics.contrastive import Batch, blocked_pair_losses
from curation.training.collectives import gather, ranks


def embed_rows(
    network: ClipNetwork,
    pixels: Tensor,
    tokens: Tensor,
    *,
    batch_size: int,
    patch_size: int | None = None,
    autocast: contextlib.AbstractContextManager | None = None,
) -> tuple[Tensor, Tensor]:
    """Image and text embeddings (n, D) float32 of unit norm, without gradient, `batch_size` rows at a time.

    `patch_size` as in `ClipNetwork.embed_images`. The network's training mode is left as it is; pixels and tokens may
    lie on another device.
    """
    device = network.log_scale.device
    images, texts = [], []
    with torch.no_grad(), autocast or contextlib.nullcontext():
        for at in range(0, len(pixels), batch_size):
            part = pixels[at : at + batch_size].to(device, non_blocking=True)
            images.append(network.embed_images(part, patch_size=patch_size))
            texts.append(network.embed_texts(tokens[at : at + batch_size].to(device, non_blocking=True)))
    return torch.cat(images), torch.cat(texts)


def losses_in_super_batch(
    image_nD: Tensor, text_nD: Tensor, *, logit_scale: Tensor, logit_bias: Tensor, objective: str
) -> Tensor:
    """Losses (n,) float32 of this rank's rows within the super-batch of all ranks, without gradient. Collective."""
    within = Batch(gather(image_nD), gather(text_nD), ranks().rank * len(image_nD))
    return blocked_pair_losses(
        image_nD, text_nD, logit_scale=logit_scale, logit_bias=logit_bias, objective=objective, within=within
    )
