"""A vision transformer at another patch size or image size than it was built for, with the same weights.

Source: FlexiViT (Beyer et al. 2022, arXiv:2212.08013), which Flexi-JEST scores with. The patch embedding's kernel is
resampled by the pseudo-inverse of the resize: of all kernels of the new size, the one whose products with resized
patches come nearest to what the old kernel makes of the patches themselves, for enlarged patches exactly. Position
embeddings are resized linearly to the new grid. All other weights are shared, and gradients flow back into the one
kernel and the one table of positions. Towers are open_clip's own, or timm's, which SigLIP has.

n images, patches of p x p pixels, a grid of g_h x g_w patches, width C.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from open_clip.timm_model import TimmModel
from torch import Tensor, nn
from torch.nn import functional as F


def native_patch_size(visual: nn.Module) -> int:
    """The patch size that a vision transformer was built for."""
    tower = cast(Any, visual)
    return tower.trunk.patch_embed.patch_size[0] if _is_timms(visual) else tower.patch_size[0]


def encode_image(visual: nn.Module, images: Tensor, *, patch_size: int) -> Tensor:
    """Float (n, 3, S_h, S_w) -> (n, D), not normalised; S_h and S_w are multiples of `patch_size`.

    At its own patch size and image size this is what the tower itself gives.
    """
    return (_timms if _is_timms(visual) else _open_clips)(visual, images, patch_size)


def _open_clips(visual: nn.Module, images: Tensor, patch_size: int) -> Tensor:
    tower = cast(Any, visual)
    tokens, grid = _patches(tower.conv1, images, patch_size)
    head = tower.class_embedding.to(tokens.dtype).expand(len(tokens), 1, -1)
    positions = resized_positions(tower.positional_embedding, tower.grid_size, grid)
    tokens = torch.cat([head, tokens], dim=1) + positions.to(tokens.dtype)
    tokens = tower.transformer(tower.ln_pre(tower.patch_dropout(tokens)))
    pooled, _ = tower._pool(tokens)
    return pooled if tower.proj is None else pooled @ tower.proj


def _timms(visual: nn.Module, images: Tensor, patch_size: int) -> Tensor:
    """As timm's VisionTransformer goes on, but that class and register tokens may be none, or without positions."""
    trunk = cast(Any, visual).trunk
    tokens, grid = _patches(trunk.patch_embed.proj, images, patch_size)
    tokens = trunk.patch_embed.norm(tokens)
    [table] = trunk.pos_embed
    positions = resized_positions(table, trunk.patch_embed.grid_size, grid).to(tokens.dtype)
    prefix = [token.expand(len(tokens), -1, -1) for token in (trunk.cls_token, trunk.reg_token) if token is not None]
    if trunk.no_embed_class:
        tokens = torch.cat([*prefix, tokens + positions], dim=1)
    else:
        tokens = torch.cat([*prefix, tokens], dim=1) + positions
    tokens = trunk.norm_pre(trunk.patch_drop(trunk.pos_drop(tokens)))
    return cast(Any, visual).head(trunk.forward_head(trunk.norm(trunk.blocks(tokens))))


def _is_timms(visual: nn.Module) -> bool:
    return isinstance(visual, TimmModel)


def _patches(embed: nn.Conv2d, images: Tensor, patch_size: int) -> tuple[Tensor, tuple[int, int]]:
    """Patches (n, g_h g_w, C), and their grid."""
    kernel = resampled_kernel(embed.weight, patch_size).to(images.dtype)
    patches = F.conv2d(images, kernel, embed.bias, stride=patch_size)
    return patches.flatten(2).transpose(1, 2), (patches.shape[2], patches.shape[3])


def resampled_kernel(kernel: Tensor, patch_size: int) -> Tensor:
    """A patch embedding's kernel (C, 3, p, p) as (C, 3, patch_size, patch_size)."""
    old = kernel.shape[-1]
    if old == patch_size:
        return kernel
    matrix = _pseudo_inverse(old, patch_size).to(kernel)
    return (kernel.flatten(2) @ matrix.T).unflatten(2, (patch_size, patch_size))


def resized_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Position embeddings (k + g_h g_w, C) of k class tokens and an `old` grid as those of a `new` grid."""
    if tuple(old) == tuple(new):
        return positions
    first = len(positions) - old[0] * old[1]
    table = positions[first:].T.unflatten(1, old)[None].float()
    resized = F.interpolate(table, new, mode="bilinear", antialias=True)[0].flatten(1).T
    return torch.cat([positions[:first], resized.to(positions.dtype)])


@functools.cache
def _pseudo_inverse(old: int, new: int) -> Tensor:
    """(new^2, old^2) float64: of the transposed matrix that resizes a patch bilinearly."""
    basis = torch.eye(old * old, dtype=torch.float64).reshape(-1, 1, old, old)
    transposed = F.interpolate(basis, (new, new), mode="bilinear", antialias=True).flatten(1)
    return torch.linalg.pinv(transposed)
