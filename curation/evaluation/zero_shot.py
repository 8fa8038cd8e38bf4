"""Zero-shot classification: an image is of the class whose prompts lie nearest to it.

Radford et al. 2021 (arXiv:2103.00020), Sec. 3.1.4: each class is written into many prompt templates ("a photo of a
{}."), and the embedded prompts are averaged. Ties count against us: another class at the same cosine is ranked first.

N images, C classes, T templates, D embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.no_grad()
def class_embeddings(prompts_CTD: Tensor) -> Tensor:
    """Class embeddings (C, D) float32 of unit norm: the mean over the templates of prompts brought to unit norm.

    ValueError if prompts are not finite (C, T, D) with C, T >= 1, or the prompts of a class cancel out.
    """
    if prompts_CTD.ndim != 3 or 0 in prompts_CTD.shape:
        raise ValueError(f"prompts must be (C, T, D), none of them 0, got {tuple(prompts_CTD.shape)}")
    if not torch.isfinite(prompts_CTD).all():
        raise ValueError("prompts must be finite")
    mean_CD = F.normalize(prompts_CTD.float(), dim=2).mean(dim=1)
    norms = torch.linalg.vector_norm(mean_CD, dim=1)
    # What is left of prompts that cancel is rounding, and normalising would make a direction of it.
    cancelled = (norms < 1e-6).nonzero().flatten().tolist()
    if cancelled:
        raise ValueError(f"the prompts of class {cancelled[0]} have mean 0, which has no direction")
    return mean_CD / norms[:, None]


@torch.no_grad()
def zero_shot_accuracy(
    image_ND: Tensor, classes_CD: Tensor, labels: Tensor, *, ks: Sequence[int] = (1, 5), block_rows: int = 4096
) -> dict[int, float]:
    """k -> share in [0, 1] of the images whose class is among the k nearest.

    `labels` (N,) int64. Embeddings of unit norm, any float dtype; cosines in float32. ValueError if embeddings are not
    finite (N, D) and (C, D), a label is not in [0, C), or a k is not in [1, C].
    """
    if image_ND.ndim != 2 or classes_CD.ndim != 2 or not len(image_ND) or image_ND.shape[1] != classes_CD.shape[1]:
        raise ValueError(
            f"images and classes must be (N, D) and (C, D) with N >= 1, "
            f"got {tuple(image_ND.shape)} and {tuple(classes_CD.shape)}"
        )
    # A NaN compares as smaller than everything, so it would count as a hit.
    if not (torch.isfinite(image_ND).all() and torch.isfinite(classes_CD).all()):
        raise ValueError("image and class embeddings must be finite")
    num_classes = len(classes_CD)
    if labels.shape != (len(image_ND),) or labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 ({len(image_ND)},), got {labels.dtype} {tuple(labels.shape)}")
    if not bool(((labels >= 0) & (labels < num_classes)).all()):
        raise ValueError(f"labels must be in [0, {num_classes}), got {int(labels.min())} to {int(labels.max())}")
    if not ks or not all(1 <= k <= num_classes for k in ks):
        raise ValueError(f"ks must be in [1, {num_classes}], the number of classes, got {list(ks)}")
    if block_rows < 1:
        raise ValueError(f"block_rows must be at least 1, got {block_rows}")
    ranks = torch.zeros(len(image_ND), dtype=torch.int64, device=image_ND.device)
    for first in range(0, len(image_ND), block_rows):
        rows = slice(first, first + block_rows)
        cosines_RC = image_ND[rows].float() @ classes_CD.float().T
        own_R1 = cosines_RC.gather(1, labels[rows, None].to(image_ND.device))
        ranks[rows] = (cosines_RC >= own_R1).sum(dim=1) - 1  # the own class is at least as near as itself
    return {k: (ranks < k).double().mean().item() for k in ks}
