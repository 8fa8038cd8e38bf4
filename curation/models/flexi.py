"""A vision transformer at another patch size or image size than it was built for, with the same weights.

Source: FlexiViT (Beyer et al. 2022, arXiv:2212.08013), which Flexi-JEST scores with. The patch embedding's kernel is
resampled by the pseudo-inverse of the resize: of all kernels of the new size, the one whose products with resized
patches come nearest to what the old kernel makes of the patches themselves, for enlarged patches exactly. Position
embeddings are resized linearly to the new grid. All other weights are shared, and gradients flow back into the one
kernel and the one table of positions.

n images, patches of p x p pixels, a grid of g_h x g_w patches, width C.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def native_patch_size(visual: nn.Module) -> int:
    """The patch size that a vision transformer was built for."""
    return cast(Any, visual).patch_size[0]


def encode_image(visual: nn.Module, images: Tensor, *, patch_size: int) -> Tensor:
    """Float (n, 3, S_h, S_w) -> (n, D), not normalised; S_h and S_w are multiples of `patch_size`.

    At its own patch size and image size this is what the tower itself gives.
    """
    tower = cast(Any, visual)
    kernel = resampled_kernel(tower.conv1.weight, patch_size)
    patches = F.conv2d(images, kernel.to(images.dtype), tower.conv1.bias, stride=patch_size)
    grid = (patches.shape[2], patches.shape[3])
    tokens = patches.flatten(2).transpose(1, 2)
    head = tower.class_embedding.to(tokens.dtype).expand(len(tokens), 1, -1)
    positions = resized_positions(tower.positional_embedding, tower.grid_size, grid)
    tokens = torch.cat([head, tokens], dim=1) + positions.to(tokens.dtype)
    tokens = tower.transformer(tower.ln_pre(tower.patch_dropout(tokens)))
    pooled, _ = tower._pool(tokens)
    return pooled if tower.proj is None else pooled @ tower.proj


def resampled_kernel(kernel: Tensor, patch_size: int) -> Tensor:
    """A patch embedding's kernel (C, 3, p, p) as (C, 3, patch_size, patch_size)."""
    old = kernel.shape[-1]
    if old == patch_size:
        return kernel
    matrix = _pseudo_inverse(old, patch_size).to(kernel)
    return (kernel.flatten(2) @ matrix.T).unflatten(2, (patch_size, patch_size))


def resized_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Position embeddings (1 + g_h g_w, C) of the class token and an `old` grid as those of a `new` grid."""
    if tuple(old) == tuple(new):
        return positions
    table = positions[1:].T.unflatten(1, old)[None].float()
    resized = F.interpolate(table, new, mode="bilinear", antialias=True)[0].flatten(1).T
    return torch.cat([positions[:1], resized.to(positions.dtype)])


@functools.cache
def _pseudo_inverse(old: int, new: int) -> Tensor:
    """(new^2, old^2) float64: of the transposed matrix that resizes a patch bilinearly."""
    basis = torch.eye(old * old, dtype=torch.float64).reshape(-1, 1, old, old)
    transposed = F.interpolate(basis, (new, new), mode="bilinear", antialias=True).flatten(1)
    return torch.linalg.pinv(transposed)
