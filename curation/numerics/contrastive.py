"""Pair losses of image–text training, one value per row, so that weights can multiply them.

Both see the logits of all N x N pairs of a batch, logit = logit_scale * cosine + logit_bias, and share them out to rows
so that a row's loss holds its image's part and its caption's part alike; the mean over rows is the published loss. A
row of weight 0 therefore pulls its own pair no more, but stays a negative for the others.

N rows, D embedding. Image embedding i and text embedding i are a pair; both of unit norm.
"""

from __future__ import annotations

import difflib
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class PairLoss(Protocol):
    """An objective: embeddings (N, D), scalar scale (exponentiated) and bias -> losses (N,)."""

    def __call__(self, image_ND: Tensor, text_ND: Tensor, *, logit_scale: Tensor, logit_bias: Tensor) -> Tensor: ...


def cosine(image_ND: Tensor, text_ND: Tensor) -> Tensor:
    """Cosine of each row's pair (N,) float32 in [-1, 1]: the clip score. Embeddings of any dtype, of unit norm."""
    _check_pairs(image_ND, text_ND)
    return (image_ND.float() * text_ND.float()).sum(dim=1).clamp(-1.0, 1.0)


def pair_logits(image_ND: Tensor, text_ND: Tensor, *, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """Logits (N, N): row = image, column = text."""
    _check_pairs(image_ND, text_ND)
    return logit_scale * (image_ND @ text_ND.T) + logit_bias


def sigmoid_loss(image_ND: Tensor, text_ND: Tensor, *, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """Each pair of the N x N is a yes-or-no question. SigLIP, Zhai et al. 2023 (arXiv:2303.15343), Eq. 1.

    loss_i = softplus(-logit_ii) + 1/2 sum_{j != i} (softplus(logit_ij) + softplus(logit_ji)), (N,).
    """
    logits_NN = pair_logits(image_ND, text_ND, logit_scale=logit_scale, logit_bias=logit_bias)
    own_NN = torch.eye(len(logits_NN), dtype=torch.bool, device=logits_NN.device)
    losses_NN = F.softplus(torch.where(own_NN, -logits_NN, logits_NN))
    return (losses_NN.sum(dim=0) + losses_NN.sum(dim=1)) / 2


def softmax_loss(image_ND: Tensor, text_ND: Tensor, *, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """Each image picks its text among N, and each text its image. CLIP, Radford et al. 2021 (arXiv:2103.00020), Fig. 3.

    loss_i = 1/2 (cross entropy of image i over texts + cross entropy of text i over images), (N,). The bias cancels.
    """
    logits_NN = pair_logits(image_ND, text_ND, logit_scale=logit_scale, logit_bias=logit_bias)
    return (logits_NN.logsumexp(dim=0) + logits_NN.logsumexp(dim=1)) / 2 - logits_NN.diagonal()


def pick_accuracy(image_ND: Tensor, text_ND: Tensor) -> Tensor:
    """Share of images whose own text has the highest cosine of the batch: a scalar; a tie counts for the first text."""
    _check_pairs(image_ND, text_ND)
    own = torch.arange(len(image_ND), device=image_ND.device)
    return ((image_ND @ text_ND.T).argmax(dim=1) == own).float().mean()


OBJECTIVES: dict[str, PairLoss] = {"sigmoid": sigmoid_loss, "softmax": softmax_loss}


def load_objective(name: str) -> PairLoss:
    """The pair loss of that name. ValueError, with the nearest known name, for an unknown one."""
    if name not in OBJECTIVES:
        near = difflib.get_close_matches(name, OBJECTIVES, n=1, cutoff=0.0)
        raise ValueError(f"objective must be one of {sorted(OBJECTIVES)}, got {name!r}; did you mean {near[0]!r}?")
    return OBJECTIVES[name]


def _check_pairs(image_ND: Tensor, text_ND: Tensor) -> None:
    if image_ND.ndim != 2 or image_ND.shape != text_ND.shape:
        raise ValueError(
            f"image and text embeddings must be (N, D) alike, got {tuple(image_ND.shape)} and {tuple(text_ND.shape)}"
        )
