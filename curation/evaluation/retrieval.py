"""Recall at k: how often an image finds one of its captions, and a caption its image, among the first k.

The protocol of Flickr30k and COCO (Karpathy and Fei-Fei 2015, arXiv:1412.2306, Sec. 4.1): an image has one or more
captions and is found if any of them is among the k nearest of all captions. Ties count against us: a candidate of
another image at the same cosine is ranked before the right one, so a model that maps everything to one point scores 0.

Two images and four captions, of which 0 and 1 belong to image 0, 2 and 3 to image 1, with cosines

              caption 0    1     2     3
    image 0         0.8   0.1   0.9   0.2
    image 1         0.3   0.4   0.5   0.6

Image 0 has a foreign caption (2) before its best own (0): rank 1. Image 1's best own (3) is first: rank 0. Captions 0
and 3 find their image first; 1 prefers image 1, and 2 image 0. So recall at 1 is 1/2 from image to text and 2/4 from
text to image; at 2 both are 1.

N images, M captions, D embedding, R rows of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_CELLS = 1 << 25
"""Cosines of a block: 128 MiB of float32, whatever the number of candidates."""


class Recall(NamedTuple):
    """k -> share in [0, 1] of the queries that find a match among the k nearest candidates."""

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]


@torch.no_grad()
def retrieval_recall(
    image_ND: Tensor,
    text_MD: Tensor,
    *,
    image_of_text: Tensor | None = None,
    ks: Sequence[int] = (1, 5, 10),
    block_rows: int = 1024,
) -> Recall:
    """Recall at each k in both directions. Embeddings of unit norm, any float dtype; cosines in float32.

    `image_of_text` (M,) int64: the image of each caption; by default caption i belongs to image i. ValueError if
    embeddings are not finite (N, D) and (M, D), an image has no caption, or a k is not in [1, number of candidates].
    """
    image_ND, text_MD = _checked("image", image_ND), _checked("text", text_MD)
    if image_ND.shape[1] != text_MD.shape[1]:
        raise ValueError(f"image and text embeddings must be of one width, got {image_ND.shape[1]}, {text_MD.shape[1]}")
    num_images, num_texts = len(image_ND), len(text_MD)
    if image_of_text is None:
        image_of_text = torch.arange(num_texts)
    image_of_text = image_of_text.to(image_ND.device)
    if image_of_text.shape != (num_texts,) or image_of_text.dtype != torch.int64:
        raise ValueError(
            f"image_of_text must be int64 ({num_texts},), got {image_of_text.dtype} {tuple(image_of_text.shape)}"
        )
    if not bool(((image_of_text >= 0) & (image_of_text < num_images)).all()):
        raise ValueError(
            f"image_of_text must be in [0, {num_images}), got {int(image_of_text.min())} to {int(image_of_text.max())}"
        )
    without = (torch.bincount(image_of_text, minlength=num_images) == 0).nonzero().flatten().tolist()
    if without:
        raise ValueError(f"every image needs a caption, {len(without)} have none, the first is image {without[0]}")
    if not ks or not all(1 <= k <= min(num_images, num_texts) for k in ks):
        raise ValueError(f"ks must be in [1, {min(num_images, num_texts)}], the number of candidates, got {list(ks)}")
    if block_rows < 1:
        raise ValueError(f"block_rows must be at least 1, got {block_rows}")
    images = torch.arange(num_images, device=image_ND.device)
    image_ranks = _ranks(image_ND, text_MD, images, image_of_text, block_rows)
    text_ranks = _ranks(text_MD, image_ND, image_of_text, images, block_rows)
    return Recall(_share_below(image_ranks, ks), _share_below(text_ranks, ks))


def _ranks(query_QD: Tensor, key_KD: Tensor, query_group: Tensor, key_group: Tensor, block_rows: int) -> Tensor:
    """How many keys of other groups stand at or before the best key of the query's own group, (Q,) int64."""
    ranks = torch.zeros(len(query_QD), dtype=torch.int64, device=query_QD.device)
    block_rows = max(1, min(block_rows, BLOCK_CELLS // len(key_KD)))
    for first in range(0, len(query_QD), block_rows):
        rows = slice(first, first + block_rows)
        cosines_RK = query_QD[rows] @ key_KD.T
        own_RK = query_group[rows, None] == key_group
        best_R1 = cosines_RK.masked_fill(~own_RK, -torch.inf).amax(dim=1, keepdim=True)
        ranks[rows] = ((cosines_RK >= best_R1) & ~own_RK).sum(dim=1)
    return ranks


def _share_below(ranks: Tensor, ks: Sequence[int]) -> dict[int, float]:
    return {k: (ranks < k).double().mean().item() for k in ks}


def _checked(name: str, embedding_ND: Tensor) -> Tensor:
    """The embeddings in float32. A NaN would compare as smaller than everything and so be ranked first."""
    if embedding_ND.ndim != 2 or not len(embedding_ND):
        raise ValueError(f"{name} embeddings must be (n, D) with n >= 1, got {tuple(embedding_ND.shape)}")
    if not torch.isfinite(embedding_ND).all():
        raise ValueError(f"{name} embeddings must be finite")
    return embedding_ND.float()
