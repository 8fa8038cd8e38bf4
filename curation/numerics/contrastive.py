"""Pair losses of image–text training, one value per row, so that weights can multiply them.

Both see the logits of all N x N pairs of a batch, logit = logit_scale * cosine + logit_bias, and share them out to rows
so that a row's loss holds its image's part and its caption's part alike; the mean over rows is the published loss. A
row of weight 0 therefore pulls its own pair no more, but stays a negative for the others.

A loss may be asked for some of the rows only: N rows of M, each against all M. So a worker computes its own part of a
batch that is spread over many, and a long batch is computed in blocks of rows.

N rows, M >= N rows of the whole batch, D embedding. Image embedding i and text embedding i are a pair; both of unit
norm.
"""

from __future__ import annotations

import difflib
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Batch(NamedTuple):
    """The whole batch that N rows are part of: they are its rows [first, first + N)."""

    image_MD: Tensor
    text_MD: Tensor
    first: int


class PairLoss(Protocol):
    """An objective: embeddings (N, D), scalar scale (exponentiated) and bias -> losses (N,).

    Without `within` the N rows are the whole batch.
    """

    def __call__(
        self, image_ND: Tensor, text_ND: Tensor, *, logit_scale: Tensor, logit_bias: Tensor, within: Batch | None = None
    ) -> Tensor: ...


def cosine(image_ND: Tensor, text_ND: Tensor) -> Tensor:
    """Cosine of each row's pair (N,) float32 in [-1, 1]: the clip score. Embeddings of any dtype, of unit norm."""
    _check_pairs(image_ND, text_ND)
    return (image_ND.float() * text_ND.float()).sum(dim=1).clamp(-1.0, 1.0)


def pair_logits(image_ND: Tensor, text_ND: Tensor, *, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """Logits (N, N): row = image, column = text."""
    _check_pairs(image_ND, text_ND)
    return logit_scale * (image_ND @ text_ND.T) + logit_bias


def sigmoid_loss(
    image_ND: Tensor, text_ND: Tensor, *, logit_scale: Tensor, logit_bias: Tensor, within: Batch | None = None
) -> Tensor:
    """Each pair of the M x M is a yes-or-no question. SigLIP, Zhai et al. 2023 (arXiv:2303.15343), Eq. 1.

    loss_i = softplus(-logit_ii) + 1/2 sum_{j != i} (softplus(logit_ij) + softplus(logit_ji)), (N,).
    """
    by_image_NM, by_text_NM, own_N = _logits_of_rows(image_ND, text_ND, logit_scale, logit_bias, within)
    rows_N = torch.arange(len(own_N), device=own_N.device)
    # softplus(-x) = softplus(x) - x: what the own pair has as a negative is turned into what it has as a positive.
    own_logits_N = by_image_NM[rows_N, own_N]
    return (F.softplus(by_image_NM).sum(dim=1) + F.softplus(by_text_NM).sum(dim=1)) / 2 - own_logits_N


def softmax_loss(
    image_ND: Tensor, text_ND: Tensor, *, logit_scale: Tensor, logit_bias: Tensor, within: Batch | None = None
) -> Tensor:
    """Each image picks its text among M, and each text its image. CLIP, Radford et al. 2021 (arXiv:2103.00020), Fig. 3.

    loss_i = 1/2 (cross entropy of image i over texts + cross entropy of text i over images), (N,). The bias cancels.
    """
    by_image_NM, by_text_NM, own_N = _logits_of_rows(image_ND, text_ND, logit_scale, logit_bias, within)
    rows_N = torch.arange(len(own_N), device=own_N.device)
    return (by_image_NM.logsumexp(dim=1) + by_text_NM.logsumexp(dim=1)) / 2 - by_image_NM[rows_N, own_N]


def _logits_of_rows(
    image_ND: Tensor, text_ND: Tensor, logit_scale: Tensor, logit_bias: Tensor, within: Batch | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (N, M) of the rows' images with all texts, of their texts with all images, and the own columns (N,)."""
    _check_pairs(image_ND, text_ND)
    n = len(image_ND)
    image_MD, text_MD, first = within or Batch(image_ND, text_ND, 0)
    _check_pairs(image_MD, text_MD)
    if image_MD.shape[1] != image_ND.shape[1] or not 0 <= first <= len(image_MD) - n:
        raise ValueError(
            f"rows [{first}, {first + n}) of width {image_ND.shape[1]} are not within a batch {tuple(image_MD.shape)}"
        )
    by_image_NM = logit_scale * (image_ND @ text_MD.T) + logit_bias
    by_text_NM = by_image_NM.T if within is None else logit_scale * (text_ND @ image_MD.T) + logit_bias
    return by_image_NM, by_text_NM, torch.arange(first, first + n, device=image_ND.device)


def softmax_distillation(
    image_ND: Tensor,
    text_ND: Tensor,
    *,
    logit_scale: Tensor,
    reference: Batch,
    reference_scale: float,
    within: Batch | None = None,
) -> Tensor:
    """How far the learner's softmax picks are from the reference's, (N,): the mean of both directions.

    Cross entropy of the reference's distribution over the batch with the learner's: the softmax distillation of ACED
    (Udandarao et al. 2024, arXiv:2411.18674). `reference` holds the reference's embeddings of the whole batch, (M, E)
    of any width E, and where the N rows are in it.
    """
    zero = torch.zeros((), device=image_ND.device)
    by_image_NM, by_text_NM, own_N = _logits_of_rows(image_ND, text_ND, logit_scale, zero, within)
    teacher = [side[own_N].float() for side in reference[:2]]
    loss_N = torch.zeros(len(own_N), device=image_ND.device)
    for logits_NM, rows_NE, others_ME in (
        (by_image_NM, teacher[0], reference.text_MD),
        (by_text_NM, teacher[1], reference.image_MD),
    ):
        target_NM = (reference_scale * (rows_NE @ others_ME.float().T)).softmax(dim=1)
        loss_N = loss_N - (target_NM * logits_NM.log_softmax(dim=1)).sum(dim=1) / 2
    return loss_N


@torch.no_grad()
def blocked_pair_losses(
    image_ND: Tensor,
    text_ND: Tensor,
    *,
    logit_scale: Tensor,
    logit_bias: Tensor,
    objective: str,
    within: Batch | None = None,
    block_rows: int = 1024,
) -> Tensor:
    """The objective's losses of N pairs, (N,) float32, without gradients and without an N x M matrix.

    Embeddings of any float dtype. Memory is that of a few blocks of block_rows x M float32, 84 MB each at M = 20,480.
    ValueError for an unknown `objective` or less than one row per block.
    """
    loss = load_objective(objective)
    if block_rows < 1:
        raise ValueError(f"block_rows must be at least 1, got {block_rows}")
    whole = within or Batch(image_ND, text_ND, first=0)
    whole = Batch(whole.image_MD.float(), whole.text_MD.float(), whole.first)
    _check_pairs(image_ND, text_ND)
    losses = torch.zeros(len(image_ND), device=image_ND.device)
    for first in range(0, len(losses), block_rows):
        rows = slice(first, first + block_rows)
        losses[rows] = loss(
            image_ND[rows].float(),
            text_ND[rows].float(),
            logit_scale=logit_scale,
            logit_bias=logit_bias,
            within=whole._replace(first=whole.first + first),
        )
    return losses


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
